// SPDX-License-Identifier: Apache-2.0
// `wait-uninstalled`, which `helm uninstall` runs before it deletes anything: a DaemonSet leaves every node, this waits
// for it, and takes the agents away while that DaemonSet still stands: what a new node's install has put in place
// meanwhile goes, too.

import { setTimeout as delay } from 'node:timers/promises';
import { Api, ApiUnreachable } from '../agent/kubernetes/api.ts';
import { clusterAccess } from '../agent/kubernetes/part.ts';
import type { Values, WAIT_UNINSTALLED_SETTINGS } from '../settings.ts';
import { count } from './survey.ts';
import type { Terminal } from './terminal.ts';

const POLL_MS = 1_000;
/** How often it is said again that the API server cannot be reached. */
const SAY_AGAIN_MS = 30_000;

interface DaemonSet {
  metadata: { uid: string; generation: number; deletionTimestamp?: string };
  spec: { selector: { matchLabels: Readonly<Record<string, string>> } };
  status?: {
    observedGeneration?: number;
    desiredNumberScheduled?: number;
    updatedNumberScheduled?: number;
    numberReady?: number;
  };
}

/** Throws Error that names the nodes that were not left in time, ApiError. */
export async function waitUninstalled(
  terminal: Terminal,
  values: Values<typeof WAIT_UNINSTALLED_SETTINGS>,
): Promise<0> {
  const access = clusterAccess(values);
  if (access === undefined) throw new Error('--kube-api is needed: there is no KUBERNETES_SERVICE_HOST');
  const [removal, agents] = [path('--daemon-set', values.daemonSet), path('--agents', values.agents)];
  const api = new Api(access);
  const patience = new Patience(terminal, performance.now() + values.timeout * 1_000);
  try {
    let nodes = await everyNodeLeft(api, removal, patience, terminal);
    const there = (await patience.call(() => api.get(agents))) as DaemonSet | null;
    if (there !== null) {
      await patience.call(() => api.delete(agents, there.metadata.uid, true));
      await patience.until(async () => ((await api.get(agents)) === null ? true : `${values.agents} has pods`));
      terminal.out(`removed ${values.agents}\n`);
      // A node that has come meanwhile.
      nodes = await everyNodeLeft(api, removal, patience, terminal);
    }
    terminal.out(`${count(nodes, 'node')} left\n`);
    return 0;
  } finally {
    api.close();
  }
}

async function everyNodeLeft(api: Api, removal: string, patience: Patience, terminal: Terminal): Promise<number> {
  let said = '';
  let nodes = 0;
  await patience.until(async () => {
    const found = (await api.get(removal)) as DaemonSet | null;
    if (found === null) throw new Error(`there is no ${removal}`);
    const {
      observedGeneration = 0,
      desiredNumberScheduled = 0,
      updatedNumberScheduled = 0,
      numberReady = 0,
    } = found.status ?? {};
    nodes = desiredNumberScheduled;
    const seen = observedGeneration >= found.metadata.generation;
    if (seen && updatedNumberScheduled === nodes && numberReady >= nodes) return true;
    const left = `${numberReady} of ${count(nodes, 'node')} left`;
    if (seen && left !== said) terminal.out(`${left}\n`);
    said = left;
    return `${left}${await whichNot(api, removal, found)}`;
  });
  return nodes;
}

/** ", not yet: NODE (POD), ..." */
async function whichNot(api: Api, removal: string, { spec }: DaemonSet): Promise<string> {
  const labels = Object.entries(spec.selector.matchLabels).map((pair) => pair.join('='));
  const namespace = removal.split('/')[5];
  const { items } = await api.list(`/api/v1/namespaces/${namespace}/pods`, { labelSelector: labels.join(',') });
  const not = items.flatMap((item) => {
    const { metadata, spec, status } = item as {
      metadata: { name: string };
      spec: { nodeName?: string };
      status?: { conditions?: { type: string; status: string }[] };
    };
    const ready = status?.conditions?.some((one) => one.type === 'Ready' && one.status === 'True');
    return ready ? [] : [`${spec.nodeName ?? 'no node'} (${metadata.name})`];
  });
  return not.length === 0 ? '' : `, not yet: ${not.sort().join(', ')}`;
}

/** Goes on until a moment of performance.now(), also while the API server is away, which it says. */
class Patience {
  readonly #terminal: Terminal;
  readonly #deadline: number;
  /** when it was last said that the API server is away; undefined: it is not, or is once more */
  #said: number | undefined;

  constructor(terminal: Terminal, deadline: number) {
    this.#terminal = terminal;
    this.#deadline = deadline;
  }

  /** `look` returns why it is not so yet. Throws when the time is over, with that. */
  async until(look: () => Promise<true | string>): Promise<void> {
    for (;;) {
      const seen = await this.call(look);
      if (seen === true) return;
      if (performance.now() >= this.#deadline) throw new Error(`given up: ${seen}`);
      await delay(POLL_MS);
    }
  }

  /** Throws what `call` throws; ApiUnreachable only when the time is over. */
  async call<T>(call: () => Promise<T>): Promise<T> {
    for (;;) {
      try {
        const result = await call();
        if (this.#said !== undefined) this.#terminal.err('the API server answers again\n');
        this.#said = undefined;
        return result;
      } catch (error) {
        const now = performance.now();
        if (!(error instanceof ApiUnreachable) || now >= this.#deadline) throw error;
        if (this.#said === undefined || now - this.#said >= SAY_AGAIN_MS) {
          const left = Math.ceil((this.#deadline - now) / 1_000);
          this.#terminal.err(`the API server cannot be reached, trying for ${left} s more: ${error.message}\n`);
          this.#said = now;
        }
        await delay(POLL_MS);
      }
    }
  }
}

function path(flag: string, name: string): string {
  const [namespace, own, ...rest] = name.split('/');
  if (!namespace || !own || rest.length > 0) throw new Error(`${flag} ${name}: it must be NAMESPACE/NAME`);
  return `/apis/apps/v1/namespaces/${namespace}/daemonsets/${own}`;
}
