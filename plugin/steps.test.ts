// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { runAside, runHere, StepQueue, type Steps, wait } from './steps.ts';

const said: string[] = [];
const say = (text: string) => said.push(text);

function* work(name: string, fails = false): Steps<string> {
  say(`${name} begins`);
  try {
    const first = yield* wait(
      () => 1,
      () => new Promise<number>((resolve) => setImmediate(() => resolve(1))),
    );
    const failing = () => {
      if (fails) throw new Error(`${name} fails`);
      return first + 1;
    };
    const second = yield* wait(failing, async () => failing());
    return `${name} ${second}`;
  } finally {
    say(`${name} ends`);
  }
}

const heard = () => said.splice(0);

describe('steps', () => {
  test('return the same here and aside', async () => {
    expect(runHere(work('here'))).toBe('here 2');
    expect(await runAside(work('aside'))).toBe('aside 2');
    expect(heard()).toEqual(['here begins', 'here ends', 'aside begins', 'aside ends']);
  });

  test('a wait that fails is thrown inside them, so that they can undo', async () => {
    expect(() => runHere(work('here', true))).toThrow('here fails');
    await expect(runAside(work('aside', true))).rejects.toThrow('aside fails');
    expect(heard()).toEqual(['here begins', 'here ends', 'aside begins', 'aside ends']);
  });

  test('in a queue run one after the other, also after a failure', async () => {
    const queue = new StepQueue();
    const results = await Promise.allSettled([queue.run(work('a')), queue.run(work('b', true)), queue.run(work('c'))]);
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled']);
    expect(heard()).toEqual(['a begins', 'a ends', 'b begins', 'b ends', 'c begins', 'c ends']);
  });
});
