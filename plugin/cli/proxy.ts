// SPDX-License-Identifier: Apache-2.0
// `proxy set|show|clear`: a proxy that is no pod of this node's runtime, or whose ADD was before the plugin came.

import { CniError, Code } from '../cni/errors.ts';
import { attach, describePod, detach } from '../datapath.ts';
import type { Native } from '../native.ts';
import type { Directories } from '../state.ts';
import { COMMAND_LINE_NETWORK, type Settings } from './directories.ts';
import { type EnrollOptions, recordsOf, targetOf } from './enroll.ts';
import { proxyDocument, proxyName } from './status.ts';
import { survey } from './survey.ts';
import { formatTable } from './table.ts';
import { printable, type Terminal } from './terminal.ts';

/** The newest proxy gets new connections as soon as it listens; the one before keeps those that it has. */
export function setProxy(native: Native, terminal: Terminal, settings: Settings, options: EnrollOptions): 0 {
  const own = { ...settings, network: COMMAND_LINE_NETWORK };
  const record = attach(native, settings.config, targetOf(native, own, options, 'proxy'));
  terminal.out(`proxy ${describePod(record)}: ${record.ifname} in ${record.netnsPath} through ${record.hostIfname}\n`);
  return 0;
}

export function showProxies(native: Native, terminal: Terminal, directories: Directories, json: boolean): 0 {
  const proxies = survey(native, directories)?.proxies ?? [];
  if (json) {
    terminal.out(`${JSON.stringify(proxies.map(proxyDocument), undefined, 2)}\n`);
    return 0;
  }
  if (proxies.length === 0) {
    terminal.out('No proxy.\n');
    return 0;
  }
  terminal.out(
    formatTable(
      ['PROXY', 'NETNS', 'LISTENER', 'PORT', 'IPV4', 'IPV6'],
      proxies.flatMap((proxy) =>
        proxy.listeners.map(({ kind, port, ipv4, ipv6 }) => [
          `${printable(proxyName(proxy))}${proxy.present ? '' : ' (gone)'}`,
          proxy.netnsPath || '-',
          kind,
          String(port),
          ipv4,
          ipv6,
        ]),
      ),
    ),
  );
  return 0;
}

/**
 * Without `netns` those that `proxy set` made for a namespace that no runtime had told of: others go with their pods.
 */
export function clearProxies(native: Native, terminal: Terminal, settings: Settings, netns: string | undefined): 0 {
  const proxies = recordsOf(native, settings).filter(({ record }) => record.role === 'proxy');
  const chosen = proxies.filter(({ record }) =>
    netns === undefined ? record.network === COMMAND_LINE_NETWORK : record.netnsPath === netns,
  );
  if (chosen.length === 0) {
    const others = proxies.map(({ record }) => `${describePod(record)} in ${record.netnsPath}`).join(', ');
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      netns === undefined ? 'no proxy was set by hand' : `no proxy in ${netns}`,
      others === '' ? 'there is none at all' : `there is ${others}; --netns names one that came by ADD`,
    );
  }
  const { stateDir, runDir } = settings.config;
  for (const { key, record } of chosen) {
    detach(native, { stateDir, runDir }, key);
    terminal.out(`proxy ${describePod(record)} cleared\n`);
  }
  return 0;
}
