// SPDX-License-Identifier: Apache-2.0
// Whether a pod of the API is to be in the mesh, by the rules that the plugin has, with what only the API knows.

import { type DecisionConfig, decideEnrolment, type Enrolment } from '../../redirect/enrolment.ts';
import type { KubernetesNamespace, KubernetesPod } from './pods.ts';

/** Throws CniError 7 for an annotation that does not parse. */
export function enrolmentOf(
  config: DecisionConfig,
  pod: KubernetesPod,
  namespace: KubernetesNamespace | undefined,
  ifname: string,
): Enrolment & { role: 'proxy' | 'pod' | 'none' } {
  const { annotations, labels, serviceAccount, owners, hostNetwork, phase } = pod;
  const { role, reason } = decideEnrolment(config, {
    pod,
    ifname,
    annotations,
    annotationsDeclared: true,
    labels,
    // A namespace that is gone has no label any more.
    namespaceLabels: namespace?.labels ?? new Map(),
    serviceAccount,
    owners,
    hostNetwork,
    phase,
  });
  if (role === 'undecided') throw new Error('the agent asks itself');
  return { role, reason };
}
