// SPDX-License-Identifier: Apache-2.0
// Every test that runs a program on one packet. Also run, without vitest, on changed programs (conformance/mutate).

import { counting } from './counting.ts';
import { dns } from './dns.ts';
import { fragments } from './fragments.ts';
import { proxyLookup } from './lookup.ts';
import { type Datapath, drop, pass } from './node.ts';
import { podEgress } from './pod-egress.ts';
import { podIngress } from './pod-ingress.ts';
import { proxyEgress } from './proxy-egress.ts';
import { proxyGuard } from './proxy-guard.ts';
import { proxyIngress } from './proxy-ingress.ts';
import { reset } from './reset.ts';
import { rules } from './rules.ts';
import { spellings } from './spellings.ts';
import { trace } from './trace.ts';
import { fullSocketsOnly, noRedirectPeer } from './variants.ts';

/** VARIANT_* names without the prefix that each datapath of the suite is loaded with. */
export const DATAPATHS = {
  standard: [],
  noPeer: ['NO_REDIRECT_PEER'],
  noAssign: ['NO_SK_ASSIGN'],
  fullSockets: ['FULL_SOCKETS_ONLY'],
} as const;
export type DatapathName = keyof typeof DATAPATHS;

export function suite(datapath: (name: DatapathName) => Datapath): void {
  const standard = () => datapath('standard');
  const noAssign = () => datapath('noAssign');
  podEgress(standard);
  podIngress(standard);
  proxyEgress(standard);
  proxyGuard(standard);
  proxyIngress('with bpf_sk_assign, refused outside a hook', standard, drop('drop_redirect_failed'));
  proxyIngress('without bpf_sk_assign', noAssign, pass('proxy_assigned'));
  proxyLookup(standard);
  noRedirectPeer(() => datapath('noPeer'));
  fullSocketsOnly(standard, () => datapath('fullSockets'));
  reset(standard);
  rules(standard);
  fragments(standard);
  dns(standard);
  trace(standard);
  counting(standard);
  spellings(standard);
}
