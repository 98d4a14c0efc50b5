// SPDX-License-Identifier: Apache-2.0
// proxy_guard: nobody but us sends a frame with our sign to a proxy.

import { describe, test } from 'vitest';
import { ACK, mac, macText, tcpFrame } from './frames.ts';
import { addresses, type Datapath, drop, FOREIGN_MARK, MARKS, OLD_MAC, pass, SIGN } from './node.ts';

export function proxyGuard(datapath: () => Datapath): void {
  const check = (source: string, mark: number, outcome: ReturnType<typeof pass>) => {
    const { pod, outside } = addresses[4];
    const frame = tcpFrame(
      { source, destination: OLD_MAC },
      { address: pod, port: 1 },
      { address: outside, port: 2 },
      { flags: ACK },
    );
    return datapath().check('proxy_guard', frame, outcome, { mark });
  };

  describe('proxy_guard', () => {
    test.each(Object.entries(SIGN))('the sign %s with our mark passes', (_, meaning) =>
      check(datapath().signed(meaning), MARKS.toProxy, pass(null)),
    );
    test.each([...Object.values(SIGN), 0, 255])('the sign %i without our mark: dropped', (meaning) =>
      check(datapath().signed(meaning), 0, drop('drop_forged_sign')),
    );
    test.each([MARKS.bypass, MARKS.tproxy, FOREIGN_MARK])('the sign with another mark, %i: dropped', (mark) =>
      check(datapath().signed(SIGN.OUTBOUND), mark, drop('drop_forged_sign')),
    );
    test.each([0, 1, 2, 3, 4])('a source that differs in byte %i passes', (byte) => {
      const source = mac(datapath().signed(SIGN.OUTBOUND));
      source.writeUInt8((source[byte] ?? 0) ^ 0x10, byte);
      return check(macText(source), 0, pass(null));
    });
    test('the sign as destination passes', () => {
      const { pod, outside } = addresses[4];
      const wire = { source: OLD_MAC, destination: datapath().signed(SIGN.OUTBOUND) };
      const frame = tcpFrame(wire, { address: pod, port: 1 }, { address: outside, port: 2 });
      return datapath().check('proxy_guard', frame, pass(null));
    });
  });
}
