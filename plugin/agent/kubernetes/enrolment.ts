// SPDX-License-Identifier: Apache-2.0
// Whether a pod of the API is to be in the mesh, by the rules that the plugin has, with what only the API knows.

import type { RedirectConfig } from '../../redirect/config.ts';
import { decideEnrolment, type Enrolment } from '../../redirect/enrolment.ts';
import { isFinished, type KubernetesNamespace, type KubernetesPod, SIDECAR } from './pods.ts';

const DATAPLANE_MODE = 'istio.io/dataplane-mode';

/** Throws CniError 7 for an annotation that does not parse. */
export function enrolmentOf(
  config: RedirectConfig,
  pod: KubernetesPod,
  namespace: KubernetesNamespace | undefined,
  ifname: string,
): Enrolment & { role: 'proxy' | 'pod' | 'none' } {
  if (pod.hostNetwork) return { role: 'none', reason: "uses the host's network" };
  if (isFinished(pod)) return { role: 'none', reason: `has ended: ${pod.phase}` };
  if (pod.annotations.has(SIDECAR)) return { role: 'none', reason: 'has a sidecar' };
  const mode = pod.labels.get(DATAPLANE_MODE) ?? namespace?.labels.get(DATAPLANE_MODE);
  const { role, reason } = decideEnrolment(config, {
    pod,
    ifname,
    annotations: pod.annotations,
    annotationsDeclared: true,
    labels: pod.labels,
    agentAnswer: mode === 'ambient',
  });
  if (role === 'undecided') throw new Error('the agent asks itself');
  return { role, reason };
}
