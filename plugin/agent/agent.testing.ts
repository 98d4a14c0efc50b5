// SPDX-License-Identifier: Apache-2.0
// What the tests of the agent share: a state directory with records as the plugin writes them, and an agent on it.

import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Namespace, Testbed } from '../../conformance/netns.ts';
import { attachmentRecord, native, WANTED } from '../../native/native.testing.ts';
import { attachmentKey } from '../attachments.ts';
import { StandInZtunnel, type ZtunnelOptions } from '../demo/ztunnel.ts';
import type { AttachmentRecord } from '../native.ts';
import { openState } from '../state.ts';
import { Agent } from './agent.ts';
import { createAgentLog } from './log.ts';
import type { AgentSettings } from './settings.ts';
import { type AgentSocket, serveAgentSocket } from './socket.ts';

export class AgentSite {
  readonly settings: AgentSettings;
  readonly #bed: Testbed;
  readonly #closing: (() => void | Promise<void>)[] = [];

  constructor(bed: Testbed) {
    this.#bed = bed;
    const stateDir = join(bed.bpffs('bpf'), 'state');
    native.makeDirectory(stateDir, 0o700);
    native.createState(stateDir, { ...WANTED, maxPods: 2_048 });
    const base = bed.directory('agent');
    const runDir = join(base, 'run');
    mkdirSync(runDir, { mode: 0o700 });
    this.settings = {
      stateDir,
      runDir,
      conf: undefined,
      workloads: undefined,
      kubeApi: undefined,
      kubeCaFile: undefined,
      kubeTokenFile: undefined,
      criSocket: undefined,
      enablementSelectors: undefined,
      redirectMode: undefined,
      ambientConfigDir: '/nowhere',
      zdsSocket: join(base, 'zds', 'ztunnel.sock'),
      address: '127.0.0.1',
      monitoringPort: 0,
      healthPort: 0,
      logLevel: 'silent' as AgentSettings['logLevel'],
      nodeName: 'node',
      reconcileSeconds: 3_600,
      ztunnelWaitSeconds: 0,
    };
  }

  /** Writes the record of a pod that is attached in the contract in-pod. */
  record(namespace: Namespace, changes: Partial<AttachmentRecord> = {}): AttachmentRecord {
    const netns = native.openNetns(namespace.path);
    const identity = native.netnsIdentity(netns);
    native.close(netns);
    const record: AttachmentRecord = {
      ...attachmentRecord(),
      layout: native.layoutVersion,
      contract: 'in-pod',
      flags: 0,
      // No such link: what the kernel has of this attachment is not what these tests are about.
      hostIfindex: 999_999,
      hooks: [],
      addresses: [],
      podName: `pod-${identity.ino}`,
      podNamespace: 'default',
      podUid: `uid-${identity.ino}`,
      serviceAccount: 'sa',
      containerId: `c${identity.ino}`,
      netns: identity,
      netnsPath: namespace.path,
      ...changes,
    };
    this.put(record);
    return record;
  }

  put(record: AttachmentRecord): void {
    this.withState((state) => native.putAttachment(state, keyOf(record), record));
  }

  remove(record: AttachmentRecord): void {
    this.withState((state) => native.deleteAttachment(state, keyOf(record)));
  }

  read(record: AttachmentRecord): AttachmentRecord | null {
    return this.withState((state) => native.getAttachment(state, keyOf(record)));
  }

  withState<T>(body: (state: Parameters<typeof native.closeState>[0]) => T): T {
    const state = openState(native, this.settings.stateDir);
    if (state === null) throw new Error('the state is gone');
    try {
      return body(state);
    } finally {
      native.closeState(state);
    }
  }

  /** An agent that serves; `prepare` is called before it starts. */
  async agent(changes: Partial<AgentSettings> = {}, prepare: (agent: Agent) => void = () => {}): Promise<RunningAgent> {
    const settings = { ...this.settings, ...changes };
    const agent = new Agent(native, settings, createAgentLog(settings));
    prepare(agent);
    await agent.start();
    const running = new RunningAgent(agent, await serveAgentSocket(agent));
    this.#closing.push(() => running.stop());
    return running;
  }

  ztunnel(options: Partial<ZtunnelOptions> = {}): StandInZtunnel {
    const ztunnel = StandInZtunnel.start(native, { socket: this.settings.zdsSocket, xds: [], ...options });
    this.#closing.push(() => ztunnel.kill());
    return ztunnel;
  }

  async close(): Promise<void> {
    for (const step of this.#closing.splice(0).toReversed()) await step();
    this.#bed.close();
  }
}

export class RunningAgent {
  readonly agent: Agent;
  readonly #socket: AgentSocket;
  #stopped = false;

  constructor(agent: Agent, socket: AgentSocket) {
    this.agent = agent;
    this.#socket = socket;
  }

  async stop(): Promise<void> {
    if (this.#stopped) return;
    this.#stopped = true;
    await this.#socket.close();
    await this.agent.stop();
  }
}

export function keyOf({ network, containerId, ifname }: AttachmentRecord): Uint8Array {
  return attachmentKey(native, network, containerId, ifname);
}

export async function until(condition: () => boolean): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`in vain: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
