// SPDX-License-Identifier: Apache-2.0
// Whether the traffic of a run went the way that its mode says. From counts alone; no kernel is asked here.

import type { Tunnel } from './iptables.ts';
import type { ProxyCount } from './proxies.ts';

export interface Expectation {
  /** The listeners that every connection passes, as `proxy listener`: "shared outbound". Prefixes of names. */
  chain: readonly string[];
  /** Where our programs are attached, or null: nowhere. */
  hook: 'tcx' | 'clsact' | null;
  /** Whether netfilter rules steer the traffic. */
  rules: boolean;
  tunnel: Tunnel;
}

/** Counted so far in a world. */
export interface Evidence {
  /** By proxy: `shared`, `client`, `server`. */
  proxies: Record<string, ProxyCount>;
  /** Packets by `program reason`, from the programs' own map. */
  ours: Record<string, number>;
  /** Kinds of hooks that carry programs of ours: `tcx`, `clsact`. */
  hooks: string[];
  /** Packets that the redirecting netfilter rules matched; null: no rule at all. */
  rules: number | null;
  /** Through the tunnel into the proxy; null: there is none. */
  tunnel: { packets: number; bytes: number } | null;
  /** Sockets in TIME_WAIT in the namespaces of the world. */
  timeWait: number;
}

/** What the load says that it did. */
export interface Traffic {
  connections: number;
  /** Payload bytes, both directions together; a lower bound. */
  bytes: number;
  /** Payload bytes, and packets with payload, from the client; lower bounds. */
  sent: number;
  packets: number;
  /** The load opens connections all the time: TIME_WAIT would be measured. */
  opensConnections?: boolean;
}

/** A few more than the load counts: warm-up, connections that were open when it stopped. */
function fits(counted: number, wanted: number): boolean {
  return counted >= wanted && counted <= wanted * 1.05 + 8;
}

/** All listeners whose name is `name` or begins with `name-`, added up. */
function added(evidence: Evidence, listener: string): { accepted: number; failed: number; bytes: number | null } {
  const [proxy = '', name = ''] = listener.split(' ');
  const sum: ReturnType<typeof added> = { accepted: 0, failed: 0, bytes: 0 };
  for (const [key, count] of Object.entries(evidence.proxies[proxy] ?? {})) {
    if (key !== name && !key.startsWith(`${name}-`)) continue;
    sum.accepted += count.accepted;
    sum.failed += count.failed;
    sum.bytes = sum.bytes === null || count.bytes === null ? null : sum.bytes + count.bytes;
  }
  return sum;
}

const total = (counts: Record<string, number>) => Object.values(counts).reduce((a, b) => a + b, 0);

/** What is wrong with the run, or null if it was what its mode says. */
export function judge(wanted: Expectation, before: Evidence, after: Evidence, traffic: Traffic): string | null {
  if (traffic.connections === 0) return 'the load opened no connection';
  if (traffic.bytes === 0) return 'the load moved no byte';
  for (const listener of wanted.chain) {
    const [first, last] = [added(before, listener), added(after, listener)];
    const accepted = last.accepted - first.accepted;
    if (!fits(accepted, traffic.connections)) {
      return `the load opened ${traffic.connections} connections, the proxy's listener "${listener}" accepted ${accepted}`;
    }
    const bytes = last.bytes === null || first.bytes === null ? null : last.bytes - first.bytes;
    if (bytes !== null && bytes < traffic.bytes)
      return `the load moved ${traffic.bytes} bytes, "${listener}" passed on ${bytes}`;
    const failed = last.failed - first.failed;
    if (failed > 0) return `"${listener}" failed to pass on ${failed} connections`;
  }
  for (const [proxy, counts] of Object.entries(after.proxies)) {
    for (const listener of Object.keys(counts)) {
      if (wanted.chain.some((one) => `${proxy} ${listener}` === one || `${proxy} ${listener}`.startsWith(`${one}-`)))
        continue;
      const accepted = (counts[listener]?.accepted ?? 0) - (before.proxies[proxy]?.[listener]?.accepted ?? 0);
      if (accepted > 0) return `"${proxy} ${listener}" accepted ${accepted} connections; the mode has no such way`;
    }
  }
  return (
    judgeHooks(wanted, before, after, traffic) ??
    judgeRules(wanted, before, after, traffic) ??
    judgeTunnel(wanted, before, after, traffic) ??
    (traffic.opensConnections && after.timeWait > before.timeWait + 64
      ? `${after.timeWait - before.timeWait} more sockets in TIME_WAIT than before: that is measured, not connecting`
      : null)
  );
}

function judgeHooks(wanted: Expectation, before: Evidence, after: Evidence, traffic: Traffic): string | null {
  const hooks = after.hooks.join(' and ') || 'nowhere';
  if (wanted.hook === null) {
    if (after.hooks.length > 0) return `programs are attached (${hooks}); the mode has none`;
    if (total(after.ours) > 0) return 'programs counted packets; the mode has none';
    return null;
  }
  if (hooks !== wanted.hook) return `programs are attached to ${hooks}, the mode wants ${wanted.hook}`;
  const redirected = (evidence: Evidence) =>
    Object.entries(evidence.ours).reduce((sum, [key, n]) => sum + (/ redirected_outbound$/.test(key) ? n : 0), 0);
  const counted = redirected(after) - redirected(before);
  return counted < traffic.connections
    ? `the load opened ${traffic.connections} connections, our programs redirected ${counted}`
    : null;
}

function judgeRules(wanted: Expectation, before: Evidence, after: Evidence, traffic: Traffic): string | null {
  if (!wanted.rules) return after.rules === null ? null : 'there are netfilter rules; the mode has none';
  if (after.rules === null) return 'there are no netfilter rules';
  const matched = after.rules - (before.rules ?? 0);
  return matched < traffic.connections
    ? `the load opened ${traffic.connections} connections, the redirecting rules matched ${matched} packets`
    : null;
}

function judgeTunnel(wanted: Expectation, before: Evidence, after: Evidence, traffic: Traffic): string | null {
  if (wanted.tunnel === 'none') return after.tunnel === null ? null : 'there is a tunnel; the mode has none';
  if (after.tunnel === null) return 'there is no tunnel';
  const packets = after.tunnel.packets - (before.tunnel?.packets ?? 0);
  const bytes = after.tunnel.bytes - (before.tunnel?.bytes ?? 0);
  if (packets < traffic.connections) {
    return `the load opened ${traffic.connections} connections, ${packets} packets came through the tunnel`;
  }
  if (wanted.tunnel === 'all' && (bytes < traffic.sent || packets < traffic.packets)) {
    return `the load sent ${traffic.packets} packets and ${traffic.sent} bytes, ${packets} and ${bytes} came through the tunnel`;
  }
  return null;
}
