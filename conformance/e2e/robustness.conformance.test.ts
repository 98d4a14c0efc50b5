// SPDX-License-Identifier: Apache-2.0
//
// The executable in adverse circumstances on the real kernel: many at once, killed, fed with nonsense, and with each
// of its kernel calls failing. Asserted by the kernel's whole state before and after, never by what the plugin says.
//
// AMBIENT_REDIRECT_LONG=1 runs the full counts. AMBIENT_REDIRECT_SEED repeats a run's random choices.

import { spawn } from 'node:child_process';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { loadNative } from '../../plugin/addon.ts';
import { differences, type KernelState, kernelState } from '../kernel-state.ts';
import { exec, type Namespace, type Outcome } from '../netns.ts';
import { acknowledge } from './inpod.ts';
import { executable, type Pod, type PodOptions, requireExecutable, Topology } from './topology.ts';

const long = process.env.AMBIENT_REDIRECT_LONG === '1';
const seed = Number(process.env.AMBIENT_REDIRECT_SEED ?? Date.now() % 1_000_000);
const faults = `${executable}-faults`;
const hooks = ['tcx', 'clsact'] as const;
/** What a runtime waits for at most before it calls the answer late. */
const LIMIT = 2_000;

/** A reproducible random number generator (mulberry32): numbers in [0, 1). */
function randomNumbers(from: number): () => number {
  let state = from;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

const appPod: PodOptions = { enroll: true };
const proxyPod: PodOptions = { namespace: 'istio-system' };
const inPod: PodOptions = {
  enroll: true,
  entry: {
    proxy: { contract: 'in-pod', match: { namespace: 'istio-system', name: 'ztunnel-*' } },
    dnsCapture: true,
    exclude: { outboundPorts: [7001] },
  },
};
const roles = [
  { role: 'in-pod app pod', label: 'inpod', options: inPod },
  { role: 'app pod', label: 'app', options: appPod },
  { role: 'proxy', label: 'ztunnel-x', options: proxyPod },
] as const;

let topology: Topology;
afterEach(() => topology?.close());

function prepare(hook: 'tcx' | 'clsact', entry: Record<string, unknown> = {}): void {
  requireExecutable();
  topology = new Topology({ primary: 'ptp', hook, rpFilter: 1, entry });
  // Listens before the first plugin has started.
  void acknowledge(topology);
}

function wiredPod(label: string, number: number, options: PodOptions): Pod {
  const pod = topology.pod(label, options);
  topology.wire(pod, number);
  return pod;
}

function run(
  verb: string,
  pod: Pod,
  { path = executable, entry = topology.entry(pod), env = {} }: RunOptions = {},
): Promise<Outcome> {
  return topology.node.exec([path], {
    env: { ...topology.environment(verb, pod), ...env },
    input: JSON.stringify(entry),
  });
}
interface RunOptions {
  path?: string;
  entry?: Record<string, unknown>;
  env?: Record<string, string>;
}

async function succeeds(verb: string, pod: Pod, options?: RunOptions): Promise<void> {
  const outcome = await run(verb, pod, options);
  expect(outcome, `${verb} ${pod.label}`).toMatchObject({ status: 0 });
  if (verb === 'ADD') expect(JSON.parse(outcome.stdout)).toMatchObject(pod.prevResult ?? {});
  else expect(outcome.stdout).toBe('');
}

/** One error document of the CNI specification and nothing else on stdout. */
function expectError(outcome: Outcome): void {
  expect(outcome.status, `${outcome.stdout}${outcome.stderr}`).toBe(1);
  const document: unknown = JSON.parse(outcome.stdout);
  expect(document).toMatchObject({ code: expect.any(Number), msg: expect.stringMatching(/./) });
}

function dump(...pods: Pod[]): Promise<KernelState> {
  const namespaces: Namespace[] = [topology.node, ...pods.map((pod) => pod.netns)];
  return kernelState(namespaces, { pins: [topology.bpffs] });
}

/** Without what changes by itself or by right: counters of a bystander, and how often the list of proxies was written. */
function comparable(state: KernelState, bystander: Pod): KernelState {
  const index = Buffer.alloc(4);
  index.writeUInt32LE(bystander.hostIfindex);
  const kept = [...state].filter(([key]) => !key.includes(`/counters[${index.toString('hex')}`));
  return new Map(
    kept.map(([key, value]) => [key, key.includes('/proxies[') ? `${value.slice(0, 8)}${value.slice(16)}` : value]),
  );
}

/**
 * Links, rules, routes, filters, TCX, accept_local and pins with their entries as plain text, in few processes: for
 * looking after each of hundreds of runs. dump() sees more and takes several times as long.
 */
async function glance(pod: Pod, bystander: Pod): Promise<KernelState> {
  const hooks = (ifname: string) =>
    ['', ' ingress', ' egress'].map((hook) => `filter show dev ${ifname}${hook}`).concat(`qdisc show dev ${ifname}`);
  const look = async (namespace: Namespace, label: string, ifnames: string[]) => {
    const script = [
      "printf 'link show\\nrule show\\nroute show table all\\n' | ip -o -4 -batch -",
      "printf 'rule show\\nroute show table all\\n' | ip -o -6 -batch -",
      `printf '${ifnames.flatMap(hooks).join('\\n')}\\n' | tc -force -batch - 2>/dev/null`,
      `cat /proc/sys/net/ipv4/conf/*/accept_local /proc/sys/net/ipv4/conf/*/route_localnet /proc/sys/net/ipv4/tcp_migrate_req`,
    ].join('; ');
    const outcome = await namespace.exec(['sh', '-c', script]);
    expect(outcome.status, outcome.stderr).toBe(0);
    const lines = outcome.stdout.split('\n').filter((line) => !/fe80:|ff00:|qdisc clsact|^$/.test(line));
    const text = lines.map((line) => line.replace(/ (id|expires|jited|tag) \S+| jited|linkdown /g, '')).sort();
    return new Map([[label, text.join('\n')]]);
  };
  const parts = await Promise.all([
    look(topology.node, 'node', [pod.hostIfname]),
    look(pod.netns, pod.label, ['eth0']),
    kernelState([], { pins: [topology.bpffs] }),
  ]);
  return comparable(new Map(parts.flatMap((part) => [...part])), bystander);
}

/** What stays once the state directory has been made: its maps and programs, not their users. */
const shared = /^pins [^[]*$|\/(?:settings|proxies|identity|jump|jump_lookup)\[/;

/** Lines that tell of an attachment: every difference but the state directory itself. */
function remains(before: KernelState, after: KernelState): string[] {
  return differences(before, after, shared);
}

describe.each(hooks)('%s: many at once', (hook) => {
  test('20 parallel ADDs on a fresh state directory, 20 parallel DELs, with CHECKs between', async () => {
    prepare(hook);
    const pods = Array.from({ length: 20 }, (_, index) =>
      index === 7 ? wiredPod('ztunnel-x', index + 2, proxyPod) : wiredPod(`app${index}`, index + 2, appPod),
    );
    const before = await dump(...pods);
    await Promise.all(pods.map((pod) => succeeds('ADD', pod)));
    const during = await dump(...pods);
    expect([...during.keys()].filter((key) => key.includes('/attachments['))).toHaveLength(20);
    for (const pod of pods) {
      const attached = [...during.keys()].filter(
        (key) => key.startsWith(`node `) && key.includes(` ${pod.hostIfname} `),
      );
      expect(
        attached.filter((key) => / (tcx|filter) /.test(key)),
        `hooks of ${pod.label}`,
      ).toHaveLength(2);
    }
    const [half, rest] = [pods.slice(0, 10), pods.slice(10)];
    await Promise.all([...half.map((pod) => succeeds('DEL', pod)), ...rest.map((pod) => succeeds('CHECK', pod))]);
    await Promise.all([...rest.map((pod) => succeeds('DEL', pod)), ...half.map((pod) => succeeds('ADD', pod))]);
    await Promise.all(half.map((pod) => succeeds('DEL', pod)));
    expect(remains(before, await dump(...pods))).toEqual([]);
  });
});

describe.each(hooks)('%s: killed', (hook) => {
  /** Starts the plugin and kills it after `after` ms, unless it has ended. */
  async function kill(verb: string, pod: Pod, after: number): Promise<boolean> {
    const [file = '', ...rest] = topology.node.argv([executable]);
    const child = spawn(file, rest, { env: topology.environment(verb, pod), stdio: ['pipe', 'ignore', 'ignore'] });
    child.stdin.on('error', () => {}); // it may be dead before it has read
    child.stdin.end(JSON.stringify(topology.entry(pod)));
    const timer = setTimeout(() => child.kill('SIGKILL'), after);
    const signal = await new Promise((resolve) => child.once('close', (_, name) => resolve(name)));
    clearTimeout(timer);
    return signal === 'SIGKILL';
  }

  test('at random points of ADD and DEL: DEL and GC leave nothing', { timeout: 300_000 }, async () => {
    prepare(hook);
    const random = randomNumbers(seed);
    const pods = roles.map(({ label, options }, index) => wiredPod(label, index + 2, options));
    const before = await dump(...pods);
    // The second ADD's and DEL's time is what the random points are chosen within.
    const duration: Record<string, number> = {};
    for (const verb of ['ADD', 'DEL', 'ADD', 'DEL']) {
      const { ms, status } = await run(verb, pods[0] as Pod);
      expect(status).toBe(0);
      duration[verb] = ms;
    }
    let killed = 0;
    for (let round = 0; round < (long ? 100 : 10); round++) {
      const pod = pods[round % 2] as Pod;
      const verb = random() < 0.6 ? 'ADD' : 'DEL';
      const title = `round ${round}, ${verb} of ${pod.label}, seed ${seed}`;
      // Now and then the state directory has to be made first.
      if (verb === 'ADD' && random() < 0.3) await exec(['rm', '-rf', topology.stateDir]);
      if (verb === 'DEL') await succeeds('ADD', pod);
      if (await kill(verb, pod, (0.3 + 0.75 * random()) * (duration[verb] ?? 100))) killed += 1;
      if (random() < 0.5) {
        await succeeds('DEL', pod);
      } else {
        const entry = { ...topology.entry(pod), cniVersion: '1.1.0', 'cni.dev/valid-attachments': [] };
        const outcome = await run('GC', pod, { entry });
        expect(outcome, title).toMatchObject({ status: 0, stdout: '' });
      }
      expect(remains(before, await dump(...pods)), title).toEqual([]);
    }
    // A machine that is too fast for the points chosen would test nothing.
    expect(killed).toBeGreaterThan(long ? 30 : 2);
    for (const pod of pods) {
      await succeeds('ADD', pod);
      await succeeds('CHECK', pod);
      await succeeds('DEL', pod);
    }
    expect(remains(before, await dump(...pods))).toEqual([]);
  });
});

describe('nonsense', () => {
  type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
  const random = randomNumbers(seed);
  const pick = <T>(choices: readonly T[]): T => choices[Math.floor(random() * choices.length)] as T;
  const values: Json[] = [null, true, 0, -1, 1e99, '', ' ', 'x', '\u0000', '../..', 'eth0', [], {}, [null], { a: [] }];
  values.push('x'.repeat(70_000), '10.0.0.1/33', '::', [0, 0], 'closed', 4_294_967_296, 'true');

  /** The same document with one value replaced, removed or doubled. Paths stay: others would be made on this machine. */
  function mutate(value: Json): Json {
    if (value === null || typeof value !== 'object') return pick(values);
    if (Array.isArray(value)) {
      const at = Math.floor(random() * (value.length + 1));
      if (at === value.length) return [...value, pick(values)];
      return random() < 0.3 ? value.filter((_, index) => index !== at) : value.with(at, mutate(value[at] as Json));
    }
    const keys = Object.keys(value).filter((key) => key !== 'stateDir' && key !== 'runDir');
    if (keys.length === 0 || random() < 0.1) return { ...value, [pick(['x', '__proto__', 'type', ''])]: pick(values) };
    const key = pick(keys);
    const { [key]: old, ...rest } = value;
    if (random() < 0.25) return rest;
    return { ...rest, [key]: random() < 0.3 ? pick(values) : mutate(old as Json) };
  }

  function mutateText(text: string): string {
    const at = Math.floor(random() * text.length);
    const cut = pick([
      text.slice(0, at),
      `${text.slice(0, at)}${pick(['\u0000', '{', '"', ',', '\ufeff', '\ud800', '9'])}${text.slice(at)}`,
      `${text}${pick([text, '}', '\n\n', 'x'])}`,
      '',
    ]);
    return cut;
  }

  /** No document, or one whose directories are the test's own: others would be made on this machine. */
  function staysInside(text: string): boolean {
    let document: unknown;
    try {
      document = JSON.parse(text);
    } catch {
      return true;
    }
    const { stateDir, runDir } = (document ?? {}) as { stateDir?: unknown; runDir?: unknown };
    return stateDir === topology.stateDir && runDir === topology.runDir;
  }

  test('mutated stdin and environment: a Result or one error document in 2 s, nothing half-made', {
    timeout: 600_000,
  }, async () => {
    prepare(pick(hooks));
    const pod = wiredPod('app', 2, appPod);
    // Either hook: TCX makes a directory for its links, which stays, and an entry that lost its "hook" gets TCX.
    for (const hook of hooks) {
      const entry = { ...topology.entry(pod), hook };
      await succeeds('ADD', pod, { entry });
      await succeeds('DEL', pod, { entry });
    }
    const before = await dump(pod);
    const verbs = ['ADD', 'ADD', 'ADD', 'ADD', 'DEL', 'CHECK', 'STATUS', 'VERSION', 'GC', 'add', ''];
    for (let round = 0; round < (long ? 300 : 30); round++) {
      const verb = pick(verbs);
      const env = topology.environment(verb, pod);
      let document = JSON.parse(JSON.stringify(topology.entry(pod))) as Json;
      const where = random();
      if (where < 0.6) for (let count = 1 + Math.floor(random() * 3); count > 0; count--) document = mutate(document);
      let input = JSON.stringify(document);
      if (where >= 0.6 && where < 0.75) {
        const text = mutateText(input);
        if (staysInside(text)) input = text;
      }
      if (where >= 0.75) {
        const name = pick(Object.keys(env).filter((key) => key.startsWith('CNI_')));
        const value = pick(['', 'x', '/', 'a/b', '-', '..', '/run/netns/none', '/etc/passwd', '=;=', 'é'.repeat(9)]);
        if (random() < 0.3) delete env[name];
        else env[name] = value;
      }
      const title = `round ${round}, seed ${seed}: ${verb} ${JSON.stringify(env)} ${input.slice(0, 2_000)}`;
      const outcome = await topology.node.exec([executable], {
        env,
        input,
        timeout: LIMIT,
        cwd: topology.testbed.directory(`nonsense${round}`),
      });
      expect(outcome.timedOut, title).toBe(false);
      expect([0, 1], title).toContain(outcome.status);
      if (outcome.status === 1) {
        const error: unknown = JSON.parse(outcome.stdout);
        expect(error, title).toMatchObject({ code: expect.any(Number), msg: expect.any(String) });
      } else if (outcome.stdout !== '') {
        expect(JSON.parse(outcome.stdout), title).toMatchObject({ cniVersion: expect.any(String) });
      }
      if (outcome.status === 0 && env.CNI_COMMAND === 'ADD') {
        // Done as asked; whoever asked so can also undo it.
        const undone = await topology.node.exec([executable], { env: { ...env, CNI_COMMAND: 'DEL' }, input });
        expect(undone.status, `${title}\n${undone.stdout}`).toBe(0);
      }
      expect(differences(before, await dump(pod)), title).toEqual([]);
    }
  });
});

/** The calls of each role's ADD whose failure has been tried, with the hook before. */
const tried = new Map<string, string[]>();

function commonPrefix(a: readonly string[], b: readonly string[]): number {
  const at = a.findIndex((name, index) => name !== b[index]);
  return at < 0 ? a.length : at;
}

describe.each(hooks)('%s: each kernel call fails in turn', (hook) => {
  const callsOf = async (verb: string, pod: Pod): Promise<string[]> => {
    const file = join(topology.testbed.directory(`calls.${verb}`), 'calls');
    await succeeds(verb, pod, { path: faults, env: { AMBIENT_REDIRECT_CALLS_FILE: file } });
    return existsSync(file) ? readFileSync(file, 'utf8').trim().split('\n') : [];
  };

  test.each(roles)(
    'ADD of $role is undone whichever call fails',
    { timeout: 1_200_000 },
    async ({ role, label, options }) => {
      prepare(hook);
      const pod = wiredPod(label, 2, options);
      const other = wiredPod('other', 3, appPod);
      // Somebody is there already: maps, programs and another attachment that must not be touched.
      await succeeds('ADD', other);
      await succeeds('ADD', pod);
      await succeeds('DEL', pod);
      const calls = await callsOf('ADD', pod);
      expect(calls.length).toBeGreaterThan(10);
      await succeeds('DEL', pod);
      const before = await glance(pod, other);
      const everythingBefore = comparable(await dump(pod, other), other);
      // Up to the first call that the other hook does not make, a run is the same as there.
      const first = long ? 0 : commonPrefix(calls, tried.get(label) ?? []);
      tried.set(label, calls);
      let failures = 0;
      for (let call = first + 1; ; call++) {
        const outcome = await run('ADD', pod, { path: faults, env: { AMBIENT_REDIRECT_FAIL_CALL: `${call}` } });
        const title = `call ${call}, ${calls[call - 1] ?? 'beyond the last'}`;
        if (outcome.status === 0) {
          // What glance() does not see cannot be missed either.
          const seen = differences(before, await glance(pod, other)).join('\n');
          const parts = {
            proxy: ['lookup 41905', 'local default', 'proxies'],
            'app pod': ['pod_ingress', 'interfaces'],
            'in-pod app pod': ['inpod_egress', 'inpod_guard', 'lookup 41905', 'local default', 'interfaces'],
          }[role];
          for (const part of [...parts, 'attachments']) expect(seen).toContain(part);
          await succeeds('DEL', pod);
          expect(differences(before, await glance(pod, other)), title).toEqual([]);
          // A failure that ADD may survive (a probe, a sweep) must not end the search.
          if (call > calls.length) break;
          continue;
        }
        failures += 1;
        expect(outcome.timedOut, title).toBe(false);
        expectError(outcome);
        expect(differences(before, await glance(pod, other)), title).toEqual([]);
      }
      expect(failures).toBeGreaterThan((calls.length - first) / 2);
      expect(differences(everythingBefore, comparable(await dump(pod, other), other))).toEqual([]);
    },
  );

  test.each(roles)(
    'DEL of $role is finished by the next DEL whichever call fails',
    {
      timeout: 600_000,
    },
    async ({ label, options }) => {
      prepare(hook);
      const pod = wiredPod(label, 2, options);
      const before = await dump(pod);
      await succeeds('ADD', pod);
      const calls = await callsOf('DEL', pod);
      const random = randomNumbers(seed);
      const step = long ? 1 : 4;
      for (let call = 1 + Math.floor(random() * step); call <= calls.length; call += step) {
        const title = `call ${call}, ${calls[call - 1]}, seed ${seed}`;
        await succeeds('ADD', pod);
        const outcome = await run('DEL', pod, { path: faults, env: { AMBIENT_REDIRECT_FAIL_CALL: `${call}` } });
        if (outcome.status !== 0) {
          expectError(outcome);
          await succeeds('DEL', pod);
        }
        expect(remains(before, await dump(pod)), title).toEqual([]);
      }
    },
  );

  test.each(roles)(
    'killed before kernel calls of the very first ADD of $role: DEL and ADD still work',
    {
      timeout: 1_200_000,
    },
    async ({ label, options }) => {
      prepare(hook);
      const pod = wiredPod(label, 2, options);
      const before = await dump(pod);
      const calls = await callsOf('ADD', pod);
      await succeeds('DEL', pod);
      // Every one of them takes an hour: in the long run odd ones with one hook, even ones with the other.
      const step = long ? 2 : Math.ceil(calls.length / 6);
      for (let call = long && hook === 'clsact' ? 2 : 1; call <= calls.length; call += step) {
        const title = `killed before call ${call}, ${calls[call - 1]}`;
        await exec(['rm', '-rf', topology.stateDir]);
        const outcome = await run('ADD', pod, { path: faults, env: { AMBIENT_REDIRECT_KILL_CALL: `${call}` } });
        expect(outcome.signal, title).toBe('SIGKILL');
        await succeeds('DEL', pod);
        expect(remains(before, await dump(pod)), title).toEqual([]);
        await succeeds('ADD', pod);
        await succeeds('CHECK', pod);
        await succeeds('DEL', pod);
        expect(remains(before, await dump(pod)), title).toEqual([]);
      }
    },
  );
});

test('a pod that runs stays recorded wherever its enrolment is killed or fails', { timeout: 600_000 }, async () => {
  prepare('tcx');
  const pod = wiredPod('app', 2, {});
  await succeeds('ADD', pod);
  const native = loadNative();
  const { stateDir, runDir, node } = topology;
  const recorded = () => {
    const state = native.openState(stateDir);
    try {
      return native.listAttachments(state).map(({ record }) => `${record.role} ${record.state} ${record.podName}`);
    } finally {
      native.closeState(state);
    }
  };
  const conf = join(topology.testbed.directory('conf'), 'entry.json');
  writeFileSync(conf, JSON.stringify({ type: 'ambient-redirect', hook: 'tcx' }));
  const command = (verb: string, env: Record<string, string> = {}, ...more: string[]) => {
    const directories = ['--state-dir', stateDir, '--run-dir', runDir];
    return node.exec([faults, verb, '--netns', pod.netns.path, ...directories, ...more], {
      env: { PATH: process.env.PATH ?? '', ...env },
    });
  };
  const enroll = (env?: Record<string, string>) => command('enroll', env, '--conf', conf);
  expect(recorded()).toEqual(['none recorded app']);
  const file = join(topology.testbed.directory('calls'), 'calls');
  const whole = await enroll({ AMBIENT_REDIRECT_CALLS_FILE: file });
  expect(whole, whole.stderr).toMatchObject({ status: 0 });
  expect(recorded()).toEqual(['pod attached app']);
  const calls = readFileSync(file, 'utf8').trim().split('\n');
  // From where what there was is taken away to the first program; later calls depend on what the pod has open.
  const from = calls.indexOf('rmdir');
  const to = calls.findIndex((name, index) => index > from && name === 'bpf(BPF_LINK_CREATE)');
  expect([from > 0, to > from]).toEqual([true, true]);
  const indexes = Array.from({ length: to - from + 1 }, (_, offset) => from + offset);
  const window = long ? Array.from({ length: to }, (_, index) => index) : indexes.filter((_, i) => i % 3 === 1);
  for (const index of window) {
    for (const how of ['KILL', 'FAIL']) {
      await command('unenroll', {}, '--no-drain');
      const title = `${how}, call ${index + 1}, ${calls[index]}`;
      expect(recorded(), title).toEqual(['none recorded app']);
      const outcome = await enroll({ [`AMBIENT_REDIRECT_${how}_CALL`]: `${index + 1}` });
      expect(recorded(), title).toHaveLength(1);
      if (how === 'KILL') expect(outcome.signal, title).toBe('SIGKILL');
      else if (outcome.status !== 0) expect(recorded(), title).toEqual(['none recorded app']);
    }
  }
  await command('unenroll', {}, '--no-drain');
  expect(await enroll()).toMatchObject({ status: 0 });

  const leave = (env: Record<string, string>) => command('unenroll', env, '--no-drain');
  const leaving = `${file}-leaving`;
  expect(await leave({ AMBIENT_REDIRECT_CALLS_FILE: leaving })).toMatchObject({ status: 0 });
  const steps = readFileSync(leaving, 'utf8').trim().split('\n');
  for (let call = 1; call <= steps.length; call += long ? 1 : Math.ceil(steps.length / 12)) {
    for (const how of ['KILL', 'FAIL']) {
      expect(await enroll()).toMatchObject({ status: 0 });
      const title = `unenroll, ${how}, call ${call}, ${steps[call - 1]}`;
      const outcome = await leave({ [`AMBIENT_REDIRECT_${how}_CALL`]: `${call}` });
      if (how === 'KILL') expect(outcome.signal, title).toBe('SIGKILL');
      expect(recorded(), title).toHaveLength(1);
    }
  }
});
