// SPDX-License-Identifier: Apache-2.0
// What BPF_PROG_TEST_RUN cannot show of the in-pod contract: packets that a TCP socket has sent, and packets that none has.

import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Endpoint } from '../../conformance/e2e/endpoint.ts';
import type { Namespace } from '../../conformance/netns.ts';
import { until } from '../../conformance/netns.ts';
import type { Direction, ProgramName } from '../../plugin/native.ts';
import { type End, ETH_P_IPV6, RST, SYN, tcpFrame } from './frames.ts';
import { refusal } from './gso.ts';
import {
  APP,
  its as addresses,
  DEAF,
  InPodDatapath,
  InPodNode,
  out,
  own,
  POD_MAC,
  PROXY_MARK,
  within,
} from './in-pod-node.ts';
import { families } from './node.ts';

/** Below a SYN's first retransmission. */
const ONE_SYN = 600;

let node: InPodNode;
let datapath: InPodDatapath;
let links = 0;
/** Somebody whose packets the node forwards, which takes the socket that sent them away from them. */
let outer: Namespace;
let caller: Endpoint;
const outerAddress = { 4: '10.82.0.2', 6: 'fd82::2' } as const;

beforeAll(async () => {
  node = await InPodNode.open();
  outer = node.testbed.namespace('outer');
  node.testbed.veth(
    { namespace: node.node, ifname: 'outer0', addresses: ['10.82.0.1/24', 'fd82::1/64'] },
    {
      namespace: outer,
      ifname: 'eth0',
      addresses: ['10.82.0.2/24', 'fd82::2/64'],
      gateways: ['10.82.0.1', 'fd82::1'],
    },
  );
  node.node.run(['sysctl', '-qw', 'net.ipv4.ip_forward=1', 'net.ipv6.conf.all.forwarding=1']);
  caller = new Endpoint(node.testbed, outer, 'outer');
  datapath = new InPodDatapath(node, new Set(), 'hooks');
});
afterAll(() => node?.close());
beforeEach(() => {
  datapath.reset();
  datapath.enrol({ id: node.hostIfindex });
});

/** Until the node is closed. */
function attach(namespace: Namespace, ifindex: number, direction: Direction, fd: number): void {
  const { native } = node;
  const netns = native.openNetns(namespace.path);
  native.attachTcx(netns, ifindex, direction, fd, 'first', join(datapath.directory, `link-${links++}`));
  native.close(fd);
  native.close(netns);
}

function attachStubs(): void {
  const stub = (program: 'inpod_egress' | 'inpod_ingress') =>
    node.native.loadStub(datapath.state, program, node.hostIfindex, 'drop');
  attach(node.pod, node.podIfindex, 'egress', stub('inpod_egress'));
  attach(node.pod, node.podIfindex, 'ingress', stub('inpod_ingress'));
}

function counted(program: ProgramName, reason: string): bigint {
  return datapath
    .counters(node.hostIfindex)
    .filter((counter) => counter.program === program && counter.reason === reason)
    .reduce((sum, { packets }) => sum + packets, 0n);
}

/** A SYN by a raw socket with the mark, which takes more than the mark to be let by. */
function rawSyn(from: End, to: End): void {
  const six = to.address.includes(':');
  const segment = tcpFrame(out, from, to, { flags: SYN }).subarray(six ? 54 : 34);
  const family = six ? 'AF_INET6' : 'AF_INET';
  node.pod.run([
    'python3',
    '-c',
    `import socket
raw = socket.socket(socket.${family}, socket.SOCK_RAW, socket.IPPROTO_TCP)
raw.setsockopt(socket.SOL_SOCKET, 36, ${PROXY_MARK})
raw.bind(("${from.address}", 0))
raw.sendto(bytes.fromhex("${segment.toString('hex')}"), ("${to.address}", 0))`,
  ]);
}

describe('inpod_guard alone: what its own program has not seen', () => {
  beforeAll(() => {
    const path = join(datapath.directory, 'programs', datapath.tag, 'inpod_guard');
    attach(node.node, node.hostIfindex, 'ingress', node.native.openProgram(path));
  });

  describe.each(families)('IPv%i', (family) => {
    const its = addresses[family];
    const connect = (mark: number) =>
      node.endpoint.connect(its.node, APP, { source: its.pod, sourcePort: node.port(), mark, timeout: ONE_SYN });
    const stopped = async (send: () => unknown) => {
      const before = counted('inpod_guard', 'drop_unjudged');
      await send();
      await until('drop_unjudged', () => counted('inpod_guard', 'drop_unjudged') > before);
    };

    test('a TCP socket with the mark gets out', async () => {
      await node.endpoint.exchange(await connect(PROXY_MARK), 10_000);
    });
    test('one without it does not', () => stopped(() => expect(connect(0)).rejects.toThrow('ETIMEDOUT')));
    test('nor a raw socket with it', () =>
      stopped(() => rawSyn({ address: its.pod, port: node.port() }, { address: its.node, port: APP })));
    test('nor, where cgroups are checked, one that no packet of the proxy’s cgroup came from', async () => {
      node.native.setCheckCgroups(datapath.state, true);
      await stopped(() => expect(connect(PROXY_MARK)).rejects.toThrow('ETIMEDOUT'));
    });
  });
});

describe('with the pod’s own programs', () => {
  beforeAll(attachStubs);

  describe.each(families)('IPv%i', (family) => {
    const its = addresses[family];
    const connect = (mark: number) =>
      node.endpoint.connect(its.node, APP, { source: its.pod, sourcePort: node.port(), mark, timeout: ONE_SYN });

    test('where cgroups are checked: the proxy’s own socket gets out, however often', async () => {
      const { native, cgroup } = node;
      native.setCheckCgroups(datapath.state, true);
      native.putProxyCgroup(datapath.state, cgroup);
      const connection = await connect(PROXY_MARK);
      await node.endpoint.exchange(connection, 10_000);
      // What showed it is kept with the socket.
      native.deleteProxyCgroup(datapath.state, cgroup);
      await node.endpoint.exchange(connection, 10_000);
    });

    describe('closedAction reset', () => {
      const deaf = { outbound: DEAF, inboundPlaintext: DEAF };
      beforeEach(() => datapath.enrol({ id: node.hostIfindex, flags: ['STRICT', 'CLOSED_RESET'], ports: deaf }));

      test('from outside: the RST, which no socket sends, leaves the pod', async () => {
        const before = ['reset_no_listener', 'pass_bypass'].map((reason, i) =>
          counted(i === 0 ? 'inpod_ingress' : 'inpod_egress', reason),
        );
        await expect(caller.connect(its.pod, APP, { sourcePort: node.port(), timeout: ONE_SYN })).rejects.toThrow(
          'ECONNREFUSED',
        );
        expect(counted('inpod_ingress', 'reset_no_listener') - (before[0] ?? 0n)).toBe(1n);
        expect(counted('inpod_egress', 'pass_bypass') - (before[1] ?? 0n)).toBe(1n);
      });

      test('from the pod: the RST comes back into it', async () => {
        const before = counted('inpod_egress', 'reset_no_listener');
        await expect(connect(0)).rejects.toThrow('ECONNREFUSED');
        expect(counted('inpod_egress', 'reset_no_listener') - before).toBe(1n);
      });

      describe.each(['plainly', 'behind options'])(
        'a segment that is still to be cut, %s, is answered by one RST',
        (how) => {
          const answer = (wire: { source: string; destination: string }, from: End, to: End) =>
            tcpFrame(wire, from, to, { flags: RST, seq: 0x01020304, ack: 0, window: 0 }, { id: 0, dontFragment: true });

          test('from the pod', async () => {
            const [from, to] = [
              { address: its.pod, port: node.port() },
              { address: its.outside, port: 80 },
            ];
            // A flow of a proxy that died since without a word.
            datapath.enrol({ id: node.hostIfindex });
            await datapath.check('inpod_egress', tcpFrame(out, from, to), expectLooped(), { id: node.hostIfindex });
            datapath.enrol({ id: node.hostIfindex, flags: ['STRICT', 'CLOSED_RESET'], ports: deaf });
            expect(refusal(node.pod, 'eth0', out, from, to, how !== 'plainly')).toEqual({
              kind: 0,
              frame: answer(own, to, from).toString('hex'),
            });
            expect(counted('inpod_egress', 'reset_no_listener')).toBe(1n);
          });

          test('to the pod', async () => {
            const [from, to] = [
              { address: outerAddress[family], port: node.port() },
              { address: its.pod, port: APP },
            ];
            const wire = { source: outer.mac('eth0'), destination: node.node.mac('outer0') };
            datapath.enrol({ id: node.hostIfindex });
            const redirected = { verdict: -1, reason: 'redirected_inbound', mark: 0 };
            await datapath.check('inpod_ingress', tcpFrame(within, from, to), redirected, { id: node.hostIfindex });
            datapath.enrol({ id: node.hostIfindex, flags: ['STRICT', 'CLOSED_RESET'], ports: deaf });
            expect(refusal(outer, 'eth0', wire, from, to, how !== 'plainly')).toEqual({
              kind: 0,
              frame: forwarded(answer({ source: wire.destination, destination: wire.source }, to, from)),
            });
            expect(counted('inpod_ingress', 'reset_no_listener')).toBe(1n);
          });
        },
      );
    });
  });
});

/** A router has taken one from its time to live. In hex. */
function forwarded(frame: Buffer): string {
  if (frame.readUInt16BE(12) === ETH_P_IPV6) frame.writeUInt8(frame.readUInt8(21) - 1, 21);
  else {
    frame.writeUInt8(frame.readUInt8(22) - 1, 22);
    const sum = frame.readUInt16BE(24) + 0x100;
    frame.writeUInt16BE((sum & 0xffff) + (sum >> 16), 24);
  }
  return frame.toString('hex');
}

function expectLooped() {
  return { verdict: 7, reason: 'redirected_outbound', destination: POD_MAC, source: POD_MAC, mark: 0xa3b10400 };
}
