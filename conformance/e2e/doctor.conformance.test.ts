// SPDX-License-Identifier: Apache-2.0
//
// `doctor` as a person runs it, on a node that is not as it should be. Conflicts on an interface are in coexistence/.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { executable, type Pod, requireExecutable, Topology } from './topology.ts';

let topology: Topology;
let pod: Pod;
beforeAll(async () => {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1 });
  pod = topology.pod('pod', { enroll: true });
  await topology.add(pod);
});
afterAll(() => topology?.close());

type Finding = { level: string; subject: string; text: string };

/** Its findings in both forms, which must say the same, and its exit code. */
async function doctor(wrapper: readonly string[] = [], confDir = '/nowhere') {
  const directories = ['--state-dir', topology.stateDir, '--run-dir', topology.runDir, '--conf-dir', confDir];
  const run = (...more: string[]) => topology.node.exec([...wrapper, executable, 'doctor', ...directories, ...more]);
  const json = await run('-o', 'json');
  const text = await run();
  expect(text.status).toBe(json.status);
  const document = JSON.parse(json.stdout) as { kernel: { features: Record<string, boolean> }; findings: Finding[] };
  // Two processes may give a descriptor two numbers.
  const plain = (said: string) => said.replaceAll(/\bfd \d+/g, 'fd N');
  for (const { subject, text: said } of document.findings) {
    expect(plain(text.stdout)).toContain(plain(`${subject}: ${said}`));
  }
  return { ...document, status: json.status, page: text.stdout };
}
const of = (findings: readonly Finding[], subject: string) =>
  findings.filter((one) => one.subject === subject).map(({ level, text }) => `${level}: ${text}`);

test('the kernel’s features, and a state in order', async () => {
  const { kernel, findings, page } = await doctor();
  expect(kernel.features).toMatchObject({ tcx: true, redirectPeer: true, skAssign: true, skcLookup: true });
  expect(page).toMatch(/^tcx +6\.6 +yes +TCX links/m);
  expect(of(findings, 'capabilities')).toEqual(['ok: CAP_NET_ADMIN and CAP_SYS_ADMIN']);
  expect(of(findings, 'bpffs')).toEqual([expect.stringMatching(/^(ok|warning): /)]);
  expect(of(findings, 'state')).toEqual([expect.stringMatching(/^ok: \S+, layout \d+$/)]);
});

test.each([
  { gone: ['net_admin'], named: ['CAP_NET_ADMIN'] },
  { gone: ['sys_admin'], named: ['CAP_SYS_ADMIN'] },
  // As in an ordinary container: no program can be loaded, so no feature can be tried.
  { gone: ['net_admin', 'sys_admin', 'bpf'], named: ['CAP_NET_ADMIN', 'CAP_SYS_ADMIN'] },
])('without $gone: each capability that is missing is named', async ({ gone, named }) => {
  const bounding = gone.map((name) => `-${name}`).join(',');
  const { status, kernel, findings, page } = await doctor(['setpriv', `--bounding-set=${bounding}`]);
  expect(status).toBe(1);
  expect(of(findings, 'capabilities')).toEqual(named.map((name) => `fails: ${name} is missing`));
  if (gone.includes('bpf')) {
    expect(kernel.features).toEqual({});
    expect(page).toMatch(/^tcx +6\.6 +\? /m);
    expect(of(findings, 'kernel')).toEqual([]);
  }
});

describe('the conflist', () => {
  const write = (name: string, plugins: readonly object[]) => {
    const directory = topology.testbed.directory(`conf.${name}`);
    mkdirSync(directory, { recursive: true });
    const path = join(directory, '10-pods.conflist');
    writeFileSync(path, JSON.stringify({ cniVersion: '1.0.0', name: 'pods', plugins }));
    return { directory, path };
  };
  const ours = {
    type: 'ambient-redirect',
    capabilities: { 'io.kubernetes.cri.pod-annotations': true, bandwidth: true },
  };

  test('after the primary plugin: the chain is shown', async () => {
    const { directory, path } = write('good', [{ type: 'bridge' }, { type: 'portmap' }, ours]);
    const { status, findings } = await doctor([], directory);
    expect(of(findings, path)).toEqual(['ok: chain: bridge, portmap, ambient-redirect']);
    expect(status).toBe(findings.some(({ level }) => level === 'fails') ? 1 : 0);
  });

  test('before the primary plugin: it fails', async () => {
    const { directory, path } = write('first', [ours, { type: 'bridge' }]);
    const { status, findings } = await doctor([], directory);
    expect(of(findings, path)).toEqual([expect.stringMatching(/^fails: our entry is the first of the chain/)]);
    expect(status).toBe(1);
  });
});

test('a state directory that was lost is not in order', async () => {
  const { findings } = await doctor();
  expect(findings.filter(({ subject }) => subject.startsWith('default/'))).toEqual([]);
  topology.node.ip('link', 'del', pod.hostIfname);
  const after = await doctor();
  expect(of(after.findings, `default/${pod.label}`).join()).toMatch(/warning: interface \S+ .*the pod is gone/);
});
