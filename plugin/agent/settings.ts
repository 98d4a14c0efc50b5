// SPDX-License-Identifier: Apache-2.0
// Every setting of `agent`: flag, environment variable, default. Names are Istio's where Istio has one.

import { InvalidArgumentError } from 'commander';
import {
  DIRECTORY_SETTINGS,
  ENTRY_SETTINGS,
  KUBERNETES_SETTINGS,
  MESH_SETTINGS,
  type Setting,
  type SettingTable,
  type Values,
} from '../settings.ts';

export const AGENT_LOG_LEVELS = ['error', 'warn', 'info', 'debug', 'trace'] as const;
export type AgentLogLevel = (typeof AGENT_LOG_LEVELS)[number];

export const AGENT_SETTINGS = {
  stateDir: DIRECTORY_SETTINGS.stateDir,
  runDir: DIRECTORY_SETTINGS.runDir,
  conf: {
    ...ENTRY_SETTINGS.conf,
    meaning:
      'settings of pods that the agent enrols by itself: a file with the entry, or a conflist with it; without it as the last install was told',
  },
  workloads: row(
    '--workloads <file>',
    'AMBIENT_REDIRECT_WORKLOADS',
    undefined,
    'YAML list of pods with their service accounts, for nodes without Kubernetes',
    String,
  ) as Setting<string | undefined>,
  zdsSocket: row(
    '--zds-socket <path>',
    'ZTUNNEL_UDS_ADDRESS',
    '/var/run/ztunnel/ztunnel.sock',
    'where ztunnel connects; its own name for it is INPOD_UDS',
    socketPath,
  ),
  address: row(
    '--address <ip>',
    'AMBIENT_REDIRECT_ADDRESS',
    '',
    'of the two ports below; without it every address of the node',
    String,
  ),
  monitoringPort: row('--monitoring-port <port>', 'MONITORING_PORT', '15014', 'of /metrics; 0: none', port),
  healthPort: row(
    '--health-port <port>',
    'AMBIENT_REDIRECT_HEALTH_PORT',
    '8000',
    'of /healthz and /readyz; 0: none',
    port,
  ),
  logLevel: row(
    '--log-level <level>',
    'LOG_LEVEL',
    'info',
    'of the JSON lines on stderr: error, warn, info, debug or trace; agent.sock changes it later',
    logLevel,
  ),
  ...KUBERNETES_SETTINGS,
  criSocket: row(
    '--cri-socket <path>',
    'AMBIENT_REDIRECT_CRI_SOCKET',
    undefined,
    "the container runtime's, to find pods that the plugin has not seen; without it where containerd and CRI-O have it",
    String,
  ) as Setting<string | undefined>,
  ...MESH_SETTINGS,
  reconcileSeconds: row(
    '--reconcile-seconds <seconds>',
    'AMBIENT_REDIRECT_RECONCILE_SECONDS',
    '30',
    'how often state, kernel and ztunnel are compared',
    seconds,
  ),
  ztunnelWaitSeconds: row(
    '--ztunnel-wait-seconds <seconds>',
    'AMBIENT_REDIRECT_ZTUNNEL_WAIT_SECONDS',
    '2',
    'how long a pod waits for a ztunnel to connect before it is refused',
    seconds,
  ),
} as const satisfies SettingTable;

export type AgentSettings = Values<typeof AGENT_SETTINGS>;

function row<T>(
  flag: string,
  variable: string,
  fallback: string | undefined,
  meaning: string,
  parse: (text: string) => T,
): Setting<T> {
  return { flag, environment: [variable], fallback, meaning, parse };
}

/** sizeof(sun_path) - 1 */
const SOCKET_PATH_BYTES = 107;

function socketPath(text: string): string {
  if (!text.startsWith('/') || Buffer.byteLength(text) > SOCKET_PATH_BYTES) {
    throw new InvalidArgumentError(`It must be an absolute path of at most ${SOCKET_PATH_BYTES} bytes.`);
  }
  return text;
}

function logLevel(text: string): AgentLogLevel {
  const found = AGENT_LOG_LEVELS.find((level) => level === text);
  if (found === undefined) throw new InvalidArgumentError(`It must be one of ${AGENT_LOG_LEVELS.join(', ')}.`);
  return found;
}

function port(text: string): number {
  if (!/^[0-9]{1,5}$/.test(text) || Number(text) > 65_535) throw new InvalidArgumentError('It must be a port, or 0.');
  return Number(text);
}

function seconds(text: string): number {
  const value = Number(text);
  if (!/^[0-9]+(\.[0-9]+)?$/.test(text) || value > 86_400) throw new InvalidArgumentError('It must be 0 to 86400.');
  return value;
}
