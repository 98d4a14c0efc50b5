// SPDX-License-Identifier: Apache-2.0
// `status`: is the traffic of enrolled pods in order on this node, and what carries it.

import { describePod } from '../datapath.ts';
import { endDrains } from '../drain.ts';
import type { Native } from '../native.ts';
import { type Directories, knownStateDirs } from '../state.ts';
import {
  count,
  isRefusal,
  type Problem,
  type Survey,
  type SurveyedProxy,
  survey,
  type WantedListener,
} from './survey.ts';
import { printable, type Terminal } from './terminal.ts';

export function status(native: Native, terminal: Terminal, directories: Directories, json: boolean): 0 | 1 {
  endDrains(native, directories);
  const found = survey(native, directories);
  if (found === null) {
    const lost = knownStateDirs(directories.runDir).includes(directories.stateDir);
    if (lost) return reportLost(terminal, directories, json);
    terminal.out(
      json
        ? `${JSON.stringify({ state: { dir: directories.stateDir, present: false }, problems: [] }, undefined, 2)}\n`
        : `No state in ${directories.stateDir}: no pod was attached on this node since it booted.\n`,
    );
    return 0;
  }
  terminal.out(json ? `${JSON.stringify(document(native, found), undefined, 2)}\n` : page(native, found, terminal));
  return found.problems.some(({ severity }) => severity === 'impaired') ? 1 : 0;
}

/** Removing the directory detaches every program: that is uninstalling by hand. */
function reportLost(terminal: Terminal, { stateDir, runDir }: Directories, json: boolean): 1 {
  const text = `it was in use since boot and has been removed: running pods are not redirected any more; remove ${runDir} too to begin anew`;
  const problems: Problem[] = [{ severity: 'impaired', object: stateDir, text }];
  terminal.out(
    json
      ? `${JSON.stringify({ state: { dir: stateDir, present: false }, problems }, undefined, 2)}\n`
      : `No state in ${stateDir}: ${terminal.red('impaired')}: ${text}.\n`,
  );
  return 1;
}

function counts(found: Survey) {
  const having = (role: string, state: string) =>
    found.attachments.filter(({ record }) => record.role === role && record.state === state).length;
  return {
    enrolled: having('pod', 'attached'),
    proxies: having('proxy', 'attached'),
    recorded: found.attachments.filter(({ record }) => record.state === 'recorded').length,
    attaching: found.attachments.filter(({ record }) => record.state === 'attaching').length,
  };
}

function variants(native: Native, found: Survey): string[] {
  return Object.entries(native.flags)
    .filter(([name, bit]) => name.startsWith('VARIANT_') && (found.settings.variant & bit) !== 0)
    .map(([name]) => name.slice('VARIANT_'.length).toLowerCase().replaceAll('_', '-'));
}

function document(native: Native, found: Survey): unknown {
  return {
    state: {
      dir: found.directories.stateDir,
      present: true,
      layout: found.settings.layout,
      maxPods: found.settings.maxPods,
      bootId: found.settings.bootId,
    },
    kernel: { release: found.kernel, hook: found.hook, forcedVariants: variants(native, found) },
    proxies: found.proxies.map(proxyDocument),
    pods: counts(found),
    maps: found.maps,
    bytes: totalBytes(found),
    drops: drops(found).map(({ reason, packets }) => ({ reason, packets: Number(packets) })),
    problems: found.problems,
  };
}

/** One element of `proxies` in `status -o json`, and of `proxy show -o json`. */
export function proxyDocument(proxy: SurveyedProxy): unknown {
  const { record, attachment } = proxy;
  return {
    name: proxyName(proxy),
    contract: attachment?.record.contract ?? 'shared',
    netns: { path: proxy.netnsPath, ino: Number(record.netnsIno) },
    interface: { host: attachment?.record.hostIfname ?? '', ifindex: record.hostIfindex, mac: record.mac },
    present: proxy.present,
    listeners: proxy.listeners,
  };
}

function page(native: Native, found: Survey, terminal: Terminal): string {
  const { enrolled, recorded, attaching } = counts(found);
  const forced = variants(native, found);
  const lines: [string, string][] = [
    [
      'state',
      `${found.directories.stateDir} (layout ${found.settings.layout}, room for ${count(found.settings.maxPods, 'pod')})`,
    ],
    ['kernel', `${found.kernel}, hooks: ${found.hook}${forced.length > 0 ? `, forced: ${forced.join(', ')}` : ''}`],
    ...proxyLines(found.proxies, terminal),
    [
      'pods',
      `${enrolled} enrolled, ${recorded} seen and not enrolled${attaching > 0 ? `, ${terminal.yellow(`${attaching} unfinished`)}` : ''}`,
    ],
    [
      'maps',
      `${(totalBytes(found) / 1024).toFixed(0)} KiB: ${found.maps.map(({ map, entries, capacity }) => `${map} ${entries}/${capacity}`).join(', ')}`,
    ],
    [
      'drops',
      drops(found)
        .map(({ reason, packets }) => `${reason} ${packets}`)
        .join(', ') || 'none',
    ],
  ];
  if (found.problems.length === 0) lines.push(['problems', terminal.green('none')]);
  for (const { severity, object, text } of found.problems) {
    const word = severity === 'impaired' ? terminal.red('impaired') : terminal.yellow('warning');
    lines.push(['problem', `${word}: ${printable(object)}: ${text}`]);
  }
  return lines.map(([name, text]) => `${name.padEnd(10)}${text}\n`).join('');
}

function proxyLines(proxies: readonly SurveyedProxy[], terminal: Terminal): [string, string][] {
  if (proxies.length === 0) return [['proxy', terminal.yellow('none')]];
  return proxies.flatMap((proxy): [string, string][] => {
    const where = `${proxy.attachment?.record.contract ?? 'shared'}, netns ${proxy.netnsPath || '?'} (inode ${proxy.record.netnsIno})`;
    const gone = proxy.present ? '' : `, ${terminal.red('gone')}`;
    return [
      ['proxy', `${printable(proxyName(proxy))}: ${where}${gone}`],
      ...proxy.listeners.map((listener): [string, string] => [
        '',
        `port ${listener.port} ${listener.kind}: ${describe(listener, terminal)}`,
      ]),
    ];
  });
}

function describe({ ipv4, ipv6 }: WantedListener, terminal: Terminal): string {
  if (ipv4 === 'listening' && ipv6 === 'listening') return terminal.green('listening');
  if (ipv4 === ipv6) return terminal.red(ipv4);
  if (ipv4 === 'listening' && ipv6 === 'missing') return terminal.yellow('listening on IPv4 only');
  if (ipv6 === 'listening' && ipv4 === 'missing') return terminal.yellow('listening on IPv6 only');
  return terminal.yellow(`IPv4 ${ipv4}, IPv6 ${ipv6}`);
}

export function proxyName(proxy: SurveyedProxy): string {
  return proxy.attachment === null ? `ifindex ${proxy.record.hostIfindex}` : describePod(proxy.attachment.record);
}

function totalBytes(found: Survey): number {
  return found.maps.reduce((sum, { bytes }) => sum + bytes, 0);
}

/** Dropped packets by reason, most first. */
function drops(found: Survey): { reason: string; packets: bigint }[] {
  const sums = new Map<string, bigint>();
  for (const { reason, packets } of found.counters) {
    if (isRefusal(reason) && packets > 0n) sums.set(reason, (sums.get(reason) ?? 0n) + packets);
  }
  return [...sums].map(([reason, packets]) => ({ reason, packets })).sort((a, b) => (a.packets > b.packets ? -1 : 1));
}
