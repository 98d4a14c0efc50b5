// SPDX-License-Identifier: Apache-2.0
//
// Objects that the tests apply: the proxy as a DaemonSet, the node agent, workloads.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseAllDocuments } from 'yaml';
import { MESH_IMAGE, OWN_IMAGE } from './images.ts';

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

const HOST_PATHS: readonly { name: string; path: string; type?: string; propagation?: string }[] = [
  { name: 'cni-bin', path: '/opt/cni/bin' },
  { name: 'cni-conf', path: '/etc/cni/net.d' },
  { name: 'bpf', path: '/sys/fs/bpf', propagation: 'HostToContainer' },
  { name: 'run', path: '/run/ambient-redirect', type: 'DirectoryOrCreate' },
  { name: 'netns', path: '/run/netns', propagation: 'HostToContainer' },
  { name: 'containerd', path: '/run/containerd' },
  { name: 'ztunnel', path: '/var/run/ztunnel', type: 'DirectoryOrCreate' },
  { name: 'ambient-config', path: '/etc/ambient-config', type: 'DirectoryOrCreate' },
  { name: 'cgroup', path: '/sys/fs/cgroup' },
];

/** The node agent by hand, as the README's DaemonSet would be without the chart. */
export function agent(contract: 'shared' | 'in-pod', image = OWN_IMAGE): Json[] {
  const volumeMounts = HOST_PATHS.map(({ name, path, propagation }) => ({
    name,
    mountPath: path,
    ...(propagation !== undefined && { mountPropagation: propagation }),
  }));
  const env = [
    { name: 'NODE_NAME', valueFrom: { fieldRef: { fieldPath: 'spec.nodeName' } } },
    { name: 'AMBIENT_REDIRECT_ENROLLMENT', value: 'agent' },
    { name: 'AMBIENT_REDIRECT_CONTRACT', value: contract },
    { name: 'REDIRECT_MODE', value: 'ebpf' },
  ];
  const container = { image, imagePullPolicy: 'Never', env, volumeMounts, securityContext: { privileged: true } };
  const rbac = parseAllDocuments(readFileSync(join(import.meta.dirname, '../../plugin/agent/rbac.yaml'), 'utf8'));
  return [
    ...rbac.map((document) => document.toJS() as Json),
    {
      apiVersion: 'apps/v1',
      kind: 'DaemonSet',
      metadata: { namespace: SYSTEM, name: 'istio-cni-node', labels: { 'k8s-app': 'istio-cni-node' } },
      spec: {
        selector: { matchLabels: { 'k8s-app': 'istio-cni-node' } },
        template: {
          metadata: { labels: { 'k8s-app': 'istio-cni-node' } },
          spec: {
            hostNetwork: true,
            hostPID: true,
            serviceAccountName: 'ambient-redirect',
            priorityClassName: 'system-node-critical',
            tolerations: EVERYWHERE,
            terminationGracePeriodSeconds: 5,
            initContainers: [{ ...container, name: 'install', args: ['install'] }],
            containers: [
              {
                ...container,
                name: 'agent',
                args: ['agent'],
                readinessProbe: { httpGet: { path: '/readyz', port: 8000 }, periodSeconds: 1 },
              },
            ],
            volumes: HOST_PATHS.map(({ name, path, type = '' }) => ({ name, hostPath: { path, type } })),
          },
        },
      },
    },
  ];
}
