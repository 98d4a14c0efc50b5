// SPDX-License-Identifier: Apache-2.0
// The agent with Kubernetes: who is in the mesh comes from the API, and pods move in and out while they run.

import { Counter, Gauge, Histogram } from 'prom-client';
import { hex } from '../../attachments.ts';
import { CniError, Code } from '../../cni/errors.ts';
import { rememberedInstall } from '../../install/entry.ts';
import type { Agent } from '../agent.ts';
import { entrySettings } from '../entry-settings.ts';
import type { AgentSettings } from '../settings.ts';
import { Api, type ClusterAccess } from './api.ts';
import { CriSandboxes } from './cri.ts';
import { Enroller } from './enroller.ts';
import { PinnedState } from './records.ts';
import { ProcessSandboxes } from './sandboxes.ts';

const ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';

/**
 * How to reach the API server: what the settings say, else as pods do (KUBERNETES_SERVICE_HOST and the service account's
 * files). undefined: there is no Kubernetes here.
 */
export function clusterAccess(
  { kubeApi, kubeCaFile, kubeTokenFile }: Pick<AgentSettings, 'kubeApi' | 'kubeCaFile' | 'kubeTokenFile'>,
  env: NodeJS.ProcessEnv = process.env,
): ClusterAccess | undefined {
  const host = env.KUBERNETES_SERVICE_HOST ?? '';
  const port = env.KUBERNETES_SERVICE_PORT ?? '443';
  if (kubeApi !== undefined) return { server: kubeApi, caFile: kubeCaFile, tokenFile: kubeTokenFile };
  if (host === '') return undefined;
  return {
    server: `https://${host.includes(':') ? `[${host}]` : host}:${port}`,
    caFile: kubeCaFile ?? `${ACCOUNT}/ca.crt`,
    tokenFile: kubeTokenFile ?? `${ACCOUNT}/token`,
  };
}

/** Where containerd and CRI-O listen; a socket that comes later is seen, too. */
const CRI_SOCKETS = ['/run/containerd/containerd.sock', '/run/crio/crio.sock'];

function criSandboxes(setting: string | undefined): CriSandboxes[] {
  if (setting !== undefined) return [new CriSandboxes(setting)];
  return CRI_SOCKETS.map((path) => new CriSandboxes(path, true));
}

export interface KubernetesPart {
  start(): void;
  /** Every pod again: something that decides about all of them has changed. */
  look(): void;
  stop(): Promise<void>;
}

/** To be made before the agent starts, and started after it. Throws Error without a node name, CniError. */
export function addKubernetes(agent: Agent, access: ClusterAccess): KubernetesPart {
  const { native, settings, log, metrics } = agent;
  if (settings.nodeName === '') {
    throw new Error('--node-name (NODE_NAME) is needed: the API server is asked for the pods of one node');
  }
  const { enablementSelectors } = settings;
  const { config, network } = entrySettings(settings);
  const pinned = new PinnedState(native, config);
  pinned.current();
  const api = new Api(access);
  const latency = new Histogram({
    name: 'ambient_redirect_reconcile_seconds',
    help: 'from a change in the API to its being done, by pod',
    buckets: [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30],
    registers: [metrics.registry],
  });
  const enroller = new Enroller({
    native,
    steps: agent.steps,
    config,
    knowsEntry: settings.conf !== undefined || rememberedInstall(settings.runDir) !== undefined,
    enablementSelectors,
    network,
    pinned,
    api,
    nodeName: settings.nodeName,
    sandboxes: [...criSandboxes(settings.criSocket), new ProcessSandboxes()],
    log: (level, text, fields) => log[level](fields ?? {}, text),
    compare: (record) => agent.compare(new Set([record.hostIfindex])),
    onReconciled: (seconds) => latency.observe(seconds),
    onDetached: ({ contract }) => {
      if (contract === 'in-pod') void agent.reconcile('unenrol');
    },
    proxyAbsent: () =>
      config.proxy.contract === 'in-pod' && agent.zds?.isLive !== true
        ? `no ztunnel is connected to ${settings.zdsSocket}`
        : null,
    announce: async ({ key, record }, { namespace, name }) => {
      if (record.contract === 'shared') return 'acknowledged';
      const uid = agent.registry.uidOf(hex(key));
      if (uid !== undefined && agent.zds?.answerOf(uid) === null) return 'acknowledged';
      try {
        await agent.enrol({ namespace, name, uid: record.podUid });
        return 'acknowledged';
      } catch (error) {
        const absent = error instanceof CniError && error.code === Code.TRY_AGAIN_LATER;
        if (absent) return 'pending';
        throw error;
      }
    },
  });
  // A ztunnel that has come takes what waited for one.
  agent.events.on('ztunnel', () => enroller.lookAtAll());
  agent.events.on('lost', () => enroller.lookAtAll());
  agent.events.on('enrolled', ({ uid }) => enroller.look(uid));
  agent.events.on('unenrolled', ({ uid }) => enroller.look(uid));
  agent.directories.unshift({
    find: async ({ namespace, name, uid }) => {
      const { enrolled, reason, serviceAccount } = await enroller.answer({ namespace, name, uid, ifname: 'eth0' });
      return { uid, serviceAccount, enrol: enrolled, reason };
    },
  });
  agent.readiness.add('kubernetes', () => enroller.notReady().join('; ') || null);
  addMetrics(agent, enroller);
  return {
    start: () => enroller.start(),
    look: () => enroller.lookAtAll(),
    stop: async () => {
      const stopped = enroller.stop();
      // What is asked of an API server that does not answer is not waited for.
      api.close();
      await stopped;
      pinned.close();
    },
  };
}

function addMetrics({ metrics: { registry } }: Agent, enroller: Enroller): void {
  const registers = [registry];
  const mirrors = { pods: enroller.pods, namespaces: enroller.namespaces };
  new Gauge({
    name: 'ambient_redirect_queue_depth',
    help: 'pods with work to do',
    registers,
    collect() {
      this.set(enroller.queue.depth);
    },
  });
  new Gauge({
    name: 'ambient_redirect_queue_failing',
    help: 'pods whose last try failed',
    registers,
    collect() {
      this.set(enroller.queue.failing);
    },
  });
  new Gauge({
    name: 'ambient_redirect_queue_age_seconds',
    help: 'how long the oldest work has been waiting for its end',
    registers,
    collect() {
      this.set(enroller.queue.age);
    },
  });
  new Gauge({
    name: 'ambient_redirect_api_watching',
    help: '1 while changes of the collection are followed, else 0',
    labelNames: ['resource'],
    registers,
    collect() {
      for (const [resource, { state }] of Object.entries(mirrors)) this.set({ resource }, state === 'watching' ? 1 : 0);
    },
  });
  new Gauge({
    name: 'ambient_redirect_api_heard_seconds',
    help: 'since the API server last said something of the collection',
    labelNames: ['resource'],
    registers,
    collect() {
      for (const [resource, { heardAt }] of Object.entries(mirrors)) {
        this.set({ resource }, (performance.now() - heardAt) / 1000);
      }
    },
  });
  new Gauge({
    name: 'ambient_redirect_api_objects',
    help: 'objects in the copy of the collection',
    labelNames: ['resource'],
    registers,
    collect() {
      for (const [resource, { size }] of Object.entries(mirrors)) this.set({ resource }, size);
    },
  });
  new Counter({
    name: 'ambient_redirect_api_watch_ends_total',
    help: 'watches that ended, by how: as asked, because the version was too old, by an error',
    labelNames: ['resource', 'reason'],
    registers,
    collect() {
      this.reset();
      for (const [resource, { ends }] of Object.entries(mirrors)) {
        for (const [reason, count] of Object.entries(ends)) this.inc({ resource, reason }, count);
      }
    },
  });
  new Counter({
    name: 'ambient_redirect_enrolments_total',
    help: 'what was done to pods, by what',
    labelNames: ['event'],
    registers,
    collect() {
      this.reset();
      for (const [event, count] of enroller.counts) this.inc({ event }, count);
    },
  });
}
