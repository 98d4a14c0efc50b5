// SPDX-License-Identifier: Apache-2.0
// Rules that give a marked SYN to a listener, where programs cannot: without bpf_sk_assign (5.7), and without a socket
// lookup program where bpf_sk_assign refuses listeners with SO_REUSEPORT (before 6.6). They are the only thing of ours
// that another program makes: nft, when a proxy is attached and detached on such a kernel, and never otherwise.

import { CniError, Code } from './cni/errors.ts';
import type { Native, State } from './native.ts';
import type { RedirectConfig } from './redirect/config.ts';

const TABLE = 'inet ambient_redirect';

export function needsTproxy(native: Native, state: State): boolean {
  const { variant } = native.settings(state);
  const { NO_SK_ASSIGN, NO_SK_LOOKUP, FULL_SOCKETS_ONLY } = {
    NO_SK_ASSIGN: native.flags.VARIANT_NO_SK_ASSIGN ?? 0,
    NO_SK_LOOKUP: native.flags.VARIANT_NO_SK_LOOKUP ?? 0,
    FULL_SOCKETS_ONLY: native.flags.VARIANT_FULL_SOCKETS_ONLY ?? 0,
  };
  const { skAssign, skLookup, tcx } = native.features();
  if ((variant & (NO_SK_ASSIGN | FULL_SOCKETS_ONLY)) !== 0 || skAssign !== true) return true;
  // That it takes SO_REUSEPORT cannot be tried without a packet; it came with the same version as TCX.
  return tcx !== true && ((variant & NO_SK_LOOKUP) !== 0 || skLookup !== true);
}

/** proxy_ingress leaves the listener's port in the packet's priority. Throws CniError 102. */
export function addTproxy(netns: number, config: RedirectConfig): void {
  const mark = `0x${config.marks.tproxy.toString(16)}`;
  const rules = [...new Set(Object.values(config.proxy.ports))]
    .filter((port) => port !== 0)
    .flatMap((port) => {
      const match = `meta mark ${mark} meta priority 0:${port.toString(16)} meta l4proto tcp`;
      return [
        `${match} meta nfproto ipv4 tproxy ip to 127.0.0.1:${port} accept`,
        `${match} meta nfproto ipv6 tproxy ip6 to [::1]:${port} accept`,
      ];
    });
  nft(
    netns,
    `add table ${TABLE}
     delete table ${TABLE}
     table ${TABLE} {
       chain prerouting {
         type filter hook prerouting priority -150; policy accept;
         ${rules.join('\n')}
       }
     }\n`,
  );
}

/** Also where there is none. */
export function deleteTproxy(netns: number): void {
  nft(netns, `add table ${TABLE}\ndelete table ${TABLE}\n`);
}

function nft(netns: number, ruleset: string): void {
  // Not imported: every other start of the plugin would pay for it.
  const { spawnSync } = process.getBuiltinModule('node:child_process');
  const command = ['nsenter', `--net=/proc/${process.pid}/fd/${netns}`, 'nft', '-f', '-'];
  const [file = '', ...rest] = command;
  const { status, stderr, error } = spawnSync(file, rest, {
    input: ruleset,
    encoding: 'utf8',
    timeout: 10_000,
    env: { PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' },
  });
  if (status === 0) return;
  const reason = error?.message ?? stderr.trim().split('\n').slice(0, 2).join(' ');
  throw new CniError(
    Code.ATTACH_FAILED,
    "TPROXY rules in the proxy's namespace",
    `this kernel, or variant, cannot assign every listener to a packet, and nft failed: ${reason}`,
  );
}
