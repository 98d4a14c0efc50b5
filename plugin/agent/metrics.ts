// SPDX-License-Identifier: Apache-2.0
// Prometheus metrics of the agent: Istio's names where the thing is the same, `ambient_redirect_` for ours. Others add
// theirs to `registry`.

import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import { ownVersion } from '../own-version.ts';
import type { DriftKind } from './truth.ts';

/** What the kernel can have otherwise than recorded, and what ztunnel can. */
const DRIFTS: Readonly<Record<DriftKind | 'pod_gone' | 'pod_unknown' | 'pod_unacknowledged', 0>> = {
  interface: 0,
  program: 0,
  link: 0,
  map: 0,
  rule: 0,
  route: 0,
  sysctl: 0,
  listener: 0,
  pod_gone: 0,
  pod_unknown: 0,
  pod_unacknowledged: 0,
};

export class AgentMetrics {
  readonly registry = new Registry();

  readonly ready = this.#gauge('ambient_redirect_ready', '1 while this condition of /readyz holds, else 0', [
    'condition',
  ]);
  readonly markForgeable = this.#gauge(
    'ambient_redirect_mark_forgeable',
    "1 while pods with CAP_NET_RAW can forge ztunnel's mark, as its cgroup is not known",
  );

  /** Istio's: ztunnels that are connected */
  readonly ztunnelConnected = this.#gauge('ztunnel_connected', 'ztunnels connected to the ZDS socket');
  /** Istio's: answers of agent.sock to the plugin */
  readonly pluginRequests = this.#counter(
    'istio_cni_plugin_requests_total',
    'requests of the CNI plugin by the HTTP status they were answered with',
    ['response_code'],
  );
  /** Istio's: what made the agent look */
  readonly reconcileEvents = this.#counter('nodeagent_reconcile_events_total', 'reconciliations by cause', ['type']);

  readonly workloads = this.#gauge(
    'ambient_redirect_workloads',
    'pods of the in-pod contract that ztunnel is to serve',
  );
  readonly unacknowledged = this.#gauge(
    'ambient_redirect_workloads_unacknowledged',
    'those of them that the newest ztunnel has not acknowledged',
  );
  readonly pendingPods = this.#gauge(
    'ambient_redirect_pending_pods',
    'pods that wait to be enrolled, as the agent or ztunnel was absent at their ADD',
  );
  readonly attachments = this.#gauge('ambient_redirect_attachments', 'recorded attachments', [
    'contract',
    'role',
    'state',
  ]);
  readonly drift = this.#counter(
    'ambient_redirect_drift_total',
    'differences between the recorded state and the kernel or ztunnel that a reconciliation found',
    ['kind'],
  );
  readonly zdsMessages = this.#counter('ambient_redirect_zds_messages_total', 'messages to ztunnel by what came back', [
    'kind',
    'result',
  ]);
  readonly zdsSeconds = this.#histogram('ambient_redirect_zds_answer_seconds', 'until ztunnel answered', ['kind']);
  readonly packets = this.#counter('ambient_redirect_packets_total', 'packets by program and reason', [
    'program',
    'reason',
  ]);
  readonly bytes = this.#counter('ambient_redirect_bytes_total', 'bytes by program and reason', ['program', 'reason']);
  readonly mapEntries = this.#gauge('ambient_redirect_map_entries', 'entries in use of a pinned map', ['map']);
  readonly mapCapacity = this.#gauge('ambient_redirect_map_capacity', 'entries that a pinned map can have', ['map']);

  constructor() {
    collectDefaultMetrics({ register: this.registry });
    this.#gauge('ambient_redirect_build_info', '1; the version of the agent', ['version']).set(
      { version: ownVersion() },
      1,
    );
    // A counter that begins with its first event has no increase that Prometheus could see.
    for (const kind of Object.keys(DRIFTS)) this.drift.inc({ kind }, 0);
  }

  #gauge<L extends string>(name: string, help: string, labelNames: L[] = []): Gauge<L> {
    return new Gauge({ name, help, labelNames, registers: [this.registry] });
  }

  #counter<L extends string>(name: string, help: string, labelNames: L[] = []): Counter<L> {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  #histogram<L extends string>(name: string, help: string, labelNames: L[]): Histogram<L> {
    const buckets = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5];
    return new Histogram({ name, help, labelNames, buckets, registers: [this.registry] });
  }
}
