// SPDX-License-Identifier: Apache-2.0
// proxy_ingress: what a proxy receives. BPF_PROG_TEST_RUN is not at a tc ingress hook, so bpf_sk_assign refuses every
// socket there; what it does at the hook is in hooks.test.ts.

import { describe, expect, test } from 'vitest';
import { ACK, type End, mac, macText, SYN, tcpFrame, type Wire } from './frames.ts';
import { words } from './lookup.ts';
import {
  APP,
  addresses,
  type Datapath,
  DEAF,
  DNS,
  drop,
  FOREIGN_MARK,
  families,
  HBONE,
  HTTP,
  MARKS,
  NEW_MAC,
  OLD_MAC,
  type Outcome,
  pass,
  SIGN,
} from './node.ts';
import { notTcp, readable, tagged, unreadable } from './parse-cases.ts';

/** `assigned`: what becomes of a packet that a listener is picked for. */
export function proxyIngress(name: string, datapath: () => Datapath, assigned: Outcome): void {
  const wire = (meaning: number, destination = OLD_MAC): Wire => ({ source: datapath().signed(meaning), destination });
  const check = (frame: Uint8Array, outcome: Outcome) => datapath().check('proxy_ingress', frame, outcome);
  const port = () => datapath().node.port();
  /** Every signed packet gets the mark that makes its route local, dropped ones too. */
  const marked = (outcome: Outcome): Outcome => ({ ...outcome, mark: MARKS.tproxy });
  const noListener = marked(drop('drop_no_listener'));

  describe(`proxy_ingress, ${name}`, () => {
    describe.each(families)('IPv%i', (family) => {
      const its = addresses[family];
      const tuple = (server = HTTP): [End, End] => [
        { address: its.podSilent, port: port() },
        { address: its.outsideSilent, port: server },
      ];
      const sign = (meaning: number, flags = SYN, server = HTTP) =>
        tcpFrame(wire(meaning), ...tuple(server), { flags });

      test('an unsigned frame is left alone', () =>
        check(tcpFrame({ source: OLD_MAC, destination: OLD_MAC }, ...tuple()), pass(null, FOREIGN_MARK)));
      test.each([0, 1, 2, 3, 4])('a source that differs from the sign in byte %i is left alone', (byte) => {
        const source = mac(datapath().signed(SIGN.OUTBOUND));
        source.writeUInt8((source[byte] ?? 0) ^ 0x10, byte);
        return check(tcpFrame({ source: macText(source), destination: OLD_MAC }, ...tuple()), pass(null, FOREIGN_MARK));
      });

      test.each([SIGN.ESTABLISHED, SIGN.ICMP])('sign %i: left to TCP’s own lookup, marked', (meaning) =>
        check(sign(meaning, ACK), marked(pass('proxy_delivered'))),
      );
      test('sign of an ICMP error: any frame', () =>
        check(
          notTcp(family, wire(SIGN.ICMP), ...tuple())[0]?.frame ?? Buffer.alloc(0),
          marked(pass('proxy_delivered')),
        ));

      test('what is not TCP and signed for a listener: dropped', async () => {
        const all = [notTcp, unreadable].flatMap((cases) => cases(family, wire(SIGN.OUTBOUND), ...tuple()));
        const frames = [...all, ...tagged(wire(SIGN.INBOUND), ...tuple())].filter(({ name }) => !name.includes('SYN'));
        for (const { frame } of frames) await check(frame, marked(drop('drop_malformed')));
      });

      test.each(readable(family, { source: OLD_MAC, destination: OLD_MAC }, ...fixed(family), SYN))(
        'a SYN with $name: the listener',
        ({ frame }) =>
          check(
            Buffer.concat([frame.subarray(0, 6), mac(datapath().signed(SIGN.OUTBOUND)), frame.subarray(12)]),
            marked(assigned),
          ),
      );

      describe.each([
        { name: 'outbound', meaning: SIGN.OUTBOUND, flags: SYN, listener: 'outbound', server: HTTP },
        { name: 'inbound', meaning: SIGN.INBOUND, flags: SYN, listener: 'inboundPlaintext', server: APP },
        { name: 'inbound HBONE', meaning: SIGN.INBOUND, flags: SYN, listener: 'inboundHBONE', server: HBONE },
        { name: 'cookie, outbound', meaning: SIGN.COOKIE_OUTBOUND, flags: ACK, listener: 'outbound', server: HTTP },
        {
          name: 'cookie, inbound',
          meaning: SIGN.COOKIE_INBOUND,
          flags: ACK,
          listener: 'inboundPlaintext',
          server: APP,
        },
        {
          name: 'cookie, inbound HBONE',
          meaning: SIGN.COOKIE_INBOUND,
          flags: ACK,
          listener: 'inboundHBONE',
          server: HBONE,
        },
        { name: 'a meaning to come', meaning: 99, flags: SYN, listener: 'inboundPlaintext', server: APP },
      ] as const)('$name', ({ meaning, flags, listener, server }) => {
        const deaf = { outbound: DEAF, inboundPlaintext: DEAF, inboundHBONE: HBONE };
        const only = (): Parameters<Datapath['old']>[0] => {
          const { ports } = datapath().old();
          return { ports: { ...deaf, [listener]: ports[listener] } };
        };

        test('needs no other listener than its own', async () => {
          const d = datapath();
          d.proxies([d.old(only())]);
          await check(sign(meaning, flags, server), marked(assigned));
        });
        test('its port is not wanted: dropped', async () => {
          const d = datapath();
          d.proxies([
            d.old({
              ports: listener === 'inboundHBONE' ? { inboundHBONE: 0, inboundPlaintext: 0 } : { [listener]: 0 },
            }),
          ]);
          await check(sign(meaning, flags, server), noListener);
        });
        test('nobody listens: dropped', async () => {
          const d = datapath();
          const port = listener === 'inboundHBONE' ? DEAF : server;
          d.proxies([d.old({ ports: { [listener]: DEAF } })]);
          await check(sign(meaning, flags, port), noListener);
        });
      });

      test.each([
        [SIGN.DNS_TCP, SYN],
        [SIGN.COOKIE_DNS, ACK],
      ])('DNS over TCP, sign %i: needs no other listener than its own', async (meaning, flags) => {
        const d = datapath();
        d.proxies([d.old({ ports: { outbound: DEAF, inboundPlaintext: DEAF, inboundHBONE: DEAF, dns: DNS } })]);
        await check(sign(meaning, flags, 53), marked(assigned));
        d.proxies([d.old({ ports: { dns: DEAF } })]);
        await check(sign(meaning, flags, 53), noListener);
      });

      test('no word is left for the socket lookup', async () => {
        const before = words(datapath());
        await check(sign(SIGN.OUTBOUND), marked(assigned));
        expect(words(datapath())).toBe(before);
      });

      test('the ports are those of the proxy that the frame is addressed to', async () => {
        const d = datapath();
        d.proxies([d.new({ ports: { outbound: DEAF } }), d.old()]);
        await check(sign(SIGN.OUTBOUND), marked(assigned));
        await check(tcpFrame(wire(SIGN.OUTBOUND, NEW_MAC), ...tuple()), noListener);
      });

      test.each([0, 1, 2, 3, 4, 5])('the frame’s destination is no proxy’s MAC, byte %i: dropped', (byte) => {
        const destination = mac(OLD_MAC);
        destination.writeUInt8((destination[byte] ?? 0) ^ 0x20, byte);
        return check(tcpFrame(wire(SIGN.OUTBOUND, macText(destination)), ...tuple()), noListener);
      });

      test('no proxy, no record of proxies: dropped', async () => {
        datapath().proxies([]);
        await check(sign(SIGN.OUTBOUND), noListener);
        datapath().forgetProxies();
        await check(sign(SIGN.OUTBOUND), noListener);
      });

      test('a SYN for a tuple in TIME_WAIT is left to TCP; an ACK for it is not', async () => {
        const { client, server } = await datapath().node.timeWait(family);
        // TPROXY, which takes the place of bpf_sk_assign, recycles TIME_WAIT itself.
        const left = name.startsWith('without') ? assigned : pass('proxy_time_wait');
        await check(tcpFrame(wire(SIGN.OUTBOUND), client, server), marked(left));
        await check(tcpFrame(wire(SIGN.COOKIE_OUTBOUND), client, server, { flags: ACK }), marked(assigned));
      });

      test('a SYN for the tuple of a living connection gets the listener', async () => {
        const { node } = datapath();
        const { client, server } = await node.connect(node.far, its.pod, its.outsideAtOld, HTTP);
        await check(tcpFrame(wire(SIGN.OUTBOUND), client, server), marked(assigned));
      });
    });
  });
}

/** A tuple that no socket has. */
function fixed(family: (typeof families)[number]): [End, End] {
  return [
    { address: addresses[family].podSilent, port: 19_996 },
    { address: addresses[family].outsideSilent, port: HTTP },
  ];
}
