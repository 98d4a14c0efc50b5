// SPDX-License-Identifier: Apache-2.0
// `counters`: packets and bytes by program, pod and reason, as the programs counted them.

import { describePod } from '../datapath.ts';
import type { AttachmentRecord, Counter, Native } from '../native.ts';
import { type Directories, openState } from '../state.ts';
import { isRefusal } from './survey.ts';
import { formatTable } from './table.ts';
import { printable, type Terminal } from './terminal.ts';

export type CountersFormat = 'table' | 'json' | 'prometheus';

interface Line extends Counter {
  namespace: string;
  /** pod name, or what else names the attachment; '' if the interface has none (any more) */
  name: string;
  subject: string;
}

/** @param pod "NAMESPACE/NAME": only this pod's; it need not be there */
export function counters(
  native: Native,
  terminal: Terminal,
  directories: Directories,
  format: CountersFormat,
  pod: string | undefined,
): 0 {
  const lines = read(native, directories).filter((line) => pod === undefined || line.subject === pod);
  if (format === 'json') {
    const list = lines.map(({ program, namespace, name, ifindex, reason, packets, bytes }) => ({
      program,
      namespace,
      pod: name,
      ifindex,
      reason,
      packets: Number(packets),
      bytes: Number(bytes),
    }));
    terminal.out(`${JSON.stringify(list, undefined, 2)}\n`);
  } else if (format === 'prometheus') {
    terminal.out(exposition(lines));
  } else {
    terminal.out(
      formatTable(
        ['PROGRAM', 'POD', 'REASON', 'PACKETS', 'BYTES'],
        lines.map((line) => [
          line.program,
          printable(line.subject) || (line.ifindex === 0 ? '(inside the proxy)' : `(ifindex ${line.ifindex})`),
          isRefusal(line.reason) ? terminal.red(line.reason) : line.reason,
          String(line.packets),
          String(line.bytes),
        ]),
      ),
    );
  }
  return 0;
}

function read(native: Native, directories: Directories): Line[] {
  const state = openState(native, directories.stateDir);
  if (state === null) return [];
  try {
    const owners = new Map<number, AttachmentRecord>(
      native.listAttachments(state).map(({ record }) => [record.interfaceId, record]),
    );
    return native
      .counters(state)
      .filter(({ packets }) => packets > 0n)
      .map((counter) => {
        const owner = counter.ifindex === 0 ? undefined : owners.get(counter.ifindex);
        return {
          ...counter,
          namespace: owner?.podNamespace ?? '',
          name: owner === undefined ? '' : owner.podName || owner.containerId,
          subject: owner === undefined ? '' : describePod(owner),
        };
      })
      .sort((a, b) => compare(a.subject, b.subject) || compare(a.program, b.program) || compare(a.reason, b.reason));
  } finally {
    native.closeState(state);
  }
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** Text format 0.0.4 of Prometheus. */
export function exposition(lines: readonly Line[]): string {
  // Interfaces without an owner, and several attachments of one pod, come to one series.
  const metric = (name: string, help: string, value: (line: Line) => bigint) => {
    const series = new Map<string, bigint>();
    for (const line of lines) {
      const labels = Object.entries({
        program: line.program,
        namespace: line.namespace,
        pod: line.name,
        reason: line.reason,
      });
      const key = labels.map(([label, text]) => `${label}="${escapeLabel(text)}"`).join(',');
      series.set(key, (series.get(key) ?? 0n) + value(line));
    }
    const samples = [...series].map(([labels, sum]) => `${name}{${labels}} ${sum}\n`).join('');
    return `# HELP ${name} ${help}\n# TYPE ${name} counter\n${samples}`;
  };
  return (
    metric('ambient_redirect_packets_total', 'Packets by program, pod and reason.', ({ packets }) => packets) +
    metric('ambient_redirect_bytes_total', 'Bytes by program, pod and reason.', ({ bytes }) => bytes)
  );
}

function escapeLabel(text: string): string {
  return text.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n');
}
