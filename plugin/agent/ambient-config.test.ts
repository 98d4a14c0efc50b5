// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { AmbientConfig } from './ambient-config.ts';

const root = mkdtempSync(join(tmpdir(), 'ambient-redirect-config-'));
afterAll(() => rmSync(root, { recursive: true, force: true }));

test('the file says what Istio 1.20 wrote, and the line comes once, when the proxy is ready', () => {
  const directory = join(root, 'etc', 'ambient-config');
  const lines: string[] = [];
  const config = new AmbientConfig(directory, (line) => lines.push(line));
  const file = join(directory, 'config.json');
  config.write(false);
  expect(readFileSync(file, 'utf8')).toBe('{"ztunnelReady":false,"redirectMode":"ebpf"}');
  expect([statSync(file).mode & 0o7777, readdirSync(directory)]).toEqual([0o644, ['config.json']]);
  expect(lines).toEqual([]);
  config.write(true);
  expect(readFileSync(file, 'utf8')).toBe('{"ztunnelReady":true,"redirectMode":"ebpf"}');
  config.write(false);
  config.write(true);
  expect(lines).toEqual(['ambient Writing ambient config: {"ztunnelReady":true,"redirectMode":"eBPF"}']);
});

test('a file that says so already is left alone', () => {
  const directory = mkdtempSync(join(root, 'same-'));
  const file = join(directory, 'config.json');
  writeFileSync(file, '{"ztunnelReady":true,"redirectMode":"ebpf"}');
  const { ino } = statSync(file);
  new AmbientConfig(directory, () => {}).write(true);
  expect(statSync(file).ino).toBe(ino);
});

test('what could not be written is written the next time', () => {
  const directory = join(root, 'not-a-directory');
  writeFileSync(directory, '');
  const config = new AmbientConfig(directory, () => {});
  expect(() => config.write(true)).toThrow(/EEXIST|ENOTDIR/);
  rmSync(directory);
  config.write(true);
  expect(readFileSync(join(directory, 'config.json'), 'utf8')).toContain('"ztunnelReady":true');
});

test('it goes when the node is left, and is written again after the next install', () => {
  const directory = mkdtempSync(join(root, 'left-'));
  const config = new AmbientConfig(directory, () => {});
  config.write(true);
  config.remove();
  expect(readdirSync(directory)).toEqual([]);
  config.write(true);
  expect(readdirSync(directory)).toEqual(['config.json']);
});
