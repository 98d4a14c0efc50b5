// SPDX-License-Identifier: Apache-2.0
// What looks like TCP and is not, and TCP that is as short as it can be.

import { describe, test } from 'vitest';
import {
  ethernetFrame,
  type IPFields,
  IPPROTO_DSTOPTS,
  IPPROTO_TCP,
  ipFrame,
  ipPacket,
  optionsHeader,
  tcpSegment,
} from './frames.ts';
import { addresses, type Datapath, drop, families, fromPod, HTTP, SIGN } from './node.ts';
import { NOT_TCP } from './parse-cases.ts';

/** What is asked for of a TCP header: as far as the flags, and two bytes more. */
const SHORTEST = 16;

export function spellings(datapath: () => Datapath): void {
  describe.each(families)('spellings, IPv%i', (family) => {
    const its = addresses[family];
    const to = { address: its.outside, port: HTTP };
    const packet = (length?: number, fields: IPFields = {}) => {
      const from = { address: its.pod, port: datapath().node.port() };
      const segment = tcpSegment(from, to).subarray(0, length);
      return ipPacket(from.address, to.address, IPPROTO_TCP, segment, fields);
    };
    const options: IPFields =
      family === 4 ? { options: Buffer.from([1, 1, 1, 0]) } : { extensions: [optionsHeader(IPPROTO_DSTOPTS)] };
    const check = (...rest: Parameters<Datapath['check']> extends [unknown, ...infer R] ? R : never) =>
      datapath().check('pod_egress', ...rest);

    test.each([0x88b5, 0x0801, 0x86de, 0x0700, 0x8706])('an IP packet in a frame of type %i is none', (type) =>
      check(ethernetFrame(fromPod, type, packet()), NOT_TCP),
    );

    test.each(['plainly', 'behind options'])('TCP that ends behind its flags, %s', async (how) => {
      const fields = how === 'plainly' ? {} : options;
      const d = datapath();
      const redirected = d.toProxy('redirected_outbound', d.old(), SIGN.OUTBOUND);
      await check(ipFrame(fromPod, packet(SHORTEST, fields)), redirected);
      await check(ipFrame(fromPod, packet(SHORTEST - 1, fields)), drop('drop_malformed'));
    });
  });
}
