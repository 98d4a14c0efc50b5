// SPDX-License-Identifier: Apache-2.0
// `doctor`: what of this machine the plugin needs, what is there, and what would not work and why. Changes nothing,
// and goes on past everything that cannot be looked at.

import { readFileSync, statSync } from 'node:fs';
import { arch, release } from 'node:os';
import { dirname, join } from 'node:path';
import { CniError } from '../cni/errors.ts';
import { SUPPORTED_VERSIONS } from '../cni/version.ts';
import { describePod } from '../datapath.ts';
import { othersAt } from '../foreign.ts';
import { isAmbientIstio, isRightPlace, type ListedPlugin, type NetworkFile, PLUGIN_TYPE } from '../install/conflist.ts';
import { type FoundFile, readNetworkDirectory } from '../install/network-directory.ts';
import type { AttachmentRecord, Native } from '../native.ts';
import { ANNOTATIONS_CAPABILITY } from '../redirect/annotations.ts';
import { declaresCapability, parseConfig, type RedirectConfig } from '../redirect/config.ts';
import { decideEnrolment } from '../redirect/enrolment.ts';
import { type Directories, hasCode } from '../state.ts';
import { primaries } from './primaries.ts';
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
  const features = knownFeatures(native);
  const findings: Finding[] = [
    ...VARIANTS.filter(({ feature, required }) => required && features[feature] === false).map(
      ({ feature, since }): Finding => ({
        level: 'fails',
        subject: 'kernel',
        text: `no ${feature} (needs ${since}), and this version has nothing in its place`,
      }),
    ),
    ...capabilities(native.capabilities()),
    ...lockdown(),
    ...bpffs(native, directories),
    ...attempt('state', () => state(native, directories, entryIn(confDir))),
    ...conflists(confDir),
    ...attempt('primary plugin', () => primaries(native, filesOf(confDir), entryIn(confDir)?.proxy.contract)),
    ...sysctls(),
    {
      level: 'note',
      subject: 'C library',
      text: `glibc ${glibcVersion()}; the executable needs 2.28 or later, not musl`,
    },
  ];
  return { kernel: { release: release(), architecture: arch(), features }, findings };
}

/** Without the right to load programs nothing can be tried: {}. The missing capability is a finding of its own. */
function knownFeatures(native: Native): Record<string, boolean> {
  try {
    return native.features();
  } catch (error) {
    if (hasCode(error, 'EPERM')) return {};
    throw error;
  }
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

function state(native: Native, directories: Directories, config: RedirectConfig | undefined): Finding[] {
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
    ...(config === undefined ? [] : otherwiseDecided(found.attachments, config)),
    ...foreignPrograms(native, found),
    ...changedMac(native, found),
  ];
}

/** Others' programs and filters on the interfaces that ours are on, inside pods too. */
function foreignPrograms(native: Native, found: Survey): Finding[] {
  return found.attachments
    .filter(({ record, present }) => present && record.hooks.length > 0)
    .flatMap(({ record }) =>
      othersAt(native, record).map(({ direction, where, what, ahead }) =>
        foreign(`${direction} of ${printable(where)}`, printable(what), ahead),
      ),
    );
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

/** What the entry of the first list that has one says; undefined: none that the plugin would take. */
function entryIn(directory: string): RedirectConfig | undefined {
  try {
    const plugins = readNetworkDirectory(directory).flatMap(({ file }) => file?.plugins ?? []);
    const entry = plugins.find(({ type }) => type === PLUGIN_TYPE);
    return entry === undefined ? undefined : parseConfig(entry.fields);
  } catch {
    // Named among the findings about the directory.
    return undefined;
  }
}

/**
 * Attachments that the entry would decide otherwise by what is known of any pod, its name: the entry was changed since
 * their ADD, or they were made by hand.
 */
export function otherwiseDecided(
  attachments: readonly {
    record: Pick<AttachmentRecord, 'role' | 'podName' | 'podNamespace' | 'containerId' | 'ifname'>;
  }[],
  config: RedirectConfig,
): Finding[] {
  return attachments.flatMap(({ record }): Finding[] => {
    if (record.role === 'none' || record.podName === '') return [];
    const { role, reason } = decideEnrolment(
      { ...config, enrollment: 'all' },
      {
        pod: { name: record.podName, namespace: record.podNamespace, uid: '' },
        ifname: 'eth0',
        annotations: null,
        annotationsDeclared: true,
      },
    );
    if (role === record.role) return [];
    const is = record.role === 'proxy' ? 'is a proxy' : 'is enrolled';
    const would = {
      proxy: 'the entry makes it the proxy',
      pod: 'by the entry it would be an ordinary pod',
      none: `by the entry it would not be: ${reason}`,
      undecided: reason,
    }[role];
    return [{ level: 'note', subject: describePod(record), text: `${is}; ${would}` }];
  });
}

/** []: the directory cannot be read, which is among the findings about it. */
function filesOf(directory: string): FoundFile[] {
  try {
    return readNetworkDirectory(directory);
  } catch {
    return [];
  }
}

/** The files as a runtime reads them: by name, and containerd takes the first only. */
export function conflists(directory: string): Finding[] {
  let found: FoundFile[];
  try {
    found = readNetworkDirectory(directory);
  } catch (error) {
    const text = `${directory} cannot be read: ${(error as NodeJS.ErrnoException).code}`;
    return [{ level: 'note', subject: 'conflist', text }];
  }
  const ours = found.filter(({ file }) => file?.plugins.some(({ type }) => type === PLUGIN_TYPE));
  const [read] = found;
  const findings = ours.flatMap((each) => conflist(directory, each, each === read));
  if (read !== undefined && read.file === undefined) {
    const text = `${read.reason}; containerd starts no pod while this is its first file`;
    findings.unshift({ level: 'warning', subject: join(directory, read.name), text });
  }
  if (ours.length > 0) return findings;
  const text = `no file of ${directory} has an entry of type "${PLUGIN_TYPE}"`;
  return [...findings, { level: 'note', subject: 'conflist', text }];
}

function conflist(directory: string, { name, file }: FoundFile, isRead: boolean): Finding[] {
  if (file === undefined) return [];
  const findings: Finding[] = [];
  const say = (level: Finding['level'], text: string) => {
    findings.push({ level, subject: join(directory, name), text });
  };
  const { plugins, kind } = file;
  const types = plugins.map(({ type }) => type);
  const at = types.indexOf(PLUGIN_TYPE);
  if (!isRead) say('warning', 'a file that sorts before it is read instead, by runtimes that take one');
  if (kind === 'single' || at === 0) {
    say('fails', 'our entry is the first of the chain; it needs the interface that another plugin made');
  } else if (!isRightPlace(plugins, at)) {
    const later = types.slice(at + 1).join(', ');
    say('fails', `our entry is before ${later}: what they change of the interface is not what we attached to`);
  }
  const count = types.filter((type) => type === PLUGIN_TYPE).length;
  if (count > 1) say('fails', `our entry is there ${count} times`);
  for (const text of entryFaults(plugins[at] as ListedPlugin)) say('fails', text);
  if (types.indexOf('bandwidth', at) > at && !declares(plugins[at] as ListedPlugin, 'bandwidth')) {
    say(
      'warning',
      'bandwidth follows, and our entry does not declare the capability "bandwidth": its queue would be skipped',
    );
  }
  for (const plugin of plugins) {
    const { type } = plugin;
    if (isAmbientIstio(plugin))
      say('fails', 'istio-cni is in the same chain with ambient mode on: both redirect the same pods');
    else if (type === 'istio-cni') say('note', 'istio-cni is in the same chain, for sidecars');
    else if (RIVALS.includes(type)) say('warning', `${type} is in the same chain; it may redirect the same pods`);
  }
  versionFindings(file, say);
  if (findings.every(({ level }) => level === 'note')) {
    findings.unshift({
      level: 'ok',
      subject: join(directory, name),
      text: `chain: ${types.map(printable).join(', ')}`,
    });
  }
  return findings;
}

const RIVALS = ['kmesh-cni', 'merbridge-cni', 'linkerd-cni'];

function declares({ fields }: ListedPlugin, capability: string): boolean {
  return declaresCapability({ raw: fields, runtimeConfig: {} }, capability);
}

function entryFaults(entry: ListedPlugin): string[] {
  try {
    const { enrollment } = parseConfig(entry.fields);
    if (enrollment !== 'annotation' || declares(entry, ANNOTATIONS_CAPABILITY)) return [];
    return [`enrollment is "annotation", and the capability ${ANNOTATIONS_CAPABILITY} is not declared`];
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return [error.message];
  }
}

function versionFindings(
  { cniVersion, json }: NetworkFile,
  say: (level: Finding['level'], text: string) => void,
): void {
  if (cniVersion === '1.1.0') {
    say('note', 'cniVersion 1.1.0: containerd before 1.7 fails every ADD with it; 1.0.0 works everywhere');
  } else if (
    json.fields.cniVersions === undefined &&
    !(SUPPORTED_VERSIONS as readonly unknown[]).includes(cniVersion)
  ) {
    say('fails', `cniVersion ${cniVersion ?? '0.1.0 (none is given)'}: ADD answers with code 1; install sets 1.0.0`);
  }
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
    VARIANTS.map(({ feature, since, gives, without }) => {
      const here = kernel.features[feature];
      if (here === undefined) return [feature, since, terminal.yellow('?'), gives];
      return here
        ? [feature, since, terminal.green('yes'), gives]
        : [feature, since, terminal.yellow('no'), `(${gives}) instead: ${without}`];
    }),
  );
  const colour = { ok: terminal.green, note: (text: string) => text, warning: terminal.yellow, fails: terminal.red };
  const lines = findings.map(
    ({ level, subject, text }) => `${colour[level](level.padEnd(8))}${printable(subject)}: ${printable(text)}\n`,
  );
  return `Kernel ${kernel.release} (${kernel.architecture})\n\n${table}\n${lines.join('')}`;
}
