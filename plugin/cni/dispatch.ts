// SPDX-License-Identifier: Apache-2.0
// One invocation from environment and stdin to what goes on stdout. Every check that needs no kernel comes before the
// verbs are loaded, and exactly one document comes out.

import { version } from '../commands/version.ts';
import { type Invocation, parseEnvironment } from './env.ts';
import { CniError, Code, errorDocument } from './errors.ts';
import { configVersion, decodeDocument, decodeNetConf, type NetConf, networkName } from './netconf.ts';
import { type Result, relabel } from './result.ts';
import { assertVersion, NEWEST_VERSION, type Verb } from './version.ts';

export interface Request extends Omit<Invocation, 'command'> {
  command: Verb;
  conf: NetConf;
}

/** What a plugin does. A verb fails by throwing; anything but a CniError is a defect. */
export interface Verbs {
  add(request: Request): Result | Promise<Result>;
  del(request: Request): void | Promise<void>;
  check(request: Request): void | Promise<void>;
  gc(request: Request): void | Promise<void>;
  status(request: Request): void | Promise<void>;
}

/** Standard input to its end. */
export type ReadStdin = () => Buffer | Promise<Buffer>;

export interface Outcome {
  /** empty, or one JSON document and a newline */
  stdout: string;
  /** empty, or whole lines */
  stderr: string;
  exitCode: 0 | 1;
}

/**
 * @param readStdin called at most once, after the environment was found valid; it throws when stdin cannot be read
 * @param verbs called at most once, after every check passed; loads the addon
 */
export async function dispatch(
  env: NodeJS.ProcessEnv,
  readStdin: ReadStdin,
  verbs: () => Verbs | Promise<Verbs>,
): Promise<Outcome> {
  // SPEC: errors carry the configuration's version. Until it is known, the newest.
  let answerVersion: string = NEWEST_VERSION;
  let verb = 'CNI_COMMAND';
  try {
    const invocation = parseEnvironment(env);
    verb = invocation.command;
    if (invocation.command === 'VERSION') return success(version(await readForVersion(readStdin)));
    const { command } = invocation;

    const raw = decodeDocument(await readAll(readStdin));
    if (typeof raw.cniVersion === 'string' && raw.cniVersion !== '') answerVersion = raw.cniVersion;
    networkName(raw);
    assertVersion(configVersion(raw), command);
    const conf = decodeNetConf(raw, command);

    const loaded = await load(verbs, command);
    return success(await run(loaded, { ...invocation, command, conf }));
  } catch (thrown) {
    return failure(thrown, verb, answerVersion);
  }
}

/** What goes out for any thrown value: one error document, and the same on stderr with the stack of a defect. */
export function failure(thrown: unknown, verb: string, cniVersion: string): Outcome {
  const error = thrown instanceof CniError ? thrown : internalError(thrown);
  const stack = error.cause instanceof Error && error.code === Code.INTERNAL ? `\n${error.cause.stack}` : '';
  const log = `ambient-redirect: ${verb} failed with code ${error.code}: ${error.message}${stack}`;
  return {
    stdout: errorDocument(error, cniVersion),
    // Less than a pipe holds: nobody may be reading it.
    stderr: `${log.slice(0, 2048)}\n`,
    exitCode: 1,
  };
}

async function run(verbs: Verbs, request: Request): Promise<string> {
  switch (request.command) {
    case 'ADD': {
      const result = await verbs.add(request);
      return `${JSON.stringify(relabel(result, request.conf.cniVersion))}\n`;
    }
    case 'DEL':
      await verbs.del(request);
      return '';
    case 'CHECK':
      await verbs.check(request);
      return '';
    case 'GC':
      await verbs.gc(request);
      return '';
    case 'STATUS':
      await verbs.status(request);
      return '';
  }
}

async function load(verbs: () => Verbs | Promise<Verbs>, command: Verb): Promise<Verbs> {
  try {
    return await verbs();
  } catch (cause) {
    const error =
      cause instanceof CniError
        ? cause
        : new CniError(Code.ADDON_FAILED, 'cannot load the native addon', describe(cause), { cause });
    if (command !== 'STATUS') throw error;
    // SPEC: STATUS says "no ADD can be served" with 50, whatever the reason.
    throw new CniError(Code.NOT_AVAILABLE, error.msg, error.details, { cause });
  }
}

async function readAll(readStdin: ReadStdin): Promise<Buffer> {
  try {
    return await readStdin();
  } catch (cause) {
    throw new CniError(Code.IO_FAILURE, 'error reading from stdin', describe(cause), { cause });
  }
}

async function readForVersion(readStdin: ReadStdin): Promise<Buffer> {
  try {
    return await readStdin();
  } catch {
    return Buffer.alloc(0);
  }
}

function internalError(thrown: unknown): CniError {
  return new CniError(Code.INTERNAL, 'internal error', describe(thrown), { cause: thrown });
}

function describe(thrown: unknown): string {
  try {
    return thrown instanceof Error ? thrown.message : String(thrown);
  } catch {
    // An object whose conversion to a string throws in its turn.
    return typeof thrown;
  }
}

function success(stdout: string): Outcome {
  return { stdout, stderr: '', exitCode: 0 };
}
