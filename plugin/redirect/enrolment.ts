// SPDX-License-Identifier: Apache-2.0
// Who is enrolled: one decision, first match wins.

import { CniError, Code } from '../cni/errors.ts';
import { ANNOTATION, ANNOTATIONS_CAPABILITY, type Annotations, enrolmentAnnotations } from './annotations.ts';
import type { RedirectConfig } from './config.ts';
import { DATAPLANE_MODE, DEFAULT_SELECTORS, type EnablementSelector, isSelected, type Labels } from './selectors.ts';

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
  /** what the agent said, where it was asked */
  agentAnswer?: boolean;
  // What only the API knows; undefined: not known. CNI carries none of it.
  labels?: Labels | undefined;
  namespaceLabels?: Labels | undefined;
  serviceAccount?: string | undefined;
  owners?: readonly { kind: string; name: string }[] | undefined;
  hostNetwork?: boolean | undefined;
  /** "Pending", "Running", "Succeeded", "Failed", "Unknown" */
  phase?: string | undefined;
}

export interface Enrolment {
  /** undecided: ask the agent and call again with its answer */
  role: 'proxy' | 'pod' | 'none' | 'undecided';
  /** a phrase for `pods`, logs and error details */
  reason: string;
}

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

export type DecisionConfig = Pick<RedirectConfig, 'enrollment' | 'proxy' | 'podOverrides' | 'excludeNamespaces'> & {
  /** of the agent; default Istio's */
  enablementSelectors?: readonly EnablementSelector[] | undefined;
};

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

  // Nothing may keep the agent's own pod from starting.
  if (isAgent(config, pod)) return { role: 'none', reason: 'is the node agent' };
  if (candidate.hostNetwork === true) return { role: 'none', reason: "uses the host's network" };
  const { phase } = candidate;
  if (phase === 'Succeeded' || phase === 'Failed') return { role: 'none', reason: `has ended: ${phase}` };
  const impostor = proxyFlaw(config, candidate, pod);
  if (impostor === '') {
    return ifname === DEFAULT_INTERFACE
      ? { role: 'proxy', reason: 'matches proxy.match' }
      : { role: 'none', reason: `matches proxy.match, but ${ifname} is not its default network` };
  }
  if (config.excludeNamespaces.includes(pod.namespace)) {
    const also = impostor === undefined ? '' : `; ${impostor}`;
    return { role: 'none', reason: `namespace ${pod.namespace} is in excludeNamespaces${also}` };
  }

  const podDecides = config.podOverrides === 'all' || config.podOverrides === 'enroll';
  // Whoever can annotate a pod could leave the mesh by it.
  if (podDecides && candidate.annotations?.has(ANNOTATION.sidecar) === true) {
    return { role: 'none', reason: 'has a sidecar' };
  }
  if (podDecides && candidate.labels?.get(DATAPLANE_MODE) === 'none') {
    return { role: 'none', reason: `label ${DATAPLANE_MODE}: none` };
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
      return byAgent(config, candidate);
  }
}

/** The plugin asks the agent, and the agent looks at labels. */
function byAgent({ enablementSelectors }: DecisionConfig, candidate: Candidate): Enrolment {
  const { agentAnswer, labels, namespaceLabels } = candidate;
  if (agentAnswer !== undefined) {
    return agentAnswer ? { role: 'pod', reason: 'the agent said so' } : { role: 'none', reason: 'the agent said no' };
  }
  if (labels === undefined) return { role: 'undecided', reason: 'enrollment is "agent"' };
  switch (isSelected(enablementSelectors ?? DEFAULT_SELECTORS, labels, namespaceLabels)) {
    case true:
      return { role: 'pod', reason: 'an enablement selector matches its labels' };
    case false:
      return { role: 'none', reason: 'no enablement selector matches its labels' };
    case undefined:
      return { role: 'undecided', reason: "the labels of the pod's namespace are not known" };
  }
}

/**
 * '': it is the proxy, as far as is known. undefined: nothing says so. Else why it is not, though it is called like it:
 * whoever may create pods in that namespace under another service account is not whom the platform trusts with all
 * traffic of the node.
 */
function proxyFlaw(config: DecisionConfig, candidate: Candidate, pod: PodIdentity): string | undefined {
  const { match } = config.proxy;
  if (pod.namespace !== match.namespace || !matchesPattern(pod.name, match.name)) return undefined;
  const { serviceAccount, owners } = candidate;
  if (serviceAccount !== undefined && !matchesPattern(serviceAccount, match.serviceAccount)) {
    return `it is called like the proxy, but its service account is ${serviceAccount}, not ${match.serviceAccount}`;
  }
  if (
    owners !== undefined &&
    !owners.some(({ kind, name }) => kind === 'DaemonSet' && pod.name.startsWith(`${name}-`))
  ) {
    return 'it is called like the proxy, but is no pod of a DaemonSet';
  }
  return '';
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
