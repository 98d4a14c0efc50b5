// SPDX-License-Identifier: Apache-2.0
// /etc/ambient-config/config.json, by which Istio 1.20's own plugin and its tools learn how the node redirects, and the
// line that says so once the proxy is there. Only where redirectMode is set.

import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { listenerState } from '../cli/survey.ts';
import { inOwnNetns } from '../datapath.ts';
import { isUninstalled } from '../install/entry.ts';
import { replaceFile } from '../install/files.ts';
import type { Native } from '../native.ts';
import { openState } from '../state.ts';
import type { AgentLog } from './log.ts';
import type { AgentSettings } from './settings.ts';

/** Every tag of Istio writes and compares "ebpf"; its documentation shows the line with "eBPF". */
const IN_FILE = 'ebpf';
const IN_LINE = 'eBPF';

export class AmbientConfig {
  readonly #path: string;
  readonly #say: (line: string) => void;
  #ready: boolean | undefined;
  #said = false;

  /** `say` gets the line once, at the first time that the proxy is ready. */
  constructor(directory: string, say: (line: string) => void) {
    this.#path = join(directory, 'config.json');
    this.#say = say;
  }

  /** Writes if the file does not say so already. Throws what the file system throws; the next call tries again. */
  write(ztunnelReady: boolean): void {
    if (this.#ready !== ztunnelReady) {
      const text = `${JSON.stringify({ ztunnelReady, redirectMode: IN_FILE })}`;
      if (this.#contents() !== text) {
        mkdirSync(join(this.#path, '..'), { recursive: true, mode: 0o755 });
        const owner = { uid: process.getuid?.() ?? 0, gid: process.getgid?.() ?? 0 };
        replaceFile(this.#path, Buffer.from(text), { ...owner, mode: 0o644 });
      }
      this.#ready = ztunnelReady;
    }
    if (!ztunnelReady || this.#said) return;
    this.#said = true;
    this.#say(`ambient Writing ambient config: ${JSON.stringify({ ztunnelReady, redirectMode: IN_LINE })}`);
  }

  /** When the node is left: it would go on telling of a proxy that nothing is redirected to. */
  remove(): void {
    rmSync(this.#path, { force: true });
    this.#ready = undefined;
  }

  #contents(): string | undefined {
    try {
      return readFileSync(this.#path, 'utf8');
    } catch {
      return undefined;
    }
  }
}

/** How soon the proxy's readiness is in the file. */
const PERIOD_MS = 1_000;

/** Keeps the file while the agent runs, if redirectMode is set. Returns what ends it. */
export function addAmbientConfig({ native, settings, log, zds }: AmbientAgent): () => void {
  const { redirectMode, ambientConfigDir, stateDir, runDir } = settings;
  if (redirectMode === undefined || ambientConfigDir === undefined) return () => {};
  const config = new AmbientConfig(ambientConfigDir, (line) => log.info(line));
  let failure = '';
  const look = () => {
    try {
      if (isUninstalled(runDir)) config.remove();
      else config.write(zds()?.isLive === true || isProxyListening(native, stateDir));
      failure = '';
    } catch (error) {
      const { message } = error as Error;
      if (message !== failure) log.error({ error: message }, 'config.json cannot be written');
      failure = message;
    }
  };
  look();
  const timer = setInterval(look, PERIOD_MS);
  return () => clearInterval(timer);
}

interface AmbientAgent {
  native: Native;
  settings: Pick<AgentSettings, 'redirectMode' | 'ambientConfigDir' | 'stateDir' | 'runDir'>;
  log: Pick<AgentLog, 'info' | 'error'>;
  zds: () => { isLive: boolean } | undefined;
}

/** Shared contract: the newest proxy has its outbound listener, in one family at least. */
function isProxyListening(native: Native, stateDir: string): boolean {
  const state = openState(native, stateDir);
  if (state === null) return false;
  try {
    const [proxy] = native.getProxies(state).proxies;
    const record = proxy === undefined ? null : native.getAttachment(state, proxy.key);
    if (proxy === undefined || record === null) return false;
    let listening = false;
    inOwnNetns(native, record, (netns) => {
      const listeners = native.listeners(netns);
      listening = ([4, 6] as const).some(
        (family) => listenerState(listeners, family, proxy.ports.outbound) === 'listening',
      );
    });
    return listening;
  } finally {
    native.closeState(state);
  }
}
