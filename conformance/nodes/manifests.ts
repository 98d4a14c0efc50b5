// SPDX-License-Identifier: Apache-2.0
//
// Objects that the tests apply: the proxy as a DaemonSet, and workloads.

import { MESH_IMAGE } from './images.ts';

type Json = Record<string, unknown>;

export const MODE = 'istio.io/dataplane-mode';
export const REDIRECTION = 'ambient.istio.io/redirection';
export const SYSTEM = 'istio-system';

/** Runs pod.ts with these arguments. */
export function role(...args: string[]): string[] {
  return ['/bin/node', '/app/dist/pod.mjs', ...args];
}

export function namespace(name: string, labels: Record<string, string> = {}): Json {
  return { apiVersion: 'v1', kind: 'Namespace', metadata: { name, labels } };
}

export function serviceAccount(namespaceName: string, name: string): Json {
  return { apiVersion: 'v1', kind: 'ServiceAccount', metadata: { name, namespace: namespaceName } };
}

export interface Workload {
  namespace: string;
  name: string;
  command: string[];
  /** without it the scheduler chooses */
  node?: string;
  labels?: Record<string, string>;
  more?: Json;
  container?: Json;
}

export function podSpec({ command, node, more, container }: Workload): Json {
  return {
    ...(node !== undefined && { nodeSelector: { 'kubernetes.io/hostname': node } }),
    terminationGracePeriodSeconds: 2,
    containers: [{ name: 'app', image: MESH_IMAGE, imagePullPolicy: 'Never', command, ...container }],
    ...more,
  };
}

export function pod(workload: Workload): Json {
  const { namespace: ns, name, labels } = workload;
  const metadata = { namespace: ns, name, labels: { app: name, ...labels } };
  return { apiVersion: 'v1', kind: 'Pod', metadata, spec: podSpec(workload) };
}

/** A Deployment, DaemonSet or Job of such pods. */
export function controller(kind: 'Deployment' | 'DaemonSet', workload: Workload, spec: Json = {}): Json {
  const { namespace: ns, name, labels } = workload;
  return {
    apiVersion: 'apps/v1',
    kind,
    metadata: { namespace: ns, name, labels: { app: name } },
    spec: {
      selector: { matchLabels: { app: name } },
      template: { metadata: { labels: { app: name, ...labels } }, spec: podSpec(workload) },
      ...spec,
    },
  };
}

export function clusterService(namespaceName: string, name: string, port: number, more: Json = {}): Json {
  return {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { namespace: namespaceName, name },
    spec: { selector: { app: name }, ports: [{ port, targetPort: port, name: 'p' }], ...more },
  };
}

const EVERYWHERE = [{ operator: 'Exists' }];

/** The stand-in for ztunnel. */
export function ztunnel(contract: 'shared' | 'in-pod'): Json[] {
  const inPod = contract === 'in-pod';
  const capabilities = { add: ['NET_ADMIN', 'NET_RAW', 'SYS_ADMIN'] };
  const run = { name: 'ztunnel-run', mountPath: '/var/run/ztunnel' };
  return [
    serviceAccount(SYSTEM, 'ztunnel'),
    {
      apiVersion: 'rbac.authorization.k8s.io/v1',
      kind: 'ClusterRoleBinding',
      metadata: { name: 'ztunnel' },
      roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'ClusterRole', name: 'view' },
      subjects: [{ kind: 'ServiceAccount', name: 'ztunnel', namespace: SYSTEM }],
    },
    controller(
      'DaemonSet',
      {
        namespace: SYSTEM,
        name: 'ztunnel',
        command: role(...(inPod ? ['ztunnel-inpod', '/var/run/ztunnel/ztunnel.sock'] : ['ztunnel-shared'])),
        more: {
          serviceAccountName: 'ztunnel',
          tolerations: EVERYWHERE,
          terminationGracePeriodSeconds: 10,
          volumes: inPod ? [{ name: run.name, hostPath: { path: '/var/run/ztunnel', type: 'DirectoryOrCreate' } }] : [],
        },
        container: { securityContext: { capabilities }, volumeMounts: inPod ? [run] : [] },
      },
      { updateStrategy: { type: 'RollingUpdate', rollingUpdate: { maxUnavailable: 0, maxSurge: 1 } } },
    ),
  ];
}
