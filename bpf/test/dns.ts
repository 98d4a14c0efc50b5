// SPDX-License-Identifier: Apache-2.0
// DNS over UDP, to the proxy's listener and back; and over TCP, whose SYN goes to another port.

import { describe, test } from 'vitest';
import {
  ACK,
  type End,
  fragmentHeader,
  type IPFields,
  IPPROTO_UDP,
  ipFrame,
  ipPacket,
  SYN,
  tcpFrame,
  udpDatagram,
  type Wire,
} from './frames.ts';
import {
  addresses,
  type Datapath,
  DEAD,
  DEAF,
  DNS,
  DNS_OF,
  drop,
  families,
  fromPod,
  fromProxy,
  HTTP,
  type Outcome,
  POD_MAC,
  pass,
  SIGN,
  VERDICT,
} from './node.ts';

const PORT = 53;
const UDP_CHECKSUM = 6;

/** A DNS message's first bytes: its transaction id, and something behind it. */
function message(id: number): Buffer {
  return Buffer.from([id >> 8, id & 0xff, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 97, 0, 0, 1, 0, 1]);
}

function frame(wire: Wire, from: End, to: End, payload: Uint8Array, fields: IPFields = {}): Buffer {
  return ipFrame(wire, ipPacket(from.address, to.address, IPPROTO_UDP, udpDatagram(from, to, payload), fields));
}

export function dns(datapath: () => Datapath): void {
  const capture = (...flags: string[]) => datapath().enrol({ flags: ['DNS', ...flags] });
  const resolving = (fields: Parameters<Datapath['old']>[0] = {}) =>
    datapath().old({ ...fields, ports: { dns: DNS, ...fields.ports } });
  const egress = (query: Buffer, outcome: Outcome) => datapath().check('pod_egress', query, outcome);
  const answer = (from: Buffer, outcome: Outcome) => datapath().check('proxy_egress', from, outcome);

  describe.each(families)('DNS, IPv%i', (family) => {
    const its = addresses[family];
    const resolver = { address: its.outside, port: PORT };
    const client = (): End => ({ address: its.pod, port: datapath().node.port() });
    const signed = (proxy = datapath().old()): Wire => ({
      source: datapath().signed(SIGN.DNS),
      destination: proxy.mac,
    });
    /** What becomes of a query: the same datagram, to the listener's port. */
    const captured = (from: End, to: End, id: number, proxy = datapath().old()): Outcome => ({
      ...datapath().toProxy('dns_captured', proxy, SIGN.DNS),
      frame: frame(signed(proxy), from, { ...to, port: DNS }, message(id)),
    });
    const notTcp = pass('pass_not_tcp');
    const ask = (from: End, to: End = resolver, id = 7) => frame(fromPod, from, to, message(id));

    test('a query goes to the proxy’s listener', async () => {
      capture();
      datapath().proxies([resolving()]);
      const from = client();
      await egress(ask(from), captured(from, resolver, 7));
    });

    test('only to port 53, and only where it is asked for', async () => {
      datapath().proxies([resolving()]);
      await egress(ask(client()), notTcp);
      capture();
      await egress(ask(client(), { ...resolver, port: PORT + 1 }), notTcp);
      await egress(frame(fromPod, { ...client(), port: PORT }, { ...resolver, port: 5353 }, message(1)), notTcp);
    });

    test('a listener of the other family alone: dropped', async () => {
      capture();
      datapath().proxies([resolving({ ports: { dns: DNS_OF[family === 4 ? 6 : 4] } })]);
      await egress(ask(client()), drop('drop_no_listener'));
      datapath().proxies([resolving({ ports: { dns: DNS_OF[family] } })]);
      const from = client();
      await egress(ask(from), {
        ...captured(from, resolver, 7),
        frame: frame(signed(), from, { ...resolver, port: DNS_OF[family] }, message(7)),
      });
    });

    test('draining, excluded or spoofed: not captured', async () => {
      datapath().proxies([resolving()]);
      capture('DRAINING');
      await egress(ask(client()), pass('pass_draining'));
      capture();
      await egress(ask({ address: its.outsideAtOld, port: 1000 }), drop('drop_spoofed_source'));
      const { node, state } = datapath();
      const value = Uint8Array.from({ length: 16 }, (_, index) => (index === 1 ? PORT : 0));
      node.native.putExclusions(state, node.ifindex.pod, [
        { kind: 'outbound_port', value, length: 16, excluded: true },
      ]);
      await egress(ask(client()), pass('pass_excluded_port'));
    });

    test('a query too short for a transaction id: dropped', async () => {
      capture();
      datapath().proxies([resolving()]);
      await egress(frame(fromPod, client(), resolver, Buffer.from([1])), drop('drop_malformed'));
    });

    test('what the listener sends that answers nothing is left alone', async () => {
      datapath().proxies([resolving()]);
      const from = { address: its.outsideAtOld, port: DNS };
      await answer(frame(fromProxy, from, client(), Buffer.from([1])), notTcp);
      await answer(frame(fromProxy, from, client(), message(8)), notTcp);
    });

    test('in fragments: not captured', async () => {
      capture();
      datapath().proxies([resolving()]);
      const more: IPFields = family === 4 ? { moreFragments: true } : { extensions: [fragmentHeader(0, true)] };
      await egress(frame(fromPod, client(), resolver, message(2), more), notTcp);
    });

    test('no listener, none wanted, no device, no proxy: by the policy', async () => {
      const without = [
        [datapath().old()],
        [resolving({ ports: { dns: DEAF } })],
        [resolving({ hostIfindex: DEAD })],
        [resolving({ nsid: -1 })],
        [],
      ];
      for (const proxies of without) {
        datapath().proxies(proxies);
        capture();
        await egress(ask(client()), drop('drop_no_listener'));
        capture('POLICY_OPEN');
        await egress(ask(client()), pass('pass_failure_policy_open'));
      }
      datapath().forgetProxies();
      await egress(ask(client()), pass('pass_failure_policy_open'));
      capture();
      await egress(ask(client()), drop('drop_no_listener'));
    });

    test('the newest proxy that resolves takes it', async () => {
      capture();
      const from = client();
      const newer = (dns: number) => datapath().new({ ports: { dns } });
      for (const dns of [0, DEAF]) {
        datapath().proxies([newer(dns), resolving()]);
        await egress(ask(from), captured(from, resolver, 7));
      }
      datapath().proxies([newer(DNS), resolving()]);
      await egress(ask(from), captured(from, resolver, 7, datapath().new()));
    });

    test('an answer comes from the resolver that was asked, told by client, port and transaction id', async () => {
      capture();
      datapath().proxies([resolving()]);
      const from = client();
      const other = { address: its.outsideAtOld, port: PORT };
      await egress(ask(from, resolver, 8), captured(from, resolver, 8));
      await egress(ask(from, other, 9), captured(from, other, 9));
      const listener = { address: its.host, port: DNS };
      const answered = (to: End, id: number): Outcome => ({
        verdict: VERDICT.REDIRECT,
        reason: 'dns_answered',
        destination: POD_MAC,
        mark: 0,
        frame: frame({ source: fromProxy.source, destination: POD_MAC }, to, from, message(id)),
      });
      await answer(frame(fromProxy, listener, from, message(8)), answered(resolver, 8));
      await answer(frame(fromProxy, listener, from, message(9)), answered(other, 9));
      // Of a question that nobody asked.
      await answer(frame(fromProxy, listener, from, message(10)), notTcp);
      await answer(frame(fromProxy, listener, { ...from, port: 999 }, message(8)), notTcp);
      await answer(frame(fromProxy, listener, { ...from, address: its.podSilent }, message(8)), notTcp);
      // Of another server, and to a pod that is not there.
      await answer(frame(fromProxy, { ...listener, port: DNS + 1 }, from, message(8)), notTcp);
      await answer(frame(fromProxy, listener, { ...from, address: its.outside }, message(8)), notTcp);
      datapath().proxies([datapath().old()]);
      await answer(frame(fromProxy, listener, from, message(8)), notTcp);
    });

    test('an answer in fragments: all of them come from the resolver', async () => {
      capture();
      datapath().proxies([resolving()]);
      const from = client();
      await egress(ask(from, resolver, 11), captured(from, resolver, 11));
      const payload = Buffer.concat([message(11), Buffer.alloc(45, 3)]);
      const parts = (wire: Wire, source: End): Buffer[] => {
        const datagram = udpDatagram(source, from, payload);
        return [0, 32, 56].map((start, index, starts) => {
          const end = starts[index + 1] ?? datagram.length;
          const more = end < datagram.length;
          const fields: IPFields =
            family === 4
              ? { fragmentOffset: start, moreFragments: more }
              : { extensions: [fragmentHeader(start, more)] };
          return ipFrame(
            wire,
            ipPacket(source.address, from.address, IPPROTO_UDP, datagram.subarray(start, end), fields),
          );
        });
      };
      const sent = parts(fromProxy, { address: its.host, port: DNS });
      const wanted = parts({ source: fromProxy.source, destination: POD_MAC }, resolver);
      for (const [index, one] of sent.entries()) {
        await answer(one, {
          verdict: VERDICT.REDIRECT,
          reason: 'dns_answered',
          destination: POD_MAC,
          mark: 0,
          frame: wanted[index] ?? one,
        });
      }
    });

    test('over TCP: a SYN to port 53 goes to the DNS listener, the ports for other connections do not matter', async () => {
      capture('NO_OUTBOUND');
      datapath().proxies([resolving({ ports: { outbound: DEAF } })]);
      const from = client();
      await egress(
        tcpFrame(fromPod, from, resolver, { flags: SYN }),
        datapath().toProxy('dns_captured', datapath().old(), SIGN.DNS_TCP),
      );
      // Its further segments find the proxy's DNS listener too when the connection is gone.
      await egress(
        tcpFrame(fromPod, from, resolver, { flags: ACK }),
        datapath().toProxy('to_proxy_orphaned', datapath().old(), SIGN.COOKIE_DNS),
      );
      capture();
      await egress(tcpFrame(fromPod, client(), { ...resolver, port: HTTP }, { flags: SYN }), drop('drop_no_listener'));
    });
  });

  test('DNS, IPv4: a query without a checksum has none afterwards', async () => {
    capture();
    datapath().proxies([resolving()]);
    const from = { address: addresses[4].pod, port: datapath().node.port() };
    const resolver = { address: addresses[4].outside, port: PORT };
    const without = (bytes: Buffer) => {
      bytes.writeUInt16BE(0, 14 + 20 + UDP_CHECKSUM);
      return bytes;
    };
    const wire = { source: datapath().signed(SIGN.DNS), destination: datapath().old().mac };
    await egress(without(frame(fromPod, from, resolver, message(12))), {
      ...datapath().toProxy('dns_captured', datapath().old(), SIGN.DNS),
      frame: without(frame(wire, from, { ...resolver, port: DNS }, message(12))),
    });
  });
}
