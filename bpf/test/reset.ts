// SPDX-License-Identifier: Apache-2.0
// closedAction reset: every byte of the RST that a segment is made into. TCP sees to it that a RST with a wrong number is
// ignored, so that "connection refused" in conformance/e2e is the other half of this.

import { describe, test } from 'vitest';
import {
  ACK,
  authenticationHeader,
  type End,
  FIN,
  fragmentHeader,
  type IPFields,
  IPPROTO_DSTOPTS,
  IPPROTO_HOPOPTS,
  IPPROTO_ROUTING,
  macText,
  optionsHeader,
  PSH,
  RST,
  SYN,
  type TcpFields,
  tcpFrame,
  type Wire,
} from './frames.ts';
import {
  APP,
  addresses,
  type Datapath,
  DEAF,
  drop,
  type Family,
  families,
  fromPod,
  fromProxy,
  GATEWAY_MAC,
  HTTP,
  MARKS,
  type Outcome,
  POD_MAC,
  SIGN,
  toPod,
  VERDICT,
} from './node.ts';

const SEQ = 0xfffffffe;
/** MSS, SACK permitted, timestamps, window scale: what Linux sends. */
const LINUX_OPTIONS = Buffer.from('020405b40402080a00112233000000000103030a', 'hex');
/** A Fast Open cookie (RFC 7413) and padding. */
const FAST_OPEN = Buffer.from('220a00112233445566770101', 'hex');

/** What came, by name, and the acknowledgement that answers it. */
const SYNS: { name: string; tcp: TcpFields; acknowledges: number }[] = [
  { name: 'a bare SYN', tcp: {}, acknowledges: 1 },
  { name: 'a SYN with options', tcp: { tcpOptions: LINUX_OPTIONS }, acknowledges: 1 },
  { name: 'a SYN with the longest options', tcp: { tcpOptions: Buffer.alloc(40, 1) }, acknowledges: 1 },
  { name: 'a SYN with ECN flags', tcp: { flags: SYN | 0xc0 }, acknowledges: 1 },
  { name: 'a SYN with FIN', tcp: { flags: SYN | FIN }, acknowledges: 2 },
  { name: 'a SYN with an odd payload', tcp: { payload: Buffer.from('odd') }, acknowledges: 4 },
  {
    name: 'a SYN with a cookie and a full payload',
    tcp: { tcpOptions: FAST_OPEN, payload: Buffer.alloc(1400, 0xa5) },
    acknowledges: 1401,
  },
];

const HEADERS: Record<Family, { name: string; ip: IPFields }[]> = {
  4: [
    { name: 'no IP options', ip: {} },
    { name: 'four bytes of IP options', ip: { options: Buffer.from([1, 1, 1, 0]) } },
    { name: 'the longest IP options', ip: { options: Buffer.alloc(40, 1) } },
  ],
  6: [
    { name: 'no extension headers', ip: {} },
    { name: 'a destination options header', ip: { extensions: [optionsHeader(IPPROTO_DSTOPTS)] } },
    { name: 'an atomic fragment header', ip: { extensions: [fragmentHeader(0, false)] } },
    {
      name: 'five extension headers',
      ip: {
        extensions: [
          optionsHeader(IPPROTO_HOPOPTS, 2),
          optionsHeader(IPPROTO_ROUTING, 4),
          fragmentHeader(0, false),
          authenticationHeader(),
          optionsHeader(IPPROTO_DSTOPTS, 30),
        ],
      },
    },
  ],
};

/** The RST of `from` to `to`, as the kernel's own stack sends it. */
function rst(wire: Wire, from: End, to: End, tcp: TcpFields): Buffer {
  return tcpFrame(wire, from, to, { window: 0, ...tcp }, { id: 0, dontFragment: true });
}

export function reset(datapath: () => Datapath): void {
  const port = () => datapath().node.port();
  const ends = (family: Family): [pod: End, outside: End] => [
    { address: addresses[family].pod, port: port() },
    { address: addresses[family].outside, port: HTTP },
  ];
  const answered = (frame: Uint8Array): Outcome => ({
    verdict: VERDICT.REDIRECT,
    reason: 'reset_no_listener',
    mark: MARKS.bypass,
    frame,
  });
  const away = () => {
    const d = datapath();
    d.enrol({ flags: ['STRICT', 'CLOSED_RESET'] });
    d.proxies([]);
    return d;
  };
  /** Back into the pod; as the pod's own frames leave it. */
  const intoPod: Wire = { source: GATEWAY_MAC, destination: POD_MAC };
  const outOfPod: Wire = { source: POD_MAC, destination: GATEWAY_MAC };
  const FORWARDED = { ingressIfindex: 1 };

  describe.each(families)('closedAction reset, IPv%i', (family) => {
    const its = addresses[family];

    describe.each(HEADERS[family])('$name', ({ ip }) => {
      test.each(SYNS)('pod_egress: $name', async ({ tcp, acknowledges }) => {
        const [pod, outside] = ends(family);
        const frame = tcpFrame(fromPod, pod, outside, { seq: SEQ, ...tcp }, ip);
        const ack = (SEQ + acknowledges) >>> 0;
        await away().check(
          'pod_egress',
          frame,
          answered(rst(intoPod, outside, pod, { flags: RST | ACK, seq: 0, ack })),
        );
      });

      test.each(SYNS)('pod_ingress: $name', async ({ tcp, acknowledges }) => {
        const client = { address: its.outside, port: port() };
        const pod = { address: its.pod, port: APP };
        const frame = tcpFrame(toPod, client, pod, { seq: SEQ, ...tcp }, ip);
        const ack = (SEQ + acknowledges) >>> 0;
        const answer = rst(outOfPod, pod, client, { flags: RST | ACK, seq: 0, ack });
        await away().check('pod_ingress', frame, answered(answer), FORWARDED);
      });
    });

    test('the frame is padded: what is behind the IP packet is no payload', async () => {
      const [pod, outside] = ends(family);
      const frame = Buffer.concat([tcpFrame(fromPod, pod, outside, { seq: 1 }), Buffer.alloc(20, 0xff)]);
      const answer = rst(intoPod, outside, pod, { flags: RST | ACK, seq: 0, ack: 2 });
      await away().check('pod_egress', frame, answered(answer));
    });

    test.each([
      { name: 'a header length below 20', fields: { dataOffset: 4 } },
      { name: 'a header that is longer than the packet', fields: { dataOffset: 6 } },
    ])('$name: no answer', async ({ fields }) => {
      const [pod, outside] = ends(family);
      await away().check('pod_egress', tcpFrame(fromPod, pod, outside, fields), drop('drop_malformed'));
    });

    test('nothing is remembered: the refused tuple is no flow', async () => {
      const [pod, outside] = ends(family);
      const d = away();
      const frame = tcpFrame(fromPod, pod, outside, { seq: 1 });
      await d.check('pod_egress', frame, answered(rst(intoPod, outside, pod, { flags: RST | ACK, seq: 0, ack: 2 })));
      await d.check('pod_egress', tcpFrame(fromPod, pod, outside, { flags: ACK }), drop('drop_orphaned_flow'));
    });

    test('an address that is not the pod’s is dropped, not answered', async () => {
      const frame = tcpFrame(fromPod, { address: its.outside, port: 1 }, { address: its.pod, port: HTTP });
      await away().check('pod_egress', frame, drop('drop_spoofed_source'));
    });

    test('policy open passes whatever closedAction says', async () => {
      const [pod, outside] = ends(family);
      const d = away();
      d.enrol({ flags: ['POLICY_OPEN', 'CLOSED_RESET'] });
      const passes = { verdict: VERDICT.PASS, reason: 'pass_failure_policy_open' };
      await d.check('pod_egress', tcpFrame(fromPod, pod, outside), passes);
    });

    describe('segments of a flow whose proxy died', () => {
      const cases = [
        { name: 'ACK', tcp: { flags: ACK, ack: 0x87654321 }, answer: { flags: RST, seq: 0x87654321, ack: 0 } },
        {
          name: 'ACK with data',
          tcp: { flags: ACK | PSH, ack: 7, payload: Buffer.alloc(777, 1), tcpOptions: Buffer.alloc(12, 1) },
          answer: { flags: RST, seq: 7, ack: 0 },
        },
        { name: 'FIN', tcp: { flags: FIN | ACK, ack: 9 }, answer: { flags: RST, seq: 9, ack: 0 } },
        {
          name: 'data without ACK',
          tcp: { flags: PSH, seq: 5, payload: Buffer.alloc(10) },
          answer: { flags: RST | ACK, seq: 0, ack: 15 },
        },
      ];
      test.each(cases)('pod_egress: $name', async ({ tcp, answer }) => {
        const d = datapath();
        const [pod, outside] = ends(family);
        await d.check(
          'pod_egress',
          tcpFrame(fromPod, pod, outside),
          d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND),
        );
        away();
        await d.check('pod_egress', tcpFrame(fromPod, pod, outside, tcp), answered(rst(intoPod, outside, pod, answer)));
      });

      test.each(cases)('pod_ingress: $name', async ({ tcp, answer }) => {
        const d = datapath();
        const client = { address: its.outside, port: port() };
        const pod = { address: its.pod, port: APP };
        const taken = d.toProxy('redirected_inbound', d.old(), SIGN.INBOUND, MARKS.toProxy);
        await d.check('pod_ingress', tcpFrame(toPod, client, pod), taken, FORWARDED);
        away();
        const frame = tcpFrame(toPod, client, pod, tcp);
        await d.check('pod_ingress', frame, answered(rst(outOfPod, pod, client, answer)), FORWARDED);
      });

      test.each([RST, RST | ACK])('a RST (flags %i) is never answered', async (flags) => {
        const d = datapath();
        const [pod, outside] = ends(family);
        const taken = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND);
        await d.check('pod_egress', tcpFrame(fromPod, pod, outside), taken);
        away();
        await d.check('pod_egress', tcpFrame(fromPod, pod, outside, { flags }), drop('drop_no_listener'));
      });
    });

    test('the proxy’s own second leg: the RST goes into the proxy, signed', async () => {
      const d = away();
      d.proxies([d.old({ ports: { inboundHBONE: DEAF } })]);
      const client = { address: its.outside, port: port() };
      const server = { address: its.pod, port: DEAF };
      const signed = { source: d.signed(SIGN.ESTABLISHED), destination: d.old().mac };
      await d.check('proxy_egress', tcpFrame(fromProxy, client, server, { seq: SEQ }), {
        verdict: VERDICT.REDIRECT,
        reason: 'reset_no_listener',
        mark: 0,
        frame: rst(signed, server, client, { flags: RST | ACK, seq: 0, ack: SEQ + 1 }),
      });
      const broken = tcpFrame(fromProxy, client, server, { dataOffset: 4 });
      await d.check('proxy_egress', broken, drop('drop_malformed'));
    });
  });

  test('the Ethernet addresses that come back are those that came', async () => {
    const [pod, outside] = ends(4);
    const strange: Wire = { source: '02:00:5e:00:00:77', destination: 'ff:ff:ff:ff:ff:ff' };
    const frame = tcpFrame(strange, pod, outside, { seq: 1 });
    const answer = rst({ source: strange.destination, destination: macText(frame.subarray(6, 12)) }, outside, pod, {
      flags: RST | ACK,
      seq: 0,
      ack: 2,
    });
    await away().check('pod_egress', frame, answered(answer));
  });
}
