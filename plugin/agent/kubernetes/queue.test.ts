// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { until } from '../../../conformance/netns.ts';
import { WorkQueue } from './queue.ts';

interface Run {
  key: string;
  end: (error?: Error) => void;
}

function queue(parallel: number, retry: readonly [number, number] = [1, 4]) {
  const running: Run[] = [];
  const failures: [key: string, tries: number][] = [];
  const done: string[] = [];
  const one = new WorkQueue({
    parallel,
    retry,
    work: (key) =>
      new Promise<void>((resolve, reject) => {
        running.push({ key, end: (error) => (error === undefined ? resolve() : reject(error)) });
      }),
    onFailure: (key, _error, tries) => failures.push([key, tries]),
    onDone: (key) => done.push(key),
  });
  const keys = () => running.map(({ key }) => key);
  const end = async (key: string, error?: Error) => {
    const index = running.findIndex((run) => run.key === key);
    running.splice(index, 1)[0]?.end(error);
    await new Promise(setImmediate);
  };
  return { one, keys, end, failures, done };
}

test('several keys at a time, one piece of work for each', async () => {
  const { one, keys, end } = queue(2);
  for (const key of ['a', 'b', 'c', 'a', 'a']) one.add(key);
  expect(keys()).toEqual(['a', 'b']);
  expect(one.depth).toBe(3);
  await end('b');
  expect(keys()).toEqual(['a', 'c']);
  await end('c');
  await end('a');
  // What was asked for three times while it ran is done once more.
  expect(keys()).toEqual(['a']);
  await end('a');
  await one.settled();
  expect(one.depth).toBe(0);
});

test('what fails is tried again for ever, later and later, and stays the oldest work', async () => {
  const { one, keys, end, failures, done } = queue(1);
  one.add('a');
  for (let tries = 1; tries <= 6; tries++) {
    await until('it runs', () => keys().length === 1);
    await end('a', new Error('no'));
    expect(failures.at(-1)).toEqual(['a', tries]);
    expect([one.failing, one.depth]).toEqual([1, 1]);
  }
  const { age } = one;
  expect(age).toBeGreaterThan(0);
  await until('it runs', () => keys().length === 1);
  await end('a');
  expect(done).toEqual(['a']);
  expect([one.failing, one.depth, one.age]).toEqual([0, 0, 0]);
});

test('a change does not wait for the retry', async () => {
  const { one, keys, end } = queue(1, [60_000, 60_000]);
  one.add('a');
  await end('a', new Error('no'));
  expect(keys()).toEqual([]);
  one.add('a');
  expect(keys()).toEqual(['a']);
  await end('a');
  expect(one.depth).toBe(0);
});

test('a change while it fails is tried at once', async () => {
  const { one, keys, end, failures } = queue(1, [60_000, 60_000]);
  one.add('a');
  one.add('a');
  await end('a', new Error('no'));
  expect(failures).toEqual([['a', 1]]);
  expect(keys()).toEqual(['a']);
  await end('a');
  expect(one.depth).toBe(0);
});

test('after stop nothing begins, and what runs is waited for', async () => {
  const { one, keys, end } = queue(1);
  one.add('a');
  one.add('b');
  let stopped = false;
  const stopping = one.stop().then(() => {
    stopped = true;
  });
  one.add('c');
  await new Promise(setImmediate);
  expect([keys(), stopped]).toEqual([['a'], false]);
  await end('a');
  await stopping;
  expect(keys()).toEqual([]);
});
