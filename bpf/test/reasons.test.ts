// SPDX-License-Identifier: Apache-2.0
// Every reason of the enum is asserted on by a test: here is which. A new reason fails until it has one. That those of
// bpf/test really came out of a program is checked by redirect.test.ts, which counts them.

import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';

const ROOT = dirname(dirname(import.meta.dirname));
const e2e = (name: string) => `conformance/e2e/${name}.conformance.test.ts`;

const TESTED_IN: Record<string, string> = {
  redirected_outbound: 'bpf/test/hooks.test.ts',
  redirected_inbound: 'bpf/test/hooks.test.ts',
  to_proxy_established: 'bpf/test/pod-ingress.ts',
  from_proxy_local: 'bpf/test/proxy-egress.ts',
  from_proxy_reinjected: 'bpf/test/proxy-egress.ts',
  from_proxy_second_leg: 'bpf/test/proxy-egress.ts',
  to_proxy_cookie: 'bpf/test/pod-egress.ts',
  to_proxy_orphaned: 'bpf/test/pod-egress.ts',
  to_proxy_icmp_error: 'bpf/test/pod-egress.ts',
  proxy_assigned: 'bpf/test/hooks.test.ts',
  proxy_delivered: 'bpf/test/proxy-ingress.ts',
  proxy_time_wait: 'bpf/test/proxy-ingress.ts',
  dns_captured: e2e('dns'),
  dns_answered: e2e('dns'),
  pass_not_tcp: 'bpf/test/parse-cases.ts',
  pass_host_socket: 'bpf/test/pod-ingress.ts',
  pass_excluded_port: e2e('exclusions'),
  pass_excluded_cidr: e2e('exclusions'),
  pass_no_proxy_socket: 'bpf/test/pod-egress.ts',
  pass_failure_policy_open: 'bpf/test/pod-egress.ts',
  pass_draining: 'bpf/test/pod-egress.ts',
  pass_direct: 'bpf/test/pod-ingress.ts',
  pass_link_local: 'bpf/test/pod-egress.ts',
  pass_other_host: 'bpf/test/pod-ingress.ts',
  pass_bypass: 'bpf/test/pod-egress.ts',
  pass_proxy_own: 'bpf/test/proxy-egress.ts',
  pass_not_wanted: 'bpf/test/pod-egress.ts',
  pass_fragment: e2e('fragments'),
  drop_no_listener: 'bpf/test/pod-ingress.ts',
  drop_spoofed_source: 'bpf/test/pod-egress.ts',
  drop_not_our_address: e2e('inpod'),
  drop_short_first_fragment: 'bpf/test/parse-cases.ts',
  drop_syn_fragment: 'bpf/test/parse-cases.ts',
  drop_malformed: 'bpf/test/parse-cases.ts',
  drop_redirect_failed: 'bpf/test/suite.ts',
  drop_orphaned_flow: 'bpf/test/pod-ingress.ts',
  drop_vlan_tagged: 'bpf/test/hooks.test.ts',
  drop_forged_sign: 'bpf/test/proxy-guard.ts',
  drop_fragment: 'bpf/test/parse-cases.ts',
  drop_unjudged: e2e('inpod'),
  reset_no_listener: 'bpf/test/reset.ts',
};

describe('reasons', () => {
  test('each has a test, and none has one that is gone', () => {
    expect(Object.keys(TESTED_IN).sort()).toEqual(Object.keys(loadNative().reasons).sort());
  });
  test.each(Object.entries(TESTED_IN))('%s is asserted on in %s', (reason, file) => {
    const code = readFileSync(join(ROOT, file), 'utf8').replaceAll(/\/\*[\s\S]*?\*\/|^\s*\/\/.*$/gm, '');
    // As a whole word in quotes, by itself or behind a program's name.
    expect(code).toMatch(new RegExp(`['"\`](?:\\w+ )?${reason}['"\`]`));
  });
});
