// SPDX-License-Identifier: Apache-2.0
// What of pods and namespaces the agent keeps: a node's pods a thousand times over would not fit its memory in full.

import { ANNOTATION } from '../../redirect/annotations.ts';

/** The label and annotation names of Istio's that say what the mesh thinks of a pod. */
export const REDIRECTION = 'ambient.istio.io/redirection';
const CONFIG_HASH = 'kubernetes.io/config.hash';
const CONFIG_MIRROR = 'kubernetes.io/config.mirror';

const KEPT_ANNOTATIONS: readonly string[] = [...Object.values(ANNOTATION), REDIRECTION, CONFIG_HASH, CONFIG_MIRROR];

export interface KubernetesPod {
  uid: string;
  namespace: string;
  name: string;
  labels: ReadonlyMap<string, string>;
  /** those that anybody here looks at */
  annotations: ReadonlyMap<string, string>;
  /** of a static pod, which has none: "default", as ztunnel calls it */
  serviceAccount: string;
  hostNetwork: boolean;
  /** "Pending", "Running", "Succeeded", "Failed", "Unknown" */
  phase: string;
  ips: readonly string[];
  /** it runs still, and its DEL may come at any moment */
  deleting: boolean;
  owners: readonly { kind: string; name: string }[];
}

export interface KubernetesNamespace {
  name: string;
  labels: ReadonlyMap<string, string>;
}

interface PodObject {
  metadata: {
    uid: string;
    namespace: string;
    name: string;
    labels?: Record<string, string>;
    annotations?: Record<string, string>;
    ownerReferences?: { kind: string; name: string }[];
    deletionTimestamp?: string;
  };
  spec?: { serviceAccountName?: string; hostNetwork?: boolean };
  status?: { phase?: string; podIP?: string; podIPs?: { ip?: string }[] };
}

export function projectPod(object: unknown): KubernetesPod {
  const { metadata, spec = {}, status = {} } = object as PodObject;
  const annotations = metadata.annotations ?? {};
  const kept = KEPT_ANNOTATIONS.flatMap((key): [string, string][] => {
    const value = annotations[key];
    return value === undefined ? [] : [[key, value]];
  });
  const ips = status.podIPs?.flatMap(({ ip }) => (ip ? [ip] : [])) ?? [];
  return {
    uid: metadata.uid,
    namespace: metadata.namespace,
    name: metadata.name,
    labels: new Map(Object.entries(metadata.labels ?? {})),
    annotations: new Map(kept),
    // The API server gives every pod a name there, except mirrors of static pods. istiod hands on the empty name, for
    // which ztunnel puts "default" (state/workload.rs), and looks for that in what ZDS says.
    serviceAccount: spec.serviceAccountName || 'default',
    hostNetwork: spec.hostNetwork ?? false,
    phase: status.phase ?? 'Pending',
    ips: ips.length === 0 && status.podIP ? [status.podIP] : ips,
    deleting: metadata.deletionTimestamp !== undefined,
    owners: (metadata.ownerReferences ?? []).map(({ kind, name }) => ({ kind, name })),
  };
}

export function projectNamespace(object: unknown): KubernetesNamespace {
  const { metadata } = object as { metadata: { name: string; labels?: Record<string, string> } };
  return { name: metadata.name, labels: new Map(Object.entries(metadata.labels ?? {})) };
}

/**
 * The UIDs that a runtime may know the pod by. For a static pod that is the hash of its manifest: the API has a mirror
 * of the pod, with a UID of its own.
 */
export function identitiesOf(pod: KubernetesPod): string[] {
  const hashes = [CONFIG_HASH, CONFIG_MIRROR].flatMap((key) => pod.annotations.get(key) ?? []);
  return [...new Set([pod.uid, ...hashes])];
}

/** Whether a change can make a difference to anything that is done for the pod. */
export function isSamePod(a: KubernetesPod, b: KubernetesPod): boolean {
  const sameMap = (x: ReadonlyMap<string, string>, y: ReadonlyMap<string, string>) =>
    x.size === y.size && [...x].every(([key, value]) => y.get(key) === value);
  return (
    a.uid === b.uid &&
    a.phase === b.phase &&
    a.ips.join() === b.ips.join() &&
    sameMap(a.labels, b.labels) &&
    sameMap(a.annotations, b.annotations)
  );
}
