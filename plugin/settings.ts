// SPDX-License-Identifier: Apache-2.0
// The settings of `install`, `uninstall` and the agent: one table of flag, environment variable, default and meaning,
// which the commands, their --help, the README and the tests read. A flag is stronger than the environment, and that
// than the default. Variables have Istio's names where Istio has the setting.

import { readFileSync } from 'node:fs';
import { InvalidArgumentError, Option } from 'commander';
import { parse, YAMLError } from 'yaml';
import { findEntry } from './cli/directories.ts';
import { CniError } from './cni/errors.ts';
import { type Fields, foldedField } from './install/json-text.ts';
import { DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, parseConfig } from './redirect/config.ts';
import { type EnablementSelector, parseSelectors } from './redirect/selectors.ts';

export interface Setting<T> {
  /** as commander takes it: "--cni-net-dir <directory>"; its long name in camel case is the key in the table */
  flag: string;
  /** the first that is set and not empty counts */
  environment: readonly string[];
  /** as one would write it; undefined: there is none, and the value is undefined */
  fallback: string | undefined;
  meaning: string;
  /** Throws InvalidArgumentError. */
  parse(text: string): T;
}

export type SettingTable = Readonly<Record<string, Setting<unknown>>>;

/** What a table's settings are, read. */
export type Values<T extends SettingTable> = { -readonly [K in keyof T]: ReturnType<T[K]['parse']> };

function setting<T>(
  flag: string,
  environment: readonly string[],
  fallback: string,
  meaning: string,
  parse: (text: string) => T,
): Setting<T> {
  return { flag, environment, fallback, meaning, parse };
}

/** Without a default. */
function optional<T>(
  flag: string,
  environment: readonly string[],
  meaning: string,
  parse: (text: string) => T,
): Setting<T | undefined> {
  return { flag, environment, fallback: undefined, meaning, parse };
}

/** Where the node's files are. */
export const DIRECTORY_SETTINGS = {
  stateDir: setting(
    '--state-dir <directory>',
    ['AMBIENT_REDIRECT_STATE_DIR'],
    DEFAULT_STATE_DIR,
    'pinned state',
    directory,
  ),
  runDir: setting('--run-dir <directory>', ['CNI_AGENT_RUN_DIR'], DEFAULT_RUN_DIR, 'locks, agent.sock', directory),
  cniNetDir: setting(
    '--cni-net-dir <directory>',
    ['MOUNTED_CNI_NET_DIR', 'CNI_NET_DIR'],
    '/etc/cni/net.d',
    "the runtime's network configurations, as this process sees the directory",
    directory,
  ),
  cniBinDir: setting(
    '--cni-bin-dir <directory>',
    ['MOUNTED_CNI_BIN_DIR', 'CNI_BIN_DIR'],
    '/opt/cni/bin',
    "the runtime's plugins, as this process sees the directory",
    directory,
  ),
} as const satisfies SettingTable;

/** What the conflist entry says; the same keys as in the conflist. What is not given is as in `conf`. */
export const ENTRY_SETTINGS = {
  conf: optional(
    '--conf <file>',
    ['AMBIENT_REDIRECT_CONF'],
    'settings of the entry: a file with the entry, or a conflist with it; flags and variables go over it',
    String,
  ),
  enrollment: optional(
    '--enrollment <who>',
    ['AMBIENT_REDIRECT_ENROLLMENT'],
    'who decides that a pod is in the mesh: annotation, all or agent',
    String,
  ),
  contract: optional(
    '--contract <contract>',
    ['AMBIENT_REDIRECT_CONTRACT'],
    'where the proxy listens: shared or in-pod',
    String,
  ),
  proxyNamespace: optional(
    '--proxy-namespace <name>',
    ['SYSTEM_NAMESPACE'],
    'namespace of the proxy, the trust boundary',
    String,
  ),
  proxyName: optional(
    '--proxy-name <pattern>',
    ['AMBIENT_REDIRECT_PROXY_NAME'],
    "name of the proxy's pods, * for any characters",
    String,
  ),
  proxyServiceAccount: optional(
    '--proxy-service-account <pattern>',
    ['AMBIENT_REDIRECT_PROXY_SERVICE_ACCOUNT'],
    "service account of the proxy's pods, as far as it is known",
    String,
  ),
  failurePolicy: optional(
    '--failure-policy <policy>',
    ['AMBIENT_REDIRECT_FAILURE_POLICY'],
    'new connections while no proxy listens: closed or open',
    String,
  ),
  closedAction: optional(
    '--closed-action <action>',
    ['AMBIENT_REDIRECT_CLOSED_ACTION'],
    'what closed does to a SYN: drop or reset',
    String,
  ),
  podOverrides: optional(
    '--pod-overrides <which>',
    ['AMBIENT_REDIRECT_POD_OVERRIDES'],
    "which of a pod's own annotations count: all, enroll, exclusions or none",
    String,
  ),
  dnsCapture: optional('--dns-capture [boolean]', ['AMBIENT_DNS_CAPTURE'], "pods' DNS goes to the proxy", boolean),
  excludeNamespaces: optional(
    '--exclude-namespaces <list>',
    ['EXCLUDE_NAMESPACES'],
    'namespaces whose pods are never enrolled, separated by commas',
    list,
  ),
  hook: optional('--hook <hook>', ['AMBIENT_REDIRECT_HOOK'], 'auto, tcx or clsact', String),
  order: optional(
    '--order <order>',
    ['AMBIENT_REDIRECT_ORDER'],
    'place among other TCX programs: first or last',
    String,
  ),
  maxPods: optional('--max-pods <number>', ['AMBIENT_REDIRECT_MAX_PODS'], 'size of the maps', number),
  logLevel: optional('--log-level <level>', ['LOG_LEVEL'], 'of the plugin: error, warn, info or debug', String),
} as const satisfies SettingTable;

/** How the entry gets into the conflist, and stays there. */
export const CONFLIST_SETTINGS = {
  cniConfName: optional(
    '--cni-conf-name <file>',
    ['CNI_CONF_NAME'],
    'the conflist to be in; without it the first valid one by name',
    fileName,
  ),
  chained: setting(
    '--chained [boolean]',
    ['CHAINED_CNI_PLUGIN'],
    'true',
    'an entry of a conflist; a network of its own (false) cannot be: the plugin needs an interface that another made',
    boolean,
  ),
  ownedConflist: setting(
    '--owned-conflist [boolean]',
    ['ISTIO_OWNED_CNI_CONFIG'],
    'false',
    'leave the conflist as it is, and write one of our own that is read before it',
    boolean,
  ),
  ownedConflistName: setting(
    '--owned-conflist-name <file>',
    ['ISTIO_OWNED_CNI_CONFIG_FILENAME', 'ISTIO_OWNED_CNI_CONF_FILENAME'],
    '02-ambient-redirect.conflist',
    'what that one is called',
    fileName,
  ),
  cniVersion: optional(
    '--cni-version <version>',
    ['AMBIENT_REDIRECT_CNI_VERSION'],
    'of the conflist; without it what it says is kept if it can be, else 1.0.0',
    String,
  ),
  replaceIstioCni: setting(
    '--replace-istio-cni [boolean]',
    ['AMBIENT_REDIRECT_REPLACE_ISTIO_CNI'],
    'false',
    'take the entry of an istio-cni in ambient mode out; uninstall puts it back',
    boolean,
  ),
  confGroupRead: setting(
    '--conf-group-read [boolean]',
    ['CNI_CONF_GROUP_READ'],
    'false',
    'the group may read a file that is made new; one that was there keeps its mode',
    boolean,
  ),
} as const satisfies SettingTable;

/** Of the command alone. */
export const INSTALL_SETTINGS = {
  ...DIRECTORY_SETTINGS,
  ...ENTRY_SETTINGS,
  ...CONFLIST_SETTINGS,
  wait: setting(
    '--wait <seconds>',
    ['AMBIENT_REDIRECT_WAIT'],
    'forever',
    'for a conflist of the primary plugin to appear; a number of seconds, or forever',
    seconds,
  ),
} as const satisfies SettingTable;

/** Which node this is, and how to reach the API server. */
export const KUBERNETES_SETTINGS = {
  nodeName: setting(
    '--node-name <name>',
    ['NODE_NAME'],
    '',
    "the node's name in Kubernetes, in every line of the log",
    String,
  ),
  kubeApi: optional(
    '--kube-api <url>',
    ['AMBIENT_REDIRECT_KUBE_API'],
    'the Kubernetes API server; without it as pods reach it (KUBERNETES_SERVICE_HOST), else there is none',
    String,
  ),
  kubeCaFile: optional(
    '--kube-ca-file <file>',
    ['KUBE_CA_FILE'],
    "PEM of its CA; without it the service account's, with --kube-api the system's",
    String,
  ),
  kubeTokenFile: optional(
    '--kube-token-file <file>',
    ['AMBIENT_REDIRECT_KUBE_TOKEN_FILE'],
    "bearer token, read for each request; without it the service account's, with --kube-api none",
    String,
  ),
} as const satisfies SettingTable;

export const UNINSTALL_SETTINGS = {
  ...DIRECTORY_SETTINGS,
  ...KUBERNETES_SETTINGS,
  drainTimeout: setting(
    '--drain-timeout <seconds>',
    ['AMBIENT_REDIRECT_DRAIN_TIMEOUT'],
    '30',
    'how long connections through the proxy may go on before they are cut; a number of seconds, or forever',
    seconds,
  ),
  executableDelay: setting(
    '--executable-delay <seconds>',
    ['AMBIENT_REDIRECT_EXECUTABLE_DELAY'],
    '5',
    'how long the executable stays after the entry went, for calls that a runtime has begun',
    seconds,
  ),
  cniCacheDir: setting(
    '--cni-cache-dir <directory>',
    ['AMBIENT_REDIRECT_CNI_CACHE_DIR'],
    '/var/lib/cni',
    "libcni's cache: CRI-O's DEL calls what is written there",
    directory,
  ),
  stay: setting(
    '--stay [boolean]',
    ['AMBIENT_REDIRECT_STAY'],
    'false',
    'go on until SIGTERM, and do it again whenever install is run',
    boolean,
  ),
} as const satisfies SettingTable;

/** Of `wait-uninstalled`, the last step of `helm uninstall`. */
export const WAIT_UNINSTALLED_SETTINGS = {
  kubeApi: KUBERNETES_SETTINGS.kubeApi,
  kubeCaFile: KUBERNETES_SETTINGS.kubeCaFile,
  kubeTokenFile: KUBERNETES_SETTINGS.kubeTokenFile,
  daemonSet: setting(
    '--daemon-set <namespace/name>',
    ['AMBIENT_REDIRECT_UNINSTALL_DAEMON_SET'],
    '',
    'its pods run uninstall as an init container, and then stay: a pod that is ready has left its node',
    String,
  ),
  agents: setting(
    '--agents <namespace/name>',
    ['AMBIENT_REDIRECT_AGENT_DAEMON_SET'],
    '',
    'the DaemonSet of the agents, which is deleted when every node is left, so that no new node gets one',
    String,
  ),
  timeout: setting(
    '--timeout <seconds>',
    ['AMBIENT_REDIRECT_UNINSTALL_TIMEOUT'],
    '240',
    'after which it fails and nothing is deleted; a number of seconds, or forever',
    seconds,
  ),
} as const satisfies SettingTable;

/** Of the agent's files and decisions; its other settings are in plugin/agent/. */
export const MESH_SETTINGS = {
  enablementSelectors: optional(
    '--enablement-selectors <yaml>',
    ['AMBIENT_ENABLEMENT_SELECTOR'],
    "labels of pods and namespaces that are in the mesh, as in Istio's chart; without it those with istio.io/dataplane-mode",
    selectors,
  ),
  redirectMode: optional(
    '--redirect-mode <mode>',
    ['REDIRECT_MODE'],
    'what config.json tells Istio 1.20: ebpf; without it no such file is written',
    redirectMode,
  ),
  ambientConfigDir: setting(
    '--ambient-config-dir <directory>',
    ['AMBIENT_CONFIG_DIR'],
    '/etc/ambient-config',
    'where config.json is written',
    directory,
  ),
} as const satisfies SettingTable;

/** An option for each setting, with everything that --help is to say. */
export function settingOptions(table: SettingTable): Option[] {
  return Object.values(table).map(({ flag, environment, fallback, meaning, parse }) => {
    const said = [`$${environment.join(', $')}`, ...(fallback ? [`default: ${fallback}`] : [])];
    return new Option(flag, `${meaning} (${said.join('; ')})`).argParser((text) => {
      parse(text);
      return text;
    });
  });
}

/** `options` as commander gives them: text, or true for a flag without one. Throws an error that names the variable. */
export function readSettings<T extends SettingTable>(
  table: T,
  options: Readonly<Record<string, unknown>>,
  environment: NodeJS.ProcessEnv = process.env,
): Values<T> {
  const entries = Object.entries(table).map(([name, { environment: variables, fallback, parse }]) => {
    const option = options[name];
    if (option !== undefined) return [name, parse(String(option))];
    const variable = variables.find((candidate) => (environment[candidate] ?? '') !== '');
    if (variable !== undefined) return [name, parseVariable(variable, environment[variable] ?? '', parse)];
    return [name, fallback === undefined ? undefined : parse(fallback)];
  });
  return Object.fromEntries(entries) as Values<T>;
}

function parseVariable<T>(variable: string, text: string, parse: (text: string) => T): T {
  try {
    return parse(text);
  } catch (error) {
    if (!(error instanceof InvalidArgumentError)) throw error;
    throw new Error(`${variable}=${text}: ${error.message}`, { cause: error });
  }
}

/** Keys that are the list's, or that a runtime puts there. */
const NOT_THE_ENTRYS = ['name', 'cniVersion', 'prevResult', 'runtimeConfig'];

/** Without these annotations and limits never come. */
const CAPABILITIES = { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true };

/** The entry that the settings describe. Throws CniError 2, 6 or 7, or what reading the file throws. */
export function entryOf(
  values: Values<typeof ENTRY_SETTINGS>,
  directories: { stateDir: string; runDir: string },
): Fields {
  const file = values.conf === undefined ? {} : findEntry(readFileSync(values.conf), values.conf).entry;
  const entry: Record<string, unknown> = { type: 'ambient-redirect', ...file };
  for (const key of NOT_THE_ENTRYS) delete entry[key];
  const { enrollment, failurePolicy, closedAction, podOverrides, dnsCapture, excludeNamespaces } = values;
  const { hook, order, maxPods, logLevel } = values;
  const said = {
    ...{ enrollment, failurePolicy, closedAction, podOverrides, dnsCapture, excludeNamespaces },
    ...{ hook, order, maxPods, logLevel },
  };
  for (const [key, value] of Object.entries(said)) if (value !== undefined) entry[key] = value;
  const proxy = section(entry.proxy);
  const match = section(proxy.match);
  if (values.contract !== undefined) proxy.contract = values.contract;
  if (values.proxyNamespace !== undefined) match.namespace = values.proxyNamespace;
  if (values.proxyName !== undefined) match.name = values.proxyName;
  if (values.proxyServiceAccount !== undefined) match.serviceAccount = values.proxyServiceAccount;
  if (Object.keys(match).length > 0) proxy.match = match;
  if (Object.keys(proxy).length > 0) entry.proxy = proxy;
  // Named where they are not the defaults, so that the plugin looks where install and agent do.
  if (directories.stateDir !== DEFAULT_STATE_DIR) entry.stateDir = directories.stateDir;
  if (directories.runDir !== DEFAULT_RUN_DIR) entry.runDir = directories.runDir;
  if (foldedField(entry, 'capabilities') === undefined) entry.capabilities = CAPABILITIES;
  parseConfig(entry);
  return entry;
}

function section(value: unknown): Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? { ...value } : {};
}

function directory(text: string): string {
  if (!text.startsWith('/')) throw new InvalidArgumentError('It must be an absolute path.');
  return text.replace(/(?<=.)\/+$/, '');
}

function fileName(text: string): string {
  if (!/^[^./][^/]*\.(conf|conflist)$/.test(text)) {
    throw new InvalidArgumentError('It must be a file name ending in .conf or .conflist.');
  }
  return text;
}

/** The words that Go's strconv.ParseBool takes, as Istio reads these variables. */
function boolean(text: string): boolean {
  if (/^(1|t|true)$/i.test(text)) return true;
  if (/^(0|f|false)$/i.test(text)) return false;
  throw new InvalidArgumentError('It must be true or false.');
}

function list(text: string): string[] {
  return text
    .split(',')
    .map((part) => part.trim())
    .filter((part) => part !== '');
}

function number(text: string): number {
  if (!/^[0-9]{1,9}$/.test(text)) throw new InvalidArgumentError('It must be a number.');
  return Number(text);
}

/** Infinity: for ever. */
function seconds(text: string): number {
  if (text === 'forever') return Number.POSITIVE_INFINITY;
  if (!/^[0-9]{1,7}(\.[0-9]{1,3})?$/.test(text)) {
    throw new InvalidArgumentError('It must be a number of seconds, or "forever".');
  }
  return Number(text);
}

function selectors(text: string): readonly EnablementSelector[] {
  try {
    return parseSelectors(parse(text));
  } catch (error) {
    if (!(error instanceof CniError || error instanceof YAMLError)) throw error;
    throw new InvalidArgumentError(error.message);
  }
}

/** Istio's charts have it in either case. */
function redirectMode(text: string): 'ebpf' {
  if (text.toLowerCase() !== 'ebpf') throw new InvalidArgumentError('It must be ebpf.');
  return 'ebpf';
}
