// SPDX-License-Identifier: Apache-2.0
// `pods`: a row per attachment.

import { formatAddress } from '../cni/address.ts';
import { describePod } from '../datapath.ts';
import { isDraining } from '../drain.ts';
import type { Native } from '../native.ts';
import type { Directories } from '../state.ts';
import { type Attachment, survey } from './survey.ts';
import { formatTable } from './table.ts';
import { printable, type Terminal } from './terminal.ts';

export type PodsFormat = 'table' | 'wide' | 'json';

export function pods(native: Native, terminal: Terminal, directories: Directories, format: PodsFormat): 0 {
  const attachments = survey(native, directories)?.attachments ?? [];
  if (format === 'json') {
    terminal.out(
      `${JSON.stringify(
        attachments.map((attachment) => document(native, attachment)),
        undefined,
        2,
      )}\n`,
    );
    return 0;
  }
  const columns = format === 'wide' ? [...COLUMNS, ...WIDE] : COLUMNS;
  terminal.out(
    formatTable(
      columns.map(([name]) => name),
      attachments.map((attachment) => columns.map(([, cell]) => printable(cell(attachment, native)))),
    ),
  );
  return 0;
}

type Column = readonly [name: string, cell: (attachment: Attachment, native: Native) => string];

const COLUMNS: readonly Column[] = [
  ['POD', ({ record }) => describePod(record)],
  ['CONTAINER', ({ record }) => shortened(record.containerId)],
  ['INTERFACE', ({ record }) => record.ifname],
  ['ADDRESSES', ({ record }) => record.addresses.map(formatAddress).join(',') || '-'],
  ['MODE', (attachment, native) => mode(attachment, native)],
  ['PROGRAMS', ({ record, alive }) => (record.hooks.length === 0 ? '-' : `${alive}/${record.hooks.length}`)],
  ['SINCE', ({ record }) => since(record.enrolledAt)],
  ['DROPS', ({ drops }) => String(drops)],
];

const WIDE: readonly Column[] = [
  [
    'HOST INTERFACE',
    ({ record, present }) => (record.hostIfname === '' ? '-' : `${record.hostIfname}${present ? '' : ' (gone)'}`),
  ],
  ['HOOK', ({ record }) => record.hooks[0]?.kind ?? '-'],
  ['POLICY', ({ record }, native) => (record.role === 'pod' ? policy(record.flags, native) : '-')],
  ['NETWORK', ({ record }) => record.network],
  ['UID', ({ record }) => record.podUid || '-'],
  ['NETNS', ({ record }) => record.netnsPath],
];

function document(native: Native, { key, record, present, alive, drops }: Attachment): unknown {
  return {
    key,
    namespace: record.podNamespace,
    name: record.podName,
    uid: record.podUid,
    serviceAccount: record.serviceAccount,
    network: record.network,
    containerId: record.containerId,
    interface: record.ifname,
    addresses: record.addresses.map(formatAddress),
    role: record.role,
    contract: record.contract,
    state: record.state,
    draining: isDraining(native, record),
    failurePolicy: record.role === 'pod' ? policy(record.flags, native) : null,
    hostInterface: { name: record.hostIfname, ifindex: record.hostIfindex, mac: record.hostMac, present },
    netns: { path: record.netnsPath, ino: Number(record.netns.ino), cookie: record.netns.cookie.toString() },
    programs: { alive, attached: record.hooks.map(({ program, kind, direction }) => ({ program, kind, direction })) },
    enrolledAt: record.enrolledAt === 0 ? null : new Date(record.enrolledAt * 1000).toISOString(),
    drops: Number(drops),
  };
}

function mode({ record }: Attachment, native: Native): string {
  if (record.state === 'attaching') return 'unfinished';
  if (isDraining(native, record)) return 'draining';
  if (record.role === 'none') return 'not enrolled';
  return record.role === 'proxy' ? `${record.contract} proxy` : record.contract;
}

function policy(flags: number, native: Native): string {
  if ((flags & (native.flags.INTERFACE_POLICY_OPEN ?? 0)) !== 0) return 'open';
  return (flags & (native.flags.INTERFACE_CLOSED_RESET ?? 0)) === 0 ? 'closed' : 'closed, reset';
}

/** As runtimes' tools show container ids. */
function shortened(containerId: string): string {
  return /^[0-9a-f]{64}$/.test(containerId) ? containerId.slice(0, 13) : containerId;
}

function since(seconds: number): string {
  return seconds === 0 ? '-' : new Date(seconds * 1000).toISOString().replace('.000', '');
}
