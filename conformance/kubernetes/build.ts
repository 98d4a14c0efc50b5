// SPDX-License-Identifier: Apache-2.0
//
// A real kube-apiserver and the etcd that belongs to it, built once from the Go module k8s.io/kubernetes into a cache
// outside the checkout. Run by itself (node conformance/kubernetes/build.ts) it builds them and says in a line which, or
// why there are none.

import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { delimiter, join } from 'node:path';
import { exec } from '../netns.ts';

export const KUBERNETES = 'v1.37.2';

/** Minutes that a build with nothing in Go's own cache may take on a busy machine. */
const BUILD_TIMEOUT_MS = 45 * 60_000;

export interface ControlPlanePrograms {
  apiServer: string;
  etcd: string;
}

/** Why there is no API server to test with, or undefined if there is one or it can be built. */
export function missingControlPlane(env: NodeJS.ProcessEnv = process.env): string | undefined {
  if (fromEnvironment(env) || existsSync(join(peerDirectory(`kubernetes-${KUBERNETES}`, env), 'kube-apiserver')))
    return undefined;
  const haveGo = (env.PATH ?? '').split(delimiter).some((directory) => existsSync(join(directory, 'go')));
  return haveGo ? undefined : 'no "go" in PATH to build it with';
}

/** The two programs; built if they are not in the cache. */
export async function controlPlanePrograms(env: NodeJS.ProcessEnv = process.env): Promise<ControlPlanePrograms> {
  const given = fromEnvironment(env);
  if (given) return given;
  const directory = peerDirectory(`kubernetes-${KUBERNETES}`, env);
  if (!existsSync(join(directory, 'kube-apiserver'))) {
    await buildKubernetes(directory, MAIN, ['kube-apiserver', 'etcd'], env);
  }
  return { apiServer: join(directory, 'kube-apiserver'), etcd: join(directory, 'etcd') };
}

function fromEnvironment(env: NodeJS.ProcessEnv): ControlPlanePrograms | undefined {
  const { KUBE_APISERVER_BINARY: apiServer, ETCD_BINARY: etcd } = env;
  return apiServer && etcd ? { apiServer, etcd } : undefined;
}

/** Where a built peer is kept, outside of every checkout. */
export function peerDirectory(name: string, env: NodeJS.ProcessEnv): string {
  const cache = env.XDG_CACHE_HOME ?? (process.getuid?.() === 0 ? '/var/cache' : join(homedir(), '.cache'));
  return join(cache, 'ambient-redirect', name);
}

// Both in one executable: they share most of their code, and linking is the slow part.
const MAIN = `package main

import (
	"os"
	"path/filepath"

	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() {
	if filepath.Base(os.Args[0]) == "etcd" {
		etcdmain.Main(os.Args)
		return
	}
	os.Exit(cli.Run(app.NewAPIServerCommand()))
}
`;

/**
 * go.mod of a module of our own around k8s.io/kubernetes. Its own go.mod requires the staging modules as v0.0.0 and
 * replaces them with folders of its repository, which a replace in a dependency cannot do: they are published under
 * v0.X.Y for v1.X.Y.
 */
export function wrappingModule(goMod: string): string {
  const staging = KUBERNETES.replace(/^v1/, 'v0');
  return goMod
    .replace(/^module .*$/m, 'module ambient-redirect.invalid/control-plane')
    .replace(/^require \($/m, `require (\n\tk8s.io/kubernetes ${KUBERNETES}`)
    .replace(/^(\s+k8s\.io\/\S+) v0\.0\.0( \/\/ indirect)?$/gm, `$1 ${staging}$2`)
    .replace(/^(\s+(k8s\.io\/\S+)) => \.\/staging\/\S+$/gm, `$1 => $2 ${staging}`);
}

/**
 * Builds one executable around k8s.io/kubernetes into `directory`, with a name for each program that it is; others wait
 * for it. `main`: its source, which goes by the name that it was called by.
 */
export async function buildKubernetes(
  directory: string,
  main: string,
  [name, ...others]: readonly [string, ...string[]],
  outer: NodeJS.ProcessEnv,
): Promise<void> {
  mkdirSync(join(directory, '..'), { recursive: true });
  const fresh = `${directory}.${process.pid}`;
  mkdirSync(fresh);
  try {
    const { GOFLAGS: _, ...rest } = outer;
    const env = { HOME: homedir(), ...(rest as Record<string, string>), CGO_ENABLED: '0' };
    const go = async (argv: string[]) => {
      const outcome = await exec(argv, { cwd: fresh, env, timeout: BUILD_TIMEOUT_MS });
      if (outcome.status !== 0) throw new Error(`${argv.join(' ')}: exit ${outcome.status}: ${outcome.stderr}`);
      return outcome.stdout;
    };
    const download = await go(['go', 'mod', 'download', '-json', `k8s.io/kubernetes@${KUBERNETES}`]);
    const { Dir: source } = JSON.parse(download) as { Dir: string };
    writeFileSync(join(fresh, 'go.mod'), wrappingModule(readFileSync(join(source, 'go.mod'), 'utf8')));
    writeFileSync(join(fresh, 'go.sum'), readFileSync(join(source, 'go.sum')));
    writeFileSync(join(fresh, 'main.go'), main);
    // Without the version it calls itself v0.0.0-master.
    const flags = `-s -w -X k8s.io/component-base/version.gitVersion=${KUBERNETES}`;
    const compile = ['go', 'build', '-mod=mod', '-tags', 'selinux,notest,grpcnotrace', '-ldflags', flags];
    // One build at a time: each takes gigabytes and every processor.
    await go(['flock', `${directory}.lock`, ...compile, '-o', name, '.']);
    for (const other of others) symlinkSync(name, join(fresh, other));
    // Somebody else may have been quicker.
    if (!existsSync(directory)) renameSync(fresh, directory);
  } finally {
    rmSync(fresh, { recursive: true, force: true });
  }
}

if (import.meta.main) {
  const missing = missingControlPlane();
  console.log(
    missing === undefined ? `${KUBERNETES}, ${(await controlPlanePrograms()).apiServer}` : `not run: ${missing}`,
  );
}
