// SPDX-License-Identifier: Apache-2.0
// New connections that rules let go direct: ports and addresses, of what the pod sends and of what it receives.

import { describe, test } from 'vitest';
import type { ExclusionRule } from '../../plugin/native.ts';
import { ACK, type End, mapped, SYN, type TcpFields, tcpFrame } from './frames.ts';
import { APP, addresses, type Datapath, families, fromPod, HTTP, MARKS, pass, SIGN, toPod } from './node.ts';

/** Ports of one 4-port prefix: 8000 to 8003. */
const FIRST = 8000;
const LENGTH = 14;

function port(kind: 'inbound_port' | 'outbound_port', number: number, length = 16, excluded = true): ExclusionRule {
  const value = new Uint8Array(16);
  value[0] = number >> 8;
  value[1] = number & 0xff;
  return { kind, value, length, excluded };
}

function prefix(address: string, length: number, excluded = true): ExclusionRule {
  return {
    kind: 'outbound_address',
    value: mapped(address),
    length: address.includes(':') ? length : 96 + length,
    excluded,
  };
}

export function rules(datapath: () => Datapath): void {
  const exclude = (...all: ExclusionRule[]) => {
    const { node, state } = datapath();
    node.native.putExclusions(state, node.ifindex.pod, all);
  };
  const excludedPort = pass('pass_excluded_port');
  const excludedAddress = pass('pass_excluded_cidr');

  describe.each(families)('exclusions, IPv%i', (family) => {
    const its = addresses[family];
    const own = (): End => ({ address: its.pod, port: datapath().node.port() });
    const sends = (to: End, from = own(), tcp: TcpFields = { flags: SYN }) => tcpFrame(fromPod, from, to, tcp);
    const receives = (to: End, from: End, tcp: TcpFields = { flags: SYN }) => tcpFrame(toPod, from, to, tcp);
    const taken = () => datapath().toProxy('redirected_outbound', datapath().old(), SIGN.OUTBOUND);
    const takenIn = () => datapath().toProxy('redirected_inbound', datapath().old(), SIGN.INBOUND, MARKS.toProxy);
    const outside = (number: number): End => ({ address: its.outside, port: number });
    const egress = (frame: Buffer, outcome: Parameters<Datapath['check']>[2]) =>
      datapath().check('pod_egress', frame, outcome);
    const ingress = (frame: Buffer, outcome: Parameters<Datapath['check']>[2]) =>
      datapath().check('pod_ingress', frame, outcome, { ingressIfindex: 7 });

    test('outbound ports: those of the prefix and no other', async () => {
      exclude(port('outbound_port', FIRST, LENGTH));
      for (const number of [FIRST, FIRST + 3]) await egress(sends(outside(number)), excludedPort);
      for (const number of [FIRST - 1, FIRST + 4, HTTP]) await egress(sends(outside(number)), taken());
      // As destination of what the pod sends, not as its own port, and not of what it receives.
      await egress(sends(outside(HTTP), { address: its.pod, port: FIRST + 1 }), taken());
      await ingress(receives({ address: its.pod, port: FIRST }, outside(4242)), takenIn());
    });

    test('a port taken out of an excluded range is not excluded', async () => {
      exclude(port('outbound_port', FIRST, LENGTH), port('outbound_port', FIRST + 1, 16, false));
      await egress(sends(outside(FIRST + 1)), taken());
      await egress(sends(outside(FIRST + 2)), excludedPort);
    });

    test('inbound ports: the pod’s, not the caller’s, and not of what it sends', async () => {
      exclude(port('inbound_port', APP));
      await ingress(receives({ address: its.pod, port: APP }, outside(4243)), excludedPort);
      await ingress(receives({ address: its.pod, port: APP + 1 }, outside(APP)), takenIn());
      await egress(sends(outside(APP)), taken());
    });

    test('outbound addresses: of what the pod sends alone', async () => {
      exclude(prefix(its.outside, family === 4 ? 24 : 64));
      await egress(sends(outside(HTTP)), excludedAddress);
      await egress(sends({ address: its.outsideAtOld, port: HTTP }), taken());
      await ingress(receives({ address: its.pod, port: APP }, outside(4244)), takenIn());
    });

    test('a port comes before an address', async () => {
      exclude(prefix(its.outside, family === 4 ? 24 : 64), port('outbound_port', HTTP));
      await egress(sends(outside(HTTP)), excludedPort);
    });

    test('the rest of a connection that was excluded is direct, also when the rule has gone', async () => {
      exclude(port('outbound_port', HTTP));
      const from = own();
      await egress(sends(outside(HTTP), from), excludedPort);
      exclude();
      await egress(sends(outside(HTTP), from, { flags: ACK }), pass('pass_direct'));
      await ingress(receives(from, outside(HTTP), { flags: ACK }), pass('pass_direct'));
    });

    test('a segment of which nothing is known passes by the rule, whichever side opened it', async () => {
      datapath().enrol({ flags: ['STRICT'] });
      exclude(port('outbound_port', HTTP), port('inbound_port', APP));
      await egress(sends(outside(HTTP), own(), { flags: ACK }), excludedPort);
      await egress(sends(outside(4245), { address: its.pod, port: APP }, { flags: ACK }), excludedPort);
      await ingress(receives(own(), outside(HTTP), { flags: ACK }), excludedPort);
      await ingress(receives({ address: its.pod, port: APP }, outside(4246), { flags: ACK }), excludedPort);
    });

    test('another pod’s rules say nothing', async () => {
      const { node, state } = datapath();
      node.native.putExclusions(state, node.ifindex.otherPod, [port('outbound_port', HTTP)]);
      await egress(sends(outside(HTTP)), taken());
    });
  });
}
