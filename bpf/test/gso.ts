// SPDX-License-Identifier: Apache-2.0

import { join } from 'node:path';
import type { Namespace } from '../../conformance/netns.ts';
import { ACK, type End, type IPFields, IPPROTO_DSTOPTS, optionsHeader, tcpFrame, type Wire } from './frames.ts';

/** Of one segment, and how many are in the frame. */
const SIZE = 1400;
const COUNT = 40;

/**
 * The RST that comes back for a segment of 56,000 bytes sent on this device, whose acknowledgement number is 0x01020304.
 * `kind`: what it is still to be cut into (0: nothing). `options`: behind IP options, or IPv6 destination options.
 */
export function refusal(
  namespace: Namespace,
  ifname: string,
  wire: Wire,
  from: End,
  to: End,
  options: boolean,
): { kind: number; frame: string } {
  const six = from.address.includes(':');
  const behind: IPFields = six ? { extensions: [optionsHeader(IPPROTO_DSTOPTS)] } : { options: Buffer.alloc(8, 1) };
  const tcpOptions = Buffer.alloc(12, 1);
  const fields = { flags: ACK, ack: 0x01020304, tcpOptions };
  const whole = tcpFrame(
    wire,
    from,
    to,
    { ...fields, payload: Buffer.alloc(SIZE * COUNT) },
    { ...(options && behind), dontFragment: true },
  );
  const l4 = 14 + (six ? 40 : 20) + (options ? 8 : 0);
  const headers = whole.subarray(0, l4 + 20 + tcpOptions.length);
  const program = ['python3', join(import.meta.dirname, 'gso.py')];
  const argv = [...program, ifname, headers.toString('hex'), String(l4), String(SIZE), String(COUNT)];
  return JSON.parse(namespace.run(argv)) as { kind: number; frame: string };
}
