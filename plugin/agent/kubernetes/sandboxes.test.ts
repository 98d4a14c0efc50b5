// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { netnsOf } from './cri.ts';
import { identitiesOf, projectPod } from './pods.ts';
import { podOfCgroup } from './sandboxes.ts';

const UID = '79080852-c18b-4db4-af3a-bc96195a6492';
const HASH = 'c0ffee00c0ffee00c0ffee00c0ffee00';
const ID = 'ab'.repeat(32);

test.each([
  [`11:pids:/kubepods/burstable/pod${UID}/${ID}\n`, UID],
  [`0::/kubepods/pod${UID}/${ID}\n`, UID],
  [
    `0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod${UID.replaceAll('-', '_')}.slice/cri-containerd-${ID}.scope\n`,
    UID,
  ],
  [`0::/kubepods.slice/kubepods-pod${UID.replaceAll('-', '_')}.slice/crio-${ID}.scope\n`, UID],
  [`0::/kubepods.slice/kubepods-pod${UID.replaceAll('-', '_')}.slice:cri-containerd:${ID}\n`, null],
  [`0::/kubepods/burstable/pod${HASH}/${ID}\n`, HASH],
  // A pod's cgroup without a container is none of its processes.
  [`0::/kubepods/burstable/pod${UID}\n`, null],
  ['0::/system.slice/containerd.service\n', null],
  ['0::/user.slice/podman/x\n', null],
])('%j', (text, uid) => {
  expect(podOfCgroup(text)).toEqual(uid === null ? null : { uid, containerId: ID });
});

test.each([
  [
    { pid: 5, runtimeSpec: { linux: { namespaces: [{ type: 'network', path: '/var/run/netns/cni-1' }] } } },
    '/var/run/netns/cni-1',
  ],
  [{ pid: 5, runtimeSpec: { linux: { namespaces: [{ type: 'network' }] } } }, '/proc/5/ns/net'],
  [{ pid: 5 }, '/proc/5/ns/net'],
  // The host's: there is no namespace of its own.
  [{ pid: 5, runtimeSpec: { linux: { namespaces: [{ type: 'pid' }] } } }, null],
  [{}, null],
])('what the runtime says of a sandbox: %j', (info, path) => {
  expect(netnsOf(JSON.stringify(info))).toBe(path);
});

test('of a pod only what somebody looks at is kept', () => {
  const pod = projectPod({
    metadata: {
      uid: UID,
      namespace: 'shop',
      name: 'etcd',
      labels: { app: 'etcd' },
      annotations: {
        'kubernetes.io/config.hash': HASH,
        'kubernetes.io/config.mirror': HASH,
        'kubectl.kubernetes.io/last-applied-configuration': '{"a": "\\"\\n"}'.repeat(1_000),
      },
    },
    spec: { serviceAccountName: 'etcd', containers: [] },
    status: { phase: 'Running', podIP: '10.0.0.1', podIPs: [{ ip: '10.0.0.1' }, { ip: 'fd00::1' }] },
  });
  expect(pod).toEqual({
    uid: UID,
    namespace: 'shop',
    name: 'etcd',
    labels: new Map([['app', 'etcd']]),
    annotations: new Map([
      ['kubernetes.io/config.hash', HASH],
      ['kubernetes.io/config.mirror', HASH],
    ]),
    serviceAccount: 'etcd',
    hostNetwork: false,
    phase: 'Running',
    ips: ['10.0.0.1', 'fd00::1'],
    deleting: false,
    owners: [],
  });
  expect(identitiesOf(pod)).toEqual([UID, HASH]);
});

test.each([
  [{}, 'default'],
  [{ serviceAccountName: '' }, 'default'],
  [{ serviceAccountName: 'web' }, 'web'],
])('spec %j: the service account is that by which ztunnel knows the pod: %s', (spec, wanted) => {
  expect(projectPod({ metadata: { uid: UID, namespace: 'shop', name: 'fixed' }, spec }).serviceAccount).toBe(wanted);
});
