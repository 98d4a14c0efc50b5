// SPDX-License-Identifier: Apache-2.0
// Who is enrolled: one decision, first match wins.

import { CniError, Code } from '../cni/errors.ts';
import { ANNOTATION, ANNOTATIONS_CAPABILITY, type Annotations, enrolmentAnnotations } from './annotations.ts';
import type { RedirectConfig } from './config.ts';

export interface PodIdentity {
  name: string;
  namespace: string;
  /** '' if the runtime does not say. For static pods a hash of their manifest, not metadata.uid. */
  uid: string;
}

export interface Candidate {
  /** null: not a Kubernetes pod */
  pod: PodIdentity | null;
  ifname: string;
  /** null: none came */
  annotations: Annotations | null;
  /** the conflist entry declares ANNOTATIONS_CAPABILITY */
  annotationsDeclared: boolean;
  /** the pod's labels, where they are known: CNI carries none */
  labels?: ReadonlyMap<string, string>;
  /** what the agent said, where it was asked */
  agentAnswer?: boolean;
}

export interface Enrolment {
  /** undecided: ask the agent and call again with its answer */
  role: 'proxy' | 'pod' | 'none' | 'undecided';
  /** a phrase for `pods`, logs and error details */
  reason: string;
}

const DATAPLANE_MODE_LABEL = 'istio.io/dataplane-mode';

/** Pods of the node agent's DaemonSet, where it does not use the node's network. */
const AGENT_NAME = 'ambient-redirect-*';

/** Kubernetes gives a pod's default network this name; others come from meta-plugins. */
const DEFAULT_INTERFACE = 'eth0';

/** From CNI_ARGS, as containerd and CRI-O fill them. null: name or namespace is missing. */
export function podIdentity(args: ReadonlyMap<string, string>): PodIdentity | null {
  const name = args.get('K8S_POD_NAME') ?? '';
  const namespace = args.get('K8S_POD_NAMESPACE') ?? '';
  if (name === '' || namespace === '') return null;
  return { name, namespace, uid: args.get('K8S_POD_UID') ?? '' };
}

type DecisionConfig = Pick<RedirectConfig, 'enrollment' | 'proxy' | 'podOverrides' | 'excludeNamespaces'>;

/**
 * Throws CniError 7 where an annotation that counts does not parse, and where `enrollment: annotation` could never see
 * one. Pods with hostNetwork do not come here: runtimes make no CNI call for them.
 */
export function decideEnrolment(config: DecisionConfig, candidate: Candidate): Enrolment {
  const { pod, ifname } = candidate;
  if (pod === null) {
    return config.enrollment === 'all'
      ? { role: 'pod', reason: 'enrollment is "all"' }
      : { role: 'none', reason: `not a Kubernetes pod, and enrollment is "${config.enrollment}"` };
  }

  if (isProxy(config, pod)) {
    return ifname === DEFAULT_INTERFACE
      ? { role: 'proxy', reason: 'matches proxy.match' }
      : { role: 'none', reason: `matches proxy.match, but ${ifname} is not its default network` };
  }
  if (isAgent(config, pod)) return { role: 'none', reason: 'is the node agent' };
  if (config.excludeNamespaces.includes(pod.namespace)) {
    return { role: 'none', reason: `namespace ${pod.namespace} is in excludeNamespaces` };
  }

  const podDecides = config.podOverrides === 'all' || config.podOverrides === 'enroll';
  if (podDecides && candidate.labels?.get(DATAPLANE_MODE_LABEL) === 'none') {
    return { role: 'none', reason: `label ${DATAPLANE_MODE_LABEL}: none` };
  }
  if (config.enrollment === 'annotation' && !candidate.annotationsDeclared) {
    throw new CniError(
      Code.INVALID_NETWORK_CONFIG,
      'enrollment "annotation" needs the pod annotations',
      `the conflist entry must have "capabilities": {"${ANNOTATIONS_CAPABILITY}": true}`,
    );
  }
  const annotations = enrolmentAnnotations(candidate.annotations, config.podOverrides);
  if (annotations.enroll === false) return { role: 'none', reason: `annotation ${ANNOTATION.enroll}: false` };

  const interfaces = annotations.interfaces ?? [DEFAULT_INTERFACE];
  if (!interfaces.includes(ifname)) {
    const reason =
      annotations.interfaces === undefined
        ? `${ifname} is a secondary interface, and no annotation ${ANNOTATION.interfaces} counts`
        : `annotation ${ANNOTATION.interfaces} does not list ${ifname}`;
    return { role: 'none', reason };
  }

  if (annotations.enroll === true) return { role: 'pod', reason: `annotation ${ANNOTATION.enroll}: true` };
  switch (config.enrollment) {
    case 'all':
      return { role: 'pod', reason: 'enrollment is "all"' };
    case 'annotation':
      return {
        role: 'none',
        reason: podDecides
          ? `no annotation ${ANNOTATION.enroll}`
          : `enrollment is "annotation", but podOverrides "${config.podOverrides}" lets it not count`,
      };
    case 'agent':
      if (candidate.agentAnswer === undefined) return { role: 'undecided', reason: 'enrollment is "agent"' };
      return candidate.agentAnswer
        ? { role: 'pod', reason: 'the agent said so' }
        : { role: 'none', reason: 'the agent said no' };
  }
}

function isProxy(config: DecisionConfig, pod: PodIdentity): boolean {
  const { match } = config.proxy;
  return pod.namespace === match.namespace && matchesPattern(pod.name, match.name);
}

/** Anyone can give a pod this name; only in namespaces that the platform owns does it count. */
function isAgent(config: DecisionConfig, pod: PodIdentity): boolean {
  const trusted = pod.namespace === config.proxy.match.namespace || config.excludeNamespaces.includes(pod.namespace);
  return trusted && matchesPattern(pod.name, AGENT_NAME);
}

/** `*` stands for any characters, also none. Linear in the text for each star: no backtracking over two stars. */
export function matchesPattern(text: string, pattern: string): boolean {
  const parts = pattern.split('*');
  const head = parts.shift() ?? '';
  const tail = parts.pop();
  if (tail === undefined) return text === head;
  if (text.length < head.length + tail.length || !text.startsWith(head) || !text.endsWith(tail)) return false;
  let at = head.length;
  for (const part of parts) {
    const found = text.indexOf(part, at);
    if (found < 0) return false;
    at = found + part.length;
  }
  return at <= text.length - tail.length;
}
