// SPDX-License-Identifier: Apache-2.0
// `enroll`: what ADD does, for a pod that runs already. Its open connections are older than its enrolment and go on
// direct; new ones are redirected.

import { announceAttachment } from '../agent-client.ts';
import { attachmentKey, hex } from '../attachments.ts';
import { formatAddress, type IpPrefix } from '../cni/address.ts';
import { CniError, Code } from '../cni/errors.ts';
import { attach, describePod, isSameNetns, type Target } from '../datapath.ts';
import { startDrain, takeOut } from '../drain.ts';
import type { AttachmentRecord, Native } from '../native.ts';
import type { PortRange } from '../redirect/config.ts';
import { mergeExclusions } from '../redirect/exclusions.ts';
import { assertOtherNetns, openSandbox } from '../sandbox.ts';
import { openState } from '../state.ts';
import type { Settings } from './directories.ts';
import { count } from './survey.ts';
import type { Terminal } from './terminal.ts';
import { tellAgent } from './unenroll.ts';

export interface EnrollOptions {
  netns: string;
  ifname: string;
  /** "NAMESPACE/NAME" */
  pod?: string;
  serviceAccount?: string;
  uid?: string;
  containerId?: string;
  /** Of a pod that changes its contract; default true, false cuts. */
  drain?: boolean;
}

/** In addition to what the configuration says. */
export interface TrafficOptions {
  excludeInboundPorts?: PortRange[];
  excludeOutboundPorts?: PortRange[];
  excludeOutboundCidrs?: IpPrefix[];
  dnsCapture?: boolean;
}

/**
 * For a pod that is enrolled already: its settings are replaced where they are, and no connection is cut. Another
 * contract has other hooks and another proxy: the pod drains first, and is enrolled by the next call when it has. Throws
 * what attach() does, and CniError 11 while it drains.
 */
export async function enroll(
  native: Native,
  terminal: Terminal,
  settings: Settings,
  options: EnrollOptions & TrafficOptions,
): Promise<0> {
  const target = targetOf(native, settings, options, 'pod');
  const config = {
    ...settings.config,
    dnsCapture: options.dnsCapture ?? settings.config.dnsCapture,
    exclude: mergeExclusions(settings.config.exclude, {
      inboundPorts: options.excludeInboundPorts ?? [],
      outboundPorts: options.excludeOutboundPorts ?? [],
      outboundCIDRs: options.excludeOutboundCidrs ?? [],
    }),
  };
  const before = recordsOf(native, settings).find(({ key }) => hex(key) === hex(target.key))?.record;
  if (before !== undefined && before.contract !== config.proxy.contract) {
    await leaveContract(native, terminal, settings, target, before, options.drain !== false);
  }
  const record = attach(native, config, target);
  if (record.contract === 'in-pod') {
    try {
      await announceAttachment(config, record);
    } catch (error) {
      // One that was served already stays in the mesh: the agent sees to it.
      if (before?.state !== 'attached') takeOut(native, config, target.key);
      throw error;
    }
  }
  const addresses = record.addresses.map(formatAddress).join(', ') || 'no address';
  terminal.out(
    `enrolled ${describePod(record)}: ${record.ifname} (${addresses}) through ${record.hostIfname || 'programs in its namespace only'}\n`,
  );
  return 0;
}

async function leaveContract(
  native: Native,
  terminal: Terminal,
  { config }: Settings,
  { key }: Target,
  record: AttachmentRecord,
  drain: boolean,
): Promise<void> {
  if (record.role !== 'pod' || record.state !== 'attached') return;
  const left = drain ? startDrain(native, config, key, record) : 0;
  if (left > 0) {
    throw new CniError(
      Code.TRY_AGAIN_LATER,
      `${describePod(record)} leaves the contract "${record.contract}" first: new connections go direct, ${count(left, 'socket')} of the proxy's for it left`,
      'enroll it again when they are closed, or with --no-drain to cut them',
    );
  }
  takeOut(native, config, key);
  if (record.contract === 'in-pod') await tellAgent(terminal, config, record);
}

/**
 * The target of an attach by hand. A pod that the plugin has seen keeps the key of its ADD, so that its DEL finds it;
 * what is not named here is taken over from that record. Throws CniError 8, 100, 103, 104 or 110.
 */
export function targetOf(native: Native, settings: Settings, options: EnrollOptions, role: 'pod' | 'proxy'): Target {
  const { netns: path, ifname } = options;
  const netns = openSandbox(native, path);
  try {
    assertOtherNetns(native, netns, path);
    const identity = native.netnsIdentity(netns);
    const known = recordsOf(native, settings).find(
      ({ record }) => isSameNetns(identity, record.netns) && record.ifname === ifname,
    )?.record;
    const containerId = options.containerId ?? known?.containerId ?? `netns-${identity.ino}`;
    // Another container id in the same namespace would be a second attachment of one interface.
    if (known !== undefined && known.containerId !== containerId) {
      throw new CniError(
        Code.INVALID_NETWORK_CONFIG,
        `${ifname} in ${path} is already recorded`,
        `as ${describePod(known)}, container id ${known.containerId}, not ${containerId}`,
      );
    }
    const network = known?.network ?? settings.network;
    const [namespace = '', name = ''] = options.pod?.split('/') ?? [known?.podNamespace, known?.podName];
    return {
      key: attachmentKey(native, network, containerId, ifname),
      network,
      containerId,
      ifname,
      netnsPath: path,
      resultAddresses: [],
      pod: {
        name,
        namespace,
        uid: options.uid ?? known?.podUid ?? '',
        serviceAccount: options.serviceAccount ?? known?.serviceAccount ?? '',
      },
      role,
      strict: false,
      shaped: false,
      egressLimited: false,
      bypassInbound: false,
    };
  } finally {
    native.close(netns);
  }
}

/** [] if there is no state. */
export function recordsOf(
  native: Native,
  { config }: Pick<Settings, 'config'>,
): { key: Uint8Array; record: AttachmentRecord }[] {
  const state = openState(native, config.stateDir);
  if (state === null) return [];
  try {
    return native.listAttachments(state);
  } finally {
    native.closeState(state);
  }
}
