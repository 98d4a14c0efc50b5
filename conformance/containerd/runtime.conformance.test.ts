// SPDX-License-Identifier: Apache-2.0
// What a real containerd does to a chained plugin, seen by one that only writes it down. The other tests of this
// directory, and the look-alike of libcni, build on it.
import { existsSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Testbed } from '../netns.ts';
import { network } from './networks.ts';
import { type Call, recordedCalls, refusedPod } from './recorder.ts';
import { type Pod, ThrowawayNode } from './throwaway-node.ts';

const annotationsCapability = 'io.kubernetes.cri.pod-annotations';
const annotations = { 'ambient-redirect/enroll': 'true', 'kubernetes.io/config.source': 'api', odd: '"quoted"\nline' };

describe('containerd calls a chained plugin', () => {
  const testbed = Testbed.open();
  let node: ThrowawayNode;
  let calls: string;
  let pod: Pod;

  beforeAll(async () => {
    node = await ThrowawayNode.start(testbed);
    calls = await node.installRecorder('recorder');
    await node.writeConflist(network('bridge', { type: 'recorder', capabilities: { [annotationsCapability]: true } }));
    await node.startContainerd();
    pod = await node.runPod('shop', 'cart', { annotations, port_mappings: [{ container_port: 80, host_port: 8080 }] });
  });
  afterAll(() => testbed.close());

  const callsFor = (id: string): Call[] => recordedCalls(calls).filter((c) => c.environment.CNI_CONTAINERID === id);

  test('once with ADD, with the pod in CNI_ARGS and its annotations in runtimeConfig', () => {
    const [add, ...more] = callsFor(pod.id);
    expect(more).toEqual([]);
    expect(add?.environment).toMatchObject({
      CNI_COMMAND: 'ADD',
      CNI_IFNAME: 'eth0',
      CNI_PATH: '/opt/cni/bin',
      CNI_NETNS: pod.netns,
    });
    expect(add?.environment.CNI_ARGS?.split(';').sort()).toEqual([
      'IgnoreUnknown=1',
      `K8S_POD_INFRA_CONTAINER_ID=${pod.id}`,
      'K8S_POD_NAME=cart',
      'K8S_POD_NAMESPACE=shop',
      `K8S_POD_UID=${pod.config.metadata.uid}`,
    ]);
    expect(add?.stdin).toMatchObject({ cniVersion: '1.0.0', name: 'pods', type: 'recorder' });
    expect(add?.stdin.runtimeConfig).toEqual({ [annotationsCapability]: annotations });
    expect(add?.stdin.prevResult?.ips?.map(({ address }) => address.split('/')[0])).toEqual(pod.addresses);
  });

  test('with null for the annotations of a pod that has none', async () => {
    const plain = await node.runPod('shop', 'plain');
    expect(callsFor(plain.id).map(({ stdin }) => stdin.runtimeConfig)).toEqual([{ [annotationsCapability]: null }]);
    await node.removePod(plain);
  });

  test('not at all for a pod on the host network', async () => {
    const before = recordedCalls(calls).length;
    const config = {
      metadata: { name: 'host', namespace: 'shop', uid: 'host' },
      linux: { cgroup_parent: `/${node.name}/host`, security_context: { namespace_options: { network: 'NODE' } } },
    } as const;
    const { pod_sandbox_id } = await node.cri.call('RunPodSandbox', { config });
    await node.cri.call('StopPodSandbox', { pod_sandbox_id });
    await node.cri.call('RemovePodSandbox', { pod_sandbox_id });
    expect(recordedCalls(calls).length).toBe(before);
  });

  test('with DEL and no prevResult at once when it refused ADD, and reports what it said', async () => {
    const before = recordedCalls(calls).length;
    const refused = node.runPod('shop', refusedPod);
    await expect(refused).rejects.toThrow(/plugin type="recorder" failed \(add\): refused; as the test asks for/);
    const since = recordedCalls(calls).slice(before);
    expect(since.map((c) => [c.environment.CNI_COMMAND, 'prevResult' in c.stdin])).toEqual([
      ['ADD', true],
      ['DEL', false],
    ]);
  });

  test('not again when it was killed and comes back: the pod is as before', async () => {
    const before = recordedCalls(calls).length;
    const web = await node.runContainer(pod, 'web', ['httpd', '-f', '-p', '80', '-h', '/www']);
    await node.killContainerd();
    await node.startContainerd();
    const { status } = await node.cri.call('PodSandboxStatus', { pod_sandbox_id: pod.id });
    expect(status).toMatchObject({ state: 'SANDBOX_READY', network: { ip: pod.addresses[0] } });
    const answer = await node.exec(web, ['wget', '-q', '-O', '-', 'http://127.0.0.1/cgi-bin/whoami']);
    expect(answer).toMatchObject({ code: 0, stdout: expect.stringContaining('"server": "cart"') });
    expect(recordedCalls(calls).length).toBe(before);
  });

  test('with DEL on stop and again, without netns and prevResult, on removal', async () => {
    await node.removePod(pod);
    const since = callsFor(pod.id).filter(({ environment }) => environment.CNI_COMMAND === 'DEL');
    expect(since.map((c) => [c.environment.CNI_NETNS, 'prevResult' in c.stdin])).toEqual([
      [pod.netns, true],
      ['', false],
    ]);
    expect(since.map(({ stdin }) => stdin.runtimeConfig)).toEqual([
      { [annotationsCapability]: annotations },
      { [annotationsCapability]: annotations },
    ]);
  });
});

test('a throwaway node with live pods leaves nothing on the machine when it ends', async () => {
  const testbed = Testbed.open();
  const node = await ThrowawayNode.start(testbed);
  await node.writeConflist(network('bridge'));
  await node.startContainerd();
  const pod = await node.runPod('shop', 'cart');
  await node.runContainer(pod, 'web', ['httpd', '-f', '-p', '80', '-h', '/www']);
  const inside = [readlinkSync(`/proc/${node.pid}/ns/pid`), readlinkSync(`/proc/${node.pid}/ns/net`)];
  const inhabitants = () =>
    readdirSync('/proc').filter((entry) => {
      try {
        return (
          /^\d+$/.test(entry) && ['pid', 'net'].some((ns) => inside.includes(readlinkSync(`/proc/${entry}/ns/${ns}`)))
        );
      } catch {
        return false; // gone, or a zombie
      }
    });
  const leavings = () => ({
    processes: inhabitants(),
    cgroups: node.cgroups(),
    mounts: readFileSync('/proc/self/mounts', 'utf8')
      .split('\n')
      .filter((mount) => mount.includes(testbed.id)),
    libcniCache: existsSync('/var/lib/cni'),
  });
  const libcniCache = existsSync('/var/lib/cni');
  expect(leavings().processes.length).toBeGreaterThan(4);
  expect(leavings().cgroups.length).toBeGreaterThan(0);
  testbed.close();
  expect(leavings()).toEqual({ processes: [], cgroups: [], mounts: [], libcniCache });
});
