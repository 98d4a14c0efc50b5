// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { parseConfig } from './config.ts';
import { type Candidate, decideEnrolment, matchesPattern, podIdentity } from './enrolment.ts';
import { parseSelectors } from './selectors.ts';

interface Case {
  pod?: string | null;
  ifname?: string;
  annotations?: Record<string, string> | null;
  declared?: boolean;
  labels?: Record<string, string>;
  namespaceLabels?: Record<string, string>;
  agentAnswer?: boolean;
  config?: Record<string, unknown>;
  /** what only the API knows */
  known?: Pick<Candidate, 'serviceAccount' | 'owners' | 'hostNetwork' | 'phase'>;
  selectors?: object[];
}

function decide({ pod = 'shop/cart-1', annotations = null, declared = true, config = {}, ...rest }: Case) {
  const [namespace = '', name = ''] = pod?.split('/') ?? [];
  const candidate: Candidate = {
    pod: pod === null ? null : { namespace, name, uid: '' },
    ifname: rest.ifname ?? 'eth0',
    annotations: annotations && new Map(Object.entries(annotations)),
    annotationsDeclared: declared,
    ...(rest.labels && { labels: new Map(Object.entries(rest.labels)) }),
    ...(rest.namespaceLabels && { namespaceLabels: new Map(Object.entries(rest.namespaceLabels)) }),
    ...rest.known,
    ...(rest.agentAnswer !== undefined && { agentAnswer: rest.agentAnswer }),
  };
  const selectors = rest.selectors && { enablementSelectors: parseSelectors(rest.selectors) };
  const { role, reason } = decideEnrolment({ ...parseConfig(config), ...selectors }, candidate);
  return [role, reason];
}

const enroll = (value: string) => ({ 'ambient-redirect/enroll': value });
const interfaces = (value: string) => ({ 'ambient-redirect/interfaces': value });
const ALL = { enrollment: 'all' };
const AGENT = { enrollment: 'agent' };
const NONE_LABEL = { 'istio.io/dataplane-mode': 'none' };
const AMBIENT_LABEL = { 'istio.io/dataplane-mode': 'ambient' };
const DAEMON_SET = [{ kind: 'DaemonSet', name: 'ztunnel' }];
const ZTUNNEL = { serviceAccount: 'ztunnel', owners: DAEMON_SET };
const SIDECAR = { 'sidecar.istio.io/status': '{"initContainers":["istio-init"]}' };

test.each<[string, Case, string, string]>([
  // the proxy, whatever else is said of it
  ['proxy', { pod: 'istio-system/ztunnel-abc' }, 'proxy', 'matches proxy.match'],
  [
    'proxy, opted out',
    { pod: 'istio-system/ztunnel-abc', annotations: enroll('false') },
    'proxy',
    'matches proxy.match',
  ],
  ['proxy, opted in', { pod: 'istio-system/ztunnel-abc', annotations: enroll('true') }, 'proxy', 'matches proxy.match'],
  [
    'proxy in-pod',
    { pod: 'istio-system/ztunnel-abc', config: { ...ALL, proxy: { contract: 'in-pod' } } },
    'proxy',
    'matches proxy.match',
  ],
  ['proxy, capability undeclared', { pod: 'istio-system/ztunnel-a', declared: false }, 'proxy', 'matches proxy.match'],
  [
    'secondary network of the proxy',
    { pod: 'istio-system/ztunnel-abc', ifname: 'net1', annotations: interfaces('net1'), config: ALL },
    'none',
    'matches proxy.match, but net1 is not its default network',
  ],
  ['namesake elsewhere', { pod: 'shop/ztunnel-abc', config: ALL }, 'pod', 'enrollment is "all"'],
  [
    'other pod of that namespace',
    { pod: 'istio-system/istiod-1', config: ALL },
    'none',
    'namespace istio-system is in excludeNamespaces',
  ],
  [
    'configured match',
    { pod: 'mesh/haproxy', config: { proxy: { match: { namespace: 'mesh', name: 'haproxy' } } } },
    'proxy',
    'matches proxy.match',
  ],

  // what the API knows makes the proxy, a label never
  ['proxy, as the API has it', { pod: 'istio-system/ztunnel-abc', known: ZTUNNEL }, 'proxy', 'matches proxy.match'],
  [
    'called like the proxy, another service account',
    { pod: 'istio-system/ztunnel-abc', known: { ...ZTUNNEL, serviceAccount: 'default' } },
    'none',
    'namespace istio-system is in excludeNamespaces; it is called like the proxy, but its service account is default, not ztunnel',
  ],
  [
    'called like the proxy, by nobody',
    { pod: 'istio-system/ztunnel-abc', known: { ...ZTUNNEL, owners: [] } },
    'none',
    'namespace istio-system is in excludeNamespaces; it is called like the proxy, but is no pod of a DaemonSet',
  ],
  [
    'called like the proxy, of a ReplicaSet',
    {
      pod: 'istio-system/ztunnel-abc',
      known: { ...ZTUNNEL, owners: [{ kind: 'ReplicaSet', name: 'ztunnel' }] },
      config: { ...ALL, excludeNamespaces: [] },
    },
    'pod',
    'enrollment is "all"',
  ],
  [
    'called like the proxy, of another DaemonSet',
    { pod: 'istio-system/ztunnel-abc', known: { ...ZTUNNEL, owners: [{ kind: 'DaemonSet', name: 'logs' }] } },
    'none',
    'namespace istio-system is in excludeNamespaces; it is called like the proxy, but is no pod of a DaemonSet',
  ],
  [
    'labelled like the proxy, elsewhere',
    { pod: 'shop/x', labels: { app: 'ztunnel' }, known: ZTUNNEL, config: ALL },
    'pod',
    'enrollment is "all"',
  ],
  [
    'configured service account',
    {
      pod: 'mesh/haproxy-1',
      known: { serviceAccount: 'edge-7', owners: [{ kind: 'DaemonSet', name: 'haproxy' }] },
      config: { proxy: { match: { namespace: 'mesh', name: 'haproxy-*', serviceAccount: 'edge-*' } } },
    },
    'proxy',
    'matches proxy.match',
  ],

  // the agent
  [
    'agent, called like the proxy',
    {
      pod: 'istio-system/ambient-redirect-x',
      known: { serviceAccount: 'a', owners: [{ kind: 'DaemonSet', name: 'ambient-redirect' }] },
      config: { proxy: { match: { name: '*' } } },
    },
    'none',
    'is the node agent',
  ],
  ['agent', { pod: 'istio-system/ambient-redirect-x', annotations: enroll('true') }, 'none', 'is the node agent'],
  ['agent, excluded namespace', { pod: 'kube-system/ambient-redirect-x', config: ALL }, 'none', 'is the node agent'],
  ['namesake of the agent', { pod: 'shop/ambient-redirect-x', config: ALL }, 'pod', 'enrollment is "all"'],

  // what has no network of its own
  [
    'hostNetwork',
    { annotations: enroll('true'), known: { hostNetwork: true }, config: ALL },
    'none',
    "uses the host's network",
  ],
  [
    'hostNetwork proxy',
    { pod: 'istio-system/ztunnel-a', known: { hostNetwork: true } },
    'none',
    "uses the host's network",
  ],
  ['finished', { annotations: enroll('true'), known: { phase: 'Succeeded' } }, 'none', 'has ended: Succeeded'],
  ['failed', { known: { phase: 'Failed' }, config: ALL }, 'none', 'has ended: Failed'],
  ['finished proxy', { pod: 'istio-system/ztunnel-a', known: { phase: 'Failed' } }, 'none', 'has ended: Failed'],
  ...['Pending', 'Running', 'Unknown'].map((phase): [string, Case, string, string] => [
    phase,
    { known: { phase }, config: ALL },
    'pod',
    'enrollment is "all"',
  ]),

  // sidecars
  ['sidecar', { annotations: SIDECAR, config: ALL }, 'none', 'has a sidecar'],
  ['sidecar, opted in', { annotations: { ...SIDECAR, ...enroll('true') } }, 'none', 'has a sidecar'],
  ['sidecar, labelled', { annotations: SIDECAR, labels: AMBIENT_LABEL, config: AGENT }, 'none', 'has a sidecar'],
  [
    'sidecar, which anyone could claim',
    { annotations: SIDECAR, config: { ...ALL, podOverrides: 'none' } },
    'pod',
    'enrollment is "all"',
  ],

  // excluded namespaces come before what the pod wants
  [
    'excluded, opted in',
    { pod: 'kube-system/dns', annotations: enroll('true') },
    'none',
    'namespace kube-system is in excludeNamespaces',
  ],
  [
    'excluded, annotation that does not parse',
    { pod: 'kube-system/dns', annotations: enroll('x') },
    'none',
    'namespace kube-system is in excludeNamespaces',
  ],
  [
    'excluded, capability undeclared',
    { pod: 'kube-system/dns', declared: false },
    'none',
    'namespace kube-system is in excludeNamespaces',
  ],

  // opt-out before opt-in
  [
    'label',
    { labels: NONE_LABEL, annotations: enroll('true'), config: ALL },
    'none',
    'label istio.io/dataplane-mode: none',
  ],
  ['label ambient', { labels: { 'istio.io/dataplane-mode': 'ambient' }, config: ALL }, 'pod', 'enrollment is "all"'],
  ['opted out', { annotations: enroll('false'), config: ALL }, 'none', 'annotation ambient-redirect/enroll: false'],
  [
    'opted out, agent mode',
    { annotations: enroll('false'), config: AGENT, agentAnswer: true },
    'none',
    'annotation ambient-redirect/enroll: false',
  ],

  // opt-in before enrollment
  ['opted in', { annotations: enroll('true') }, 'pod', 'annotation ambient-redirect/enroll: true'],
  [
    'opted in, agent says no',
    { annotations: enroll('true'), config: AGENT, agentAnswer: false },
    'pod',
    'annotation ambient-redirect/enroll: true',
  ],

  // enrollment
  ['annotation, none came', { annotations: null }, 'none', 'no annotation ambient-redirect/enroll'],
  ['annotation, others came', { annotations: { a: 'b' } }, 'none', 'no annotation ambient-redirect/enroll'],
  ['all', { config: ALL }, 'pod', 'enrollment is "all"'],
  ['all, capability undeclared', { declared: false, config: ALL }, 'pod', 'enrollment is "all"'],
  ['agent not asked', { config: AGENT }, 'undecided', 'enrollment is "agent"'],
  ['agent says yes', { config: AGENT, agentAnswer: true }, 'pod', 'the agent said so'],
  ['agent says no', { config: AGENT, agentAnswer: false }, 'none', 'the agent said no'],
  [
    'agent, label of the pod',
    { labels: AMBIENT_LABEL, namespaceLabels: {}, config: AGENT },
    'pod',
    'an enablement selector matches its labels',
  ],
  [
    'agent, label of the namespace',
    { labels: {}, namespaceLabels: AMBIENT_LABEL, config: AGENT },
    'pod',
    'an enablement selector matches its labels',
  ],
  [
    'agent, label of the namespace, not of the pod',
    { labels: NONE_LABEL, namespaceLabels: AMBIENT_LABEL, config: AGENT },
    'none',
    'label istio.io/dataplane-mode: none',
  ],
  [
    'agent, the pod says none and may not',
    { labels: NONE_LABEL, namespaceLabels: AMBIENT_LABEL, config: { ...AGENT, podOverrides: 'none' } },
    'none',
    'no enablement selector matches its labels',
  ],
  [
    'agent, no label',
    { labels: {}, namespaceLabels: {}, config: AGENT },
    'none',
    'no enablement selector matches its labels',
  ],
  [
    'agent, namespace not known',
    { labels: {}, config: AGENT },
    'undecided',
    "the labels of the pod's namespace are not known",
  ],
  [
    'agent, selectors of its own',
    {
      labels: { tier: 'web' },
      namespaceLabels: {},
      config: AGENT,
      selectors: [{ podSelector: { matchExpressions: [{ key: 'tier', operator: 'Exists' }] } }],
    },
    'pod',
    'an enablement selector matches its labels',
  ],
  [
    'agent, excluded namespace with the label',
    { pod: 'kube-system/dns', labels: AMBIENT_LABEL, namespaceLabels: AMBIENT_LABEL, config: AGENT },
    'none',
    'namespace kube-system is in excludeNamespaces',
  ],
  [
    'labels count for the agent only',
    { labels: AMBIENT_LABEL, namespaceLabels: AMBIENT_LABEL },
    'none',
    'no annotation ambient-redirect/enroll',
  ],

  // podOverrides
  [
    'opt-in does not count',
    { annotations: enroll('true'), config: { podOverrides: 'none' } },
    'none',
    'enrollment is "annotation", but podOverrides "none" lets it not count',
  ],
  [
    'opt-out does not count',
    { annotations: enroll('false'), config: { ...ALL, podOverrides: 'exclusions' } },
    'pod',
    'enrollment is "all"',
  ],
  [
    'opt-out label does not count',
    { labels: NONE_LABEL, config: { ...ALL, podOverrides: 'none' } },
    'pod',
    'enrollment is "all"',
  ],
  [
    'nor does one that does not parse',
    { annotations: enroll('x'), config: { ...ALL, podOverrides: 'none' } },
    'pod',
    'enrollment is "all"',
  ],
  [
    'opt-out counts',
    { annotations: enroll('false'), config: { ...ALL, podOverrides: 'enroll' } },
    'none',
    'annotation ambient-redirect/enroll: false',
  ],

  // interfaces
  [
    'secondary network',
    { ifname: 'net1', config: ALL },
    'none',
    'net1 is a secondary interface, and no annotation ambient-redirect/interfaces counts',
  ],
  [
    'secondary network, listed',
    { ifname: 'net1', annotations: interfaces('eth0,net1'), config: ALL },
    'pod',
    'enrollment is "all"',
  ],
  [
    'default network, not listed',
    { annotations: { ...interfaces('net1'), ...enroll('true') } },
    'none',
    'annotation ambient-redirect/interfaces does not list eth0',
  ],
  [
    'listed, but does not count',
    { ifname: 'net1', annotations: interfaces('net1'), config: { ...ALL, podOverrides: 'none' } },
    'none',
    'net1 is a secondary interface, and no annotation ambient-redirect/interfaces counts',
  ],

  // not Kubernetes
  [
    'no pod, annotation',
    { pod: null, declared: false },
    'none',
    'not a Kubernetes pod, and enrollment is "annotation"',
  ],
  ['no pod, agent', { pod: null, config: AGENT }, 'none', 'not a Kubernetes pod, and enrollment is "agent"'],
  ['no pod, all', { pod: null, ifname: 'tap0', config: ALL }, 'pod', 'enrollment is "all"'],
])('%s', (_name, input, role, reason) => {
  expect(decide(input)).toEqual([role, reason]);
});

test('enrollment by annotations that can never come', () => {
  expect(() => decide({ declared: false })).toThrow(
    expect.objectContaining({
      code: 7,
      msg: 'enrollment "annotation" needs the pod annotations',
      details: 'the conflist entry must have "capabilities": {"io.kubernetes.cri.pod-annotations": true}',
    }),
  );
});

test('an annotation that does not parse', () => {
  expect(() => decide({ annotations: enroll('maybe'), config: ALL })).toThrow(
    expect.objectContaining({ code: 7, msg: 'invalid pod annotation ambient-redirect/enroll' }),
  );
});

describe('podIdentity', () => {
  test.each([
    [
      { K8S_POD_NAME: 'p', K8S_POD_NAMESPACE: 'n', K8S_POD_UID: 'u' },
      { name: 'p', namespace: 'n', uid: 'u' },
    ],
    [
      { K8S_POD_NAME: 'p', K8S_POD_NAMESPACE: 'n' },
      { name: 'p', namespace: 'n', uid: '' },
    ],
    [{ K8S_POD_NAME: '', K8S_POD_NAMESPACE: 'n' }, null],
    [{ K8S_POD_NAME: 'p' }, null],
    [{}, null],
  ])('%j', (args, expected) => {
    expect(podIdentity(new Map(Object.entries(args)))).toEqual(expected);
  });
});

test.each([
  ['ztunnel-*', 'ztunnel-abc', true],
  ['ztunnel-*', 'ztunnel-', true],
  ['ztunnel-*', 'xztunnel-a', false],
  ['*', '', true],
  ['a*b*c', 'a-b-b-c', true],
  ['a*b*c', 'a-c-b', false],
  ['ab*ba', 'aba', false],
  ['a*a', 'aa', true],
  ['*b*', 'abc', true],
  ['a*bc*c', 'abcc', true],
  ['a*bc*bc', 'abc', false],
  ['a.c', 'abc', false],
  ['abc', 'abc', true],
  ['abc', 'abcd', false],
])('pattern %s, %s: %s', (pattern, text, expected) => {
  expect(matchesPattern(text, pattern)).toBe(expected);
});
