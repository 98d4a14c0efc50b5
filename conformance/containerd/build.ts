// SPDX-License-Identifier: Apache-2.0
//
// A containerd newer than Debian's, built once from its Go module into the cache. Run by itself
// (node conformance/containerd/build.ts) it builds it and says in a line which, or why there is none.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { buildOnce, haveGo, NO_GO, peerDirectory } from '../go.ts';

export const CONTAINERD = 'v2.4.2';

const MODULE = 'github.com/containerd/containerd/v2';

/** Why there is no containerd 2.x to test with, or undefined if there is one or it can be built. */
export function missingContainerd(env: NodeJS.ProcessEnv = process.env): string | undefined {
  const there =
    env.CONTAINERD_DIRECTORY || existsSync(join(peerDirectory(`containerd-${CONTAINERD}`, env), 'containerd'));
  return there || haveGo(env) ? undefined : NO_GO;
}

/** The directory with containerd, its shim and ctr; built if they are not in the cache. runc is Debian's. */
export async function containerdDirectory(env: NodeJS.ProcessEnv = process.env): Promise<string> {
  if (env.CONTAINERD_DIRECTORY) return env.CONTAINERD_DIRECTORY;
  const directory = peerDirectory(`containerd-${CONTAINERD}`, env);
  await buildOnce(
    directory,
    async (go) => {
      // btrfs needs C headers; the others are for snapshotters that no test uses.
      const tags = ['-tags', 'no_btrfs no_devmapper no_zfs'];
      const flags = ['-ldflags', `-s -w -X ${MODULE}/version.Version=${CONTAINERD}`];
      const programs = ['containerd', 'containerd-shim-runc-v2', 'ctr'];
      const packages = programs.map((name) => `${MODULE}/cmd/${name}@${CONTAINERD}`);
      // One build at a time: each takes every processor.
      await go(['flock', `${directory}.lock`, 'go', 'install', ...tags, ...flags, ...packages]);
    },
    env,
  );
  return directory;
}

if (import.meta.main) {
  const missing = missingContainerd();
  console.log(missing === undefined ? `${CONTAINERD}, ${await containerdDirectory()}` : `not run: ${missing}`);
}
