// SPDX-License-Identifier: Apache-2.0
// Every setting of `agent`: flag, environment variable, default. Names are Istio's where Istio has one.

import { type Command, InvalidArgumentError, Option } from 'commander';
import { DEFAULT_RUN_DIR, DEFAULT_STATE_DIR } from '../redirect/config.ts';

export const AGENT_LOG_LEVELS = ['error', 'warn', 'info', 'debug', 'trace'] as const;
export type AgentLogLevel = (typeof AGENT_LOG_LEVELS)[number];

export interface AgentSettings {
  stateDir: string;
  runDir: string;
  /** conflist, or our entry alone: settings of pods that the agent enrols by itself */
  conf?: string;
  /** YAML, see workloads.ts */
  workloads?: string;
  zdsSocket: string;
  /** '': every address of the node */
  address: string;
  /** 0: none */
  monitoringPort: number;
  healthPort: number;
  logLevel: AgentLogLevel;
  nodeName: string;
  /** '': where a pod finds it, or none */
  kubeApi: string;
  kubeCaFile: string;
  kubeTokenFile: string;
  /** how often state, kernel and ztunnel are compared */
  reconcileSeconds: number;
  /** how long an attach waits for a ztunnel to connect */
  ztunnelWaitSeconds: number;
}

interface SettingShape {
  flags: string;
  env: string;
  description: string;
  default?: string | number;
  parse?: (text: string) => unknown;
  choices?: readonly string[];
}

/** One row a setting; README and `agent --help` are made from it or tested against it. */
export const AGENT_SETTINGS: readonly SettingShape[] = [
  {
    flags: '--state-dir <directory>',
    env: 'AMBIENT_REDIRECT_STATE_DIR',
    description: 'pinned state, as in the conflist entry',
    default: DEFAULT_STATE_DIR,
  },
  {
    flags: '--run-dir <directory>',
    env: 'CNI_AGENT_RUN_DIR',
    description: 'locks and agent.sock, as in the conflist entry',
    default: DEFAULT_RUN_DIR,
  },
  {
    flags: '--conf <file>',
    env: 'AMBIENT_REDIRECT_CONF',
    description: 'conflist with our entry, or the entry alone: settings of pods that the agent enrols by itself',
  },
  {
    flags: '--workloads <file>',
    env: 'AMBIENT_REDIRECT_WORKLOADS',
    description: 'YAML list of pods with their service accounts, for nodes without Kubernetes',
  },
  {
    flags: '--zds-socket <path>',
    env: 'ZTUNNEL_UDS_ADDRESS',
    description: 'socket that ztunnel connects to',
    default: '/var/run/ztunnel/ztunnel.sock',
  },
  {
    flags: '--address <ip>',
    env: 'AMBIENT_REDIRECT_ADDRESS',
    description: 'address of the two ports below; empty: every address',
    default: '',
  },
  {
    flags: '--monitoring-port <port>',
    env: 'MONITORING_PORT',
    description: 'port of /metrics; 0: none',
    default: 15014,
    parse: port,
  },
  {
    flags: '--health-port <port>',
    env: 'HEALTH_PORT',
    description: 'port of /healthz and /readyz; 0: none',
    default: 8000,
    parse: port,
  },
  {
    flags: '--log-level <level>',
    env: 'LOG_LEVEL',
    description: 'of the JSON lines on stderr; can be changed later through agent.sock',
    default: 'info',
    choices: AGENT_LOG_LEVELS,
  },
  {
    flags: '--node-name <name>',
    env: 'NODE_NAME',
    description: "the node's name in Kubernetes, and in every log line",
    default: '',
  },
  {
    flags: '--kube-api <url>',
    env: 'AMBIENT_REDIRECT_KUBE_API',
    description: 'the Kubernetes API server; empty: as pods reach it (KUBERNETES_SERVICE_HOST), else none',
    default: '',
  },
  {
    flags: '--kube-ca-file <file>',
    env: 'KUBE_CA_FILE',
    description: "PEM of the API server's CA; empty: the service account's, or the system's with --kube-api",
    default: '',
  },
  {
    flags: '--kube-token-file <file>',
    env: 'AMBIENT_REDIRECT_KUBE_TOKEN_FILE',
    description: "bearer token, read for each request; empty: the service account's",
    default: '',
  },
  {
    flags: '--reconcile-seconds <seconds>',
    env: 'AMBIENT_REDIRECT_RECONCILE_SECONDS',
    description: 'how often state, kernel and ztunnel are compared',
    default: 30,
    parse: seconds,
  },
  {
    flags: '--ztunnel-wait-seconds <seconds>',
    env: 'AMBIENT_REDIRECT_ZTUNNEL_WAIT_SECONDS',
    description: 'how long a pod waits for a ztunnel to connect before it is refused',
    default: 2,
    parse: seconds,
  },
];

/** Adds the options; commander puts flag before environment before default. */
export function addAgentOptions(command: Command): Command {
  for (const { flags, env, description, default: preset, parse, choices } of AGENT_SETTINGS) {
    const option = new Option(flags, description).env(env);
    if (preset !== undefined) option.default(preset, preset === '' ? 'empty' : undefined);
    if (choices !== undefined) option.choices([...choices]);
    else if (parse !== undefined) option.argParser(parse);
    command.addOption(option);
  }
  return command;
}

function port(text: string): number {
  const value = Number(text);
  if (!/^[0-9]{1,5}$/.test(text) || value > 65_535) throw new InvalidArgumentError('It must be a port, or 0.');
  return value;
}

function seconds(text: string): number {
  const value = Number(text);
  if (!/^[0-9]+(\.[0-9]+)?$/.test(text) || value > 86_400) throw new InvalidArgumentError('It must be 0 to 86400.');
  return value;
}
