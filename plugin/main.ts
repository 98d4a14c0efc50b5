// SPDX-License-Identifier: Apache-2.0
// The process edge: a container runtime's call in, one write to stdout and an exit code out. Without CNI_COMMAND it
// is a person's call, and the command line is loaded instead.

import { writeSync } from 'node:fs';
import { dispatch, failure, type Outcome } from './cni/dispatch.ts';
import { CniError, Code } from './cni/errors.ts';
import { NEWEST_VERSION, SUPPORTED_VERSIONS } from './cni/version.ts';
import { readStdin, stdinIsDevice } from './stdin.ts';

/** How long a pipe that nobody reads may stay full. */
const WRITE_TIMEOUT_SECONDS = 10;

const command = process.env.CNI_COMMAND ?? '';
const args = process.argv.slice(2);
if (command !== '') {
  plugin(command);
} else if (args.length === 0) {
  write(2, about());
} else {
  commandLine(args);
}

function plugin(verb: string): void {
  const answer = (outcome: Outcome): never => {
    // Runtimes drop stderr of a failed call, so nothing but stdout has to arrive.
    const lost = write(1, outcome.stdout);
    write(2, outcome.stderr);
    if (lost !== undefined) write(2, `ambient-redirect: ${verb}: the answer could not be written: ${lost}\n`);
    // An answer that nobody has is no success: the runtime is to send DEL.
    process.exit(lost === undefined ? outcome.exitCode : 1);
  };
  const fail = (thrown: unknown): never => answer(failure(thrown, verb, NEWEST_VERSION));
  // Takes rejections that nobody handles, too.
  process.on('uncaughtException', fail);
  // Runs only when the event loop does: kernel calls of a verb, which are synchronous, are not cut in half by it.
  process.on('SIGTERM', () => {
    const details = 'what was begun is recorded, and DEL removes it';
    fail(new CniError(Code.TRY_AGAIN_LATER, `${verb} was interrupted by SIGTERM`, details));
  });

  const stdin = verb === 'VERSION' && stdinIsDevice() ? () => Buffer.alloc(0) : readStdin;
  dispatch(process.env, stdin, async () => (await import('./commands/verbs.ts')).loadVerbs()).then(answer, fail);
}

async function commandLine(args: readonly string[]): Promise<void> {
  const { loadCommandLine } = await import('./bundle.ts');
  const { runCommandLine } = await loadCommandLine();
  process.exitCode = await runCommandLine(args);
}

function about(): string {
  return [
    'ambient-redirect: redirects the TCP traffic of pods through the ambient mesh proxy of the node',
    `CNI protocol versions supported: ${SUPPORTED_VERSIONS.join(', ')}`,
    'Run "ambient-redirect --help" for the command line.',
    '',
  ].join('\n');
}

/** Writes everything, and waits where the reader is slow. Returns why it could not, never throws. */
function write(fd: 1 | 2, text: string): string | undefined {
  const bytes = Buffer.from(text);
  const deadline = process.uptime() + WRITE_TIMEOUT_SECONDS;
  for (let written = 0; written < bytes.length; ) {
    try {
      written += writeSync(fd, bytes, written);
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      if (code !== 'EAGAIN' || process.uptime() > deadline) return message;
      // The descriptor is non-blocking because the other end made it so.
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2);
    }
  }
  return undefined;
}
