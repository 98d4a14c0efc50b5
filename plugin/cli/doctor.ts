// SPDX-License-Identifier: Apache-2.0
// `doctor`: what of this machine the plugin needs, what is there, and what would not work and why. Changes nothing,
// and goes on past everything that cannot be looked at.

import { readdirSync, readFileSync, statSync } from 'node:fs';
import { arch, release } from 'node:os';
import { dirname, join } from 'node:path';
import { CniError } from '../cni/errors.ts';
import { decodeDocument } from '../cni/netconf.ts';
import { describePod } from '../datapath.ts';
import { type AttachmentRecord, HOST, type Native } from '../native.ts';
import { declaresCapability, parseConfig } from '../redirect/config.ts';
import type { Directories } from '../state.ts';
import { isEntry } from './directories.ts';
import { type Survey, survey } from './survey.ts';
import { formatTable } from './table.ts';
import { printable, type Terminal } from './terminal.ts';

export interface Finding {
  /** fails: ADD would fail or pods would not be redirected. note: nothing to do */
  level: 'ok' | 'note' | 'warning' | 'fails';
  subject: string;
  text: string;
}

/** What a kernel feature gives. `without` is what stands in for it, or why nothing does. */
interface Variant {
  feature: string;
  since: string;
  gives: string;
  without: string;
  required: boolean;
}

const VARIANTS: readonly Variant[] = [
  {
    feature: 'tcx',
    since: '6.6',
    gives: 'TCX links: nobody else can take our programs away',
    without: 'clsact filters',
    required: false,
  },
  {
    feature: 'redirectPeer',
    since: '5.10',
    gives: 'straight into a pod, past the host-side queue',
    without: 'redirect through the host-side veth',
    required: false,
  },
  {
    feature: 'skLookup',
    since: '5.10',
    gives: 'sockets chosen inside the proxy by sk_lookup',
    without: 'TIME_WAIT tuples are left to TCP; before 6.6 SO_REUSEPORT listeners need TPROXY rules',
    required: false,
  },
  {
    feature: 'skAssign',
    since: '5.7',
    gives: 'listener assigned to each captured SYN',
    without: 'TPROXY rules in the proxy’s namespace, made by nft',
    required: false,
  },
  {
    feature: 'skcLookup',
    since: '5.2',
    gives: 'the proxy’s sockets as the flow table',
    without: 'nothing in this version',
    required: true,
  },
  {
    feature: 'tcpCheckSyncookie',
    since: '5.2',
    gives: 'connections opened by SYN cookies are recognised',
    without: 'nothing in this version',
    required: true,
  },
  {
    feature: 'netnsCookie',
    since: '5.14',
    gives: 'namespaces told apart for certain',
    without: 'inode, interface and MAC address',
    required: false,
  },
  {
    feature: 'btf',
    since: '4.18',
    gives: 'maps and programs described for bpftool',
    without: 'plain bytes there',
    required: false,
  },
];

export interface Diagnosis {
  kernel: { release: string; architecture: string; features: Record<string, boolean> };
  findings: Finding[];
}

export function doctor(
  native: Native,
  terminal: Terminal,
  directories: Directories,
  confDir: string,
  json: boolean,
): 0 | 1 {
  const diagnosis = diagnose(native, directories, confDir);
  terminal.out(json ? `${JSON.stringify(diagnosis, undefined, 2)}\n` : page(diagnosis, terminal));
  return diagnosis.findings.some(({ level }) => level === 'fails') ? 1 : 0;
}

export function diagnose(native: Native, directories: Directories, confDir: string): Diagnosis {
  const features = native.features();
  const findings: Finding[] = [
    ...VARIANTS.filter(({ feature, required }) => required && features[feature] !== true).map(
      ({ feature, since }): Finding => ({
        level: 'fails',
        subject: 'kernel',
        text: `no ${feature} (needs ${since}), and this version has nothing in its place`,
      }),
    ),
    ...capabilities(native.capabilities()),
    ...lockdown(),
    ...bpffs(native, directories),
    ...attempt('state', () => state(native, directories)),
    ...conflists(confDir),
    ...sysctls(),
    {
      level: 'note',
      subject: 'C library',
      text: `glibc ${glibcVersion()}; the executable needs 2.28 or later, not musl`,
    },
  ];
  return { kernel: { release: release(), architecture: arch(), features }, findings };
}

/** linux/capability.h */
const CAPABILITIES = { CAP_NET_ADMIN: 12n, CAP_SYS_ADMIN: 21n } as const;

export function capabilities(effective: bigint): Finding[] {
  const missing = Object.entries(CAPABILITIES).filter(([, bit]) => ((effective >> bit) & 1n) === 0n);
  if (missing.length === 0) return [{ level: 'ok', subject: 'capabilities', text: 'CAP_NET_ADMIN and CAP_SYS_ADMIN' }];
  return missing.map(([name]) => ({ level: 'fails', subject: 'capabilities', text: `${name} is missing` }));
}

function lockdown(): Finding[] {
  const mode = /\[(\w+)\]/.exec(contents('/sys/kernel/security/lockdown') ?? '')?.[1];
  if (mode !== 'confidentiality') return [];
  const text = 'the kernel is locked down for confidentiality, where bpf(2) is restricted';
  return [{ level: 'warning', subject: 'kernel', text }];
}

function bpffs(native: Native, { stateDir }: Directories): Finding[] {
  const parent = dirname(stateDir);
  if (!native.isBpffs(parent)) {
    return parent === '/sys/fs/bpf'
      ? [{ level: 'note', subject: 'bpffs', text: `none on ${parent} yet; the first ADD mounts it` }]
      : [
          {
            level: 'fails',
            subject: 'bpffs',
            text: `${parent} is not on a bpf file system, so no state can be made in ${stateDir}`,
          },
        ];
  }
  const inHost = device(join('/proc/1/root', parent));
  if (inHost !== undefined && inHost !== device(parent)) {
    const text = `${parent} is another instance than the host's: what is pinned here ends with this mount namespace`;
    return [{ level: 'warning', subject: 'bpffs', text }];
  }
  return [{ level: 'ok', subject: 'bpffs', text: `mounted on ${parent}` }];
}

function state(native: Native, directories: Directories): Finding[] {
  const found = survey(native, directories);
  if (found === null) return [{ level: 'note', subject: 'state', text: `none in ${directories.stateDir}` }];
  return [
    { level: 'ok', subject: 'state', text: `${directories.stateDir}, layout ${found.settings.layout}` },
    ...found.problems.map(
      ({ severity, object, text }): Finding => ({
        level: severity === 'impaired' ? 'fails' : 'warning',
        subject: object,
        text,
      }),
    ),
    ...foreignPrograms(native, found),
    ...changedMac(native, found),
  ];
}

/**
 * Others' programs and filters on the host-side interfaces that ours are on. Those that run before ours keep from it
 * whatever they end the chain for. A TCX program runs before every filter.
 */
function foreignPrograms(native: Native, found: Survey): Finding[] {
  const findings: Finding[] = [];
  const hasTcx = native.features().tcx === true;
  for (const { record, present } of found.attachments) {
    if (!present || record.hooks.length === 0) continue;
    for (const direction of ['ingress', 'egress'] as const) {
      const own = record.hooks.find((hook) => hook.direction === direction && !hook.inNetns);
      let reached = false;
      const look = (programId: number, what: string) => {
        if (programId === own?.programId) reached = true;
        else findings.push(foreign(`${direction} of ${record.hostIfname}`, what, own !== undefined && !reached));
      };
      if (hasTcx) {
        for (const { programId } of native.queryTcx(HOST, record.hostIfindex, direction)) {
          look(programId, `TCX program ${programId} (${nameOf(native, programId)})`);
        }
      }
      for (const { programId, kind, priority, name } of native.filters(HOST, record.hostIfindex, direction)) {
        look(programId, `a ${kind} filter of priority ${priority}${name === '' ? '' : ` (${printable(name)})`}`);
      }
    }
  }
  return findings;
}

function foreign(subject: string, what: string, ahead: boolean): Finding {
  if (!ahead) {
    return { level: 'note', subject, text: `${what} is there too; ours lets on whatever it does not redirect or drop` };
  }
  const text = `${what} runs before ours; what it ends the chain for (TC_ACT_OK) is not redirected`;
  return { level: 'warning', subject, text };
}

/** A later plugin of the chain may change it (tuning): our programs take what has the new one for another host's. */
function changedMac(native: Native, found: Survey): Finding[] {
  return found.attachments.flatMap(({ record, present }) => {
    if (!present || record.role !== 'pod' || record.hostIfindex === 0) return [];
    const mac = macOf(native, record);
    if (mac === undefined || mac === record.podMac) return [];
    const subject = `${record.ifname} of ${describePod(record)}`;
    const text = `its MAC address is ${mac} and was ${record.podMac} at ADD: it loses its connections until it is enrolled again`;
    return [{ level: 'fails', subject, text }];
  });
}

/** undefined where the namespace cannot be opened or the interface is gone, which the survey reports. */
function macOf(native: Native, record: AttachmentRecord): string | undefined {
  let netns: number;
  try {
    netns = native.openNetns(record.netnsPath);
  } catch {
    return undefined;
  }
  try {
    if (native.netnsIdentity(netns).ino !== record.netns.ino) return undefined;
    return native.linkByIndex(netns, record.podIfindex)?.mac;
  } finally {
    native.close(netns);
  }
}

function nameOf(native: Native, programId: number): string {
  return printable(native.programById(programId)?.name ?? 'gone');
}

/** The files as a runtime reads them: by name, and containerd takes the first only. */
export function conflists(directory: string): Finding[] {
  let names: string[];
  try {
    names = readdirSync(directory)
      .filter((name) => /\.(conf|conflist|json)$/.test(name))
      .sort();
  } catch (error) {
    const text = `${directory} cannot be read: ${(error as NodeJS.ErrnoException).code}`;
    return [{ level: 'note', subject: 'conflist', text }];
  }
  const findings = names.flatMap((name, index) => conflist(join(directory, name), index === 0));
  if (findings.length > 0) return findings;
  return [
    { level: 'note', subject: 'conflist', text: `no file of ${directory} has an entry of type "ambient-redirect"` },
  ];
}

function conflist(path: string, first: boolean): Finding[] {
  const finding = (level: Finding['level'], text: string): Finding => ({ level, subject: path, text });
  let document: Readonly<Record<string, unknown>>;
  try {
    document = decodeDocument(readFileSync(path));
  } catch (error) {
    return first ? [finding('warning', error instanceof Error ? error.message : String(error))] : [];
  }
  const plugins = Array.isArray(document.plugins) ? document.plugins : [document];
  const at = plugins.findIndex(isEntry);
  if (at < 0) return [];

  const types = plugins.map((plugin: unknown) =>
    typeof plugin === 'object' && plugin !== null ? String(Reflect.get(plugin, 'type')) : '?',
  );
  const findings: Finding[] = [];
  if (!first)
    findings.push(finding('warning', 'a file that sorts before it is read instead, by runtimes that take one'));
  if (at === 0)
    findings.push(
      finding('fails', 'our entry is the first of the chain; it needs the interface that another plugin made'),
    );
  const entry = plugins[at] as Readonly<Record<string, unknown>>;
  try {
    const config = parseConfig(entry);
    const declares = (capability: string) => declaresCapability({ raw: entry, runtimeConfig: {} }, capability);
    if (config.enrollment === 'annotation' && !declares('io.kubernetes.cri.pod-annotations')) {
      findings.push(
        finding(
          'fails',
          'enrollment is "annotation", and the capability io.kubernetes.cri.pod-annotations is not declared',
        ),
      );
    }
    if (types.indexOf('bandwidth', at) > at && !declares('bandwidth')) {
      findings.push(
        finding(
          'warning',
          'bandwidth follows, and our entry does not declare the capability "bandwidth": its queue would be skipped',
        ),
      );
    }
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    findings.push(finding('fails', error.message));
  }
  const rival = types.find((type) => ['istio-cni', 'kmesh-cni', 'merbridge-cni', 'linkerd-cni'].includes(type));
  if (rival !== undefined)
    findings.push(finding('warning', `${rival} is in the same chain; it may redirect the same pods`));
  if (document.cniVersion === '1.1.0') {
    findings.push(
      finding('note', 'cniVersion 1.1.0: containerd before 1.7 fails every ADD with it; 1.0.0 works everywhere'),
    );
  }
  if (findings.every(({ level }) => level === 'note'))
    findings.unshift(finding('ok', `chain: ${types.map(printable).join(', ')}`));
  return findings;
}

function sysctls(): Finding[] {
  const findings: Finding[] = [];
  const forwards = contents('/proc/sys/net/ipv4/ip_forward')?.trim();
  if (forwards === '0') {
    findings.push({
      level: 'warning',
      subject: 'net.ipv4.ip_forward',
      text: '0: this namespace routes nothing, pods behind it reach nothing outside',
    });
  }
  const filter = contents('/proc/sys/net/ipv4/conf/all/rp_filter')?.trim() ?? '?';
  findings.push({
    level: 'note',
    subject: 'net.ipv4.conf.all.rp_filter',
    text: `${filter}: any value will do; what leaves the proxy enters the node at its pod's own interface`,
  });
  return findings;
}

function glibcVersion(): string {
  const { header } = process.report.getReport() as { header: { glibcVersionRuntime?: string } };
  return header.glibcVersionRuntime ?? 'not found';
}

function attempt(subject: string, look: () => Finding[]): Finding[] {
  try {
    return look();
  } catch (error) {
    return [{ level: 'fails', subject, text: error instanceof Error ? error.message : String(error) }];
  }
}

function contents(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
}

function device(path: string): number | undefined {
  try {
    return statSync(path).dev;
  } catch {
    return undefined;
  }
}

function page({ kernel, findings }: Diagnosis, terminal: Terminal): string {
  const table = formatTable(
    ['FEATURE', 'SINCE', 'HERE', 'GIVES'],
    VARIANTS.map(({ feature, since, gives, without }) => [
      feature,
      since,
      kernel.features[feature] === true ? terminal.green('yes') : terminal.yellow('no'),
      kernel.features[feature] === true ? gives : `(${gives}) instead: ${without}`,
    ]),
  );
  const colour = { ok: terminal.green, note: (text: string) => text, warning: terminal.yellow, fails: terminal.red };
  const lines = findings.map(
    ({ level, subject, text }) => `${colour[level](level.padEnd(8))}${printable(subject)}: ${printable(text)}\n`,
  );
  return `Kernel ${kernel.release} (${kernel.architecture})\n\n${table}\n${lines.join('')}`;
}
