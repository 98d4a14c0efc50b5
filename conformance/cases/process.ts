// SPDX-License-Identifier: Apache-2.0
//
// A0: exit status, output, concurrency and signals, whatever the verb.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { until } from '../netns.ts';
import { encode, isObject } from '../runtime.ts';
import type { Rule } from './rule.ts';
import { failed, result, type Subject, Violation } from './subject.ts';

/** Failures that any plugin must report: an unsupported version, and no configuration at all. */
async function failures(subject: Subject) {
  const pod = subject.idle();
  return [
    { what: 'ADD at version 9.0.0', outcome: await subject.call('ADD', pod, '9.0.0') },
    { what: 'DEL at version 9.0.0', outcome: await subject.call('DEL', pod, '9.0.0') },
    { what: 'ADD with empty stdin', outcome: await subject.call('ADD', pod, subject.newest, { stdin: '' }) },
  ];
}

export const processRules: Rule[] = [
  {
    id: 'A0.7',
    level: 'MUST',
    spec: 'Section 2: STATUS, GC; Section 3',
    title: 'the first call ever may be ADD; none needs STATUS, CHECK or GC before it',
    async run(subject) {
      subject.renew();
      const pod = subject.pod();
      await subject.add(pod);
      await subject.del(pod);
    },
  },
  {
    id: 'A0.1',
    level: 'MUST',
    spec: 'Section 2: Overview',
    title: 'exit status is 0 on success, not 0 on failure',
    async run(subject) {
      const pod = subject.pod();
      const { status } = await subject.call('ADD', pod, subject.newest);
      if (status !== 0) throw new Violation(`ADD: exit ${status}`);
      for (const { what, outcome } of await failures(subject)) {
        if (outcome.status === 0) throw new Violation(`${what}: exit 0`);
        if (outcome.status === null) throw new Violation(`${what}: ended by signal ${outcome.signal}`);
      }
    },
  },
  {
    id: 'A0.2',
    level: 'SHOULD',
    spec: 'Section 5: Error',
    title: 'the error document has cniVersion',
    async run(subject) {
      for (const { what, outcome } of await failures(subject)) {
        const { cniVersion } = failed(outcome, what);
        if (typeof cniVersion !== 'string' || cniVersion === '') {
          throw new Violation(`${what}: cniVersion is ${JSON.stringify(cniVersion)}`);
        }
      }
    },
  },
  {
    id: 'A0.3',
    level: 'libcni',
    spec: 'Section 5: Error; pkg/invoke/raw_exec.go',
    title: 'a failure puts exactly one JSON object on stdout: code an integer from 0 up, msg and details strings',
    async run(subject) {
      for (const { what, outcome } of await failures(subject)) {
        const { code, msg } = failed(outcome, what);
        if (!Number.isInteger(code) || code < 0) throw new Violation(`${what}: code is ${code}`);
        if (msg === '') throw new Violation(`${what}: msg is empty`);
      }
    },
  },
  {
    id: 'A0.5',
    level: 'MUST',
    spec: 'Section 5: Error',
    title: 'codes below 100 are those of the specification (and 8, which Go uses)',
    async run(subject) {
      const known = [1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 51];
      for (const { what, outcome } of await failures(subject)) {
        const { code } = failed(outcome, what);
        if (code < 100 && !known.includes(code)) throw new Violation(`${what}: code ${code} is reserved`);
      }
    },
  },
  {
    id: 'A0.6',
    level: 'MUST',
    spec: 'Section 3: Lifecycle & Ordering',
    title: '20 containers at once: every ADD and every DEL works and the Results are not mixed up',
    async run(subject) {
      const pods = Array.from({ length: 20 }, () => subject.pod());
      const version = subject.newest;
      const results = await Promise.all(pods.map((pod) => subject.call('ADD', pod, version)));
      for (const [index, outcome] of results.entries()) {
        const { interfaces } = result(outcome, `ADD ${index + 1} of 20`);
        const sandboxes = Array.isArray(interfaces) ? interfaces.map((one) => isObject(one) && one.sandbox) : [];
        if (!sandboxes.includes(pods[index]?.namespace.path ?? '')) {
          throw new Violation(`ADD ${index + 1} of 20: its own sandbox is not in its Result: ${outcome.stdout}`);
        }
      }
      await Promise.all(pods.map((pod) => subject.del(pod, version)));
    },
  },
  {
    id: 'A0.8',
    level: 'MUST',
    spec: 'Section 1: Plugin configuration objects',
    title: 'well-known and runtime keys of the configuration are never refused',
    async run(subject) {
      const pod = subject.pod();
      const config = subject.config(subject.newest, {
        prevResult: pod.result(subject.newest),
        args: { cni: { ips: [] }, labels: [{ key: 'app', value: 'x' }] },
        ipam: {},
        ipMasq: false,
        dns: { nameservers: ['10.0.0.53'] },
        'cni.dev/attachments': null,
        'cni.dev/valid-attachments': null,
        'cni.dev/later': { any: ['thing'] },
      });
      if (!isObject(config.capabilities)) config.capabilities = {};
      if (!isObject(config.runtimeConfig)) config.runtimeConfig = {};
      result(await subject.call('ADD', pod, subject.newest, { stdin: config }), 'ADD');
    },
  },
  {
    id: 'A0.9',
    level: 'runtimes',
    spec: 'runtimes cancel by SIGTERM or SIGKILL',
    title: 'SIGTERM while it waits for stdin: ends within 2 s, not as a success, stdout empty or one error',
    async run(subject) {
      const [file = '', ...rest] = subject.node.argv([subject.options.plugin]);
      const child = spawn(file, rest, { env: subject.env('ADD', subject.idle()), stdio: 'pipe' });
      let stdout = '';
      let stderr = '';
      child.stdout.setEncoding('utf8').on('data', (text: string) => {
        stdout += text;
      });
      child.stderr.setEncoding('utf8').on('data', (text: string) => {
        stderr += text;
      });
      // A plugin that does not wait for the end of stdin may end early, and then cannot be written to.
      child.stdin.on('error', () => undefined);
      const ended = once(child, 'close');
      try {
        // More than the kernel holds: once it is written, the plugin has read some and waits for the rest.
        let written = false;
        child.stdin.write(`{"filler":"${'x'.repeat(1 << 20)}`, () => {
          written = true;
        });
        await until('the plugin reads stdin', () => written);
        child.kill('SIGTERM');
        const limit = new Promise((_, reject) => {
          setTimeout(() => reject(new Violation('still runs 2 s after SIGTERM')), 2_000).unref();
        });
        await Promise.race([ended, limit]);
      } finally {
        child.kill('SIGKILL');
        await ended;
      }
      if (child.exitCode === 0) throw new Violation(`exit 0, stdout ${JSON.stringify(stdout)}`);
      if (stdout !== '') failed({ status: 1, signal: null, stdout, stderr, ms: 0, timedOut: false }, 'ADD');
    },
  },
  {
    id: 'A0.10',
    level: 'runtimes',
    spec: 'Section 2: stdin; pod annotations in runtimeConfig may hold 256 KiB',
    title: 'a configuration larger than a pipe is read to its end',
    async run(subject) {
      const pod = subject.pod();
      const config = subject.config(subject.newest, {
        args: { filler: 'x'.repeat(300_000) },
        prevResult: pod.result(subject.newest),
      });
      result(await subject.call('ADD', pod, subject.newest, { stdin: config }), 'ADD with 300 kB of stdin');
    },
  },
  {
    id: 'A0.11',
    level: 'runtimes',
    spec: 'a runtime that dies closes its end of the pipe',
    title: 'a reader of stdout that is gone does not make it hang, and DEL still works',
    async run(subject) {
      const pod = subject.pod();
      // The reading end is closed before the plugin starts: the left side waits for the right one's end.
      const shell = 'f=$(mktemp -u) && mkfifo "$f" && { exec 4<>"$f"; exec 5>"$f" 4<&-; rm "$f"; exec "$0" >&5 5>&-; }';
      await subject.call('ADD', pod, subject.newest, { shell, timeout: 3_000 });
      await subject.del(pod);
    },
  },
  {
    id: 'A0.12',
    level: 'runtimes',
    spec: 'pkg/invoke/args.go: plugins inherit the environment of the runtime',
    title: "the runtime's own environment and directory do not matter",
    async run(subject) {
      const pod = subject.pod();
      const env = {
        HOME: undefined,
        NODE_OPTIONS: '--require=/nonexistent',
        NODE_EXTRA_CA_CERTS: '/nonexistent',
        PYTHONHOME: '/nonexistent',
        GOTRACEBACK: 'none',
        LANG: 'xx_XX',
        TMPDIR: '/nonexistent',
      };
      result(await subject.call('ADD', pod, subject.newest, { env, cwd: '/proc' }), 'ADD');
    },
  },
  {
    id: 'A0.13',
    level: 'MUST',
    spec: 'Section 2: ADD: must output a result',
    title: 'a Result that cannot be written (stdout is /dev/full) is no success',
    async run(subject) {
      const pod = subject.pod();
      const stdin = encode(subject.config(subject.newest, { prevResult: pod.result(subject.newest) }));
      const outcome = await subject.call('ADD', pod, subject.newest, { stdin, shell: 'exec "$0" >/dev/full' });
      if (outcome.status === 0) throw new Violation('exit 0');
      await subject.del(pod);
    },
  },
];
