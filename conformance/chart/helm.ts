// SPDX-License-Identifier: Apache-2.0
//
// A real helm, built once from its Go module into the cache. Run by itself (node conformance/chart/helm.ts) it builds it
// and says in a line which, or why there is none.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { buildOnce, haveGo, NO_GO, peerDirectory } from '../go.ts';
import { exec, type Outcome } from '../netns.ts';

export const HELM = 'v4.3.1';

export const CHART = join(import.meta.dirname, '../../deploy/chart');

/** Why there is no helm to test with, or undefined if there is one or it can be built. */
export function missingHelm(env: NodeJS.ProcessEnv = process.env): string | undefined {
  const there = env.HELM_BINARY || existsSync(join(peerDirectory(`helm-${HELM}`, env), 'helm'));
  return there || haveGo(env) ? undefined : NO_GO;
}

/** Path of the program; built if it is not in the cache. */
export async function helmProgram(env: NodeJS.ProcessEnv = process.env): Promise<string> {
  if (env.HELM_BINARY) return env.HELM_BINARY;
  const directory = peerDirectory(`helm-${HELM}`, env);
  await buildOnce(
    directory,
    async (go) => {
      // One build at a time: each takes every processor.
      await go(['flock', `${directory}.lock`, 'go', 'install', `helm.sh/helm/v4/cmd/helm@${HELM}`]);
    },
    env,
  );
  return join(directory, 'helm');
}

/** Runs it with nothing of the user's own configuration. */
export async function helm(argv: readonly string[], env: Record<string, string> = {}): Promise<Outcome> {
  const program = await helmProgram();
  const nowhere = { HELM_CONFIG_HOME: '/nonexistent', HELM_DATA_HOME: '/nonexistent', HELM_CACHE_HOME: '/nonexistent' };
  return exec([program, ...argv], {
    // helm makes $HOME/.kube/cache, as root in any directory that is not there.
    env: { PATH: process.env.PATH ?? '', HOME: '/dev/null', ...nowhere, ...env },
    timeout: 60_000,
  });
}

if (import.meta.main) {
  const missing = missingHelm();
  console.log(missing === undefined ? `${HELM}, ${await helmProgram()}` : `not run: ${missing}`);
}
