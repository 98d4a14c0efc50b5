// SPDX-License-Identifier: Apache-2.0
//
// A real kube-apiserver and the etcd that belongs to it, built once from the Go module k8s.io/kubernetes into a cache
// outside the checkout. Run by itself (node conformance/kubernetes/build.ts) it builds them and says in a line which, or
// why there are none.

import { existsSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { buildOnce, haveGo, NO_GO, peerDirectory } from '../go.ts';

export { peerDirectory };

export const KUBERNETES = 'v1.37.2';

export interface ControlPlanePrograms {
  apiServer: string;
  etcd: string;
}

/** Why there is no API server to test with, or undefined if there is one or it can be built. */
export function missingControlPlane(env: NodeJS.ProcessEnv = process.env): string | undefined {
  if (fromEnvironment(env) || existsSync(join(peerDirectory(`kubernetes-${KUBERNETES}`, env), 'kube-apiserver')))
    return undefined;
  return haveGo(env) ? undefined : NO_GO;
}

/** The two programs; built if they are not in the cache. */
export async function controlPlanePrograms(env: NodeJS.ProcessEnv = process.env): Promise<ControlPlanePrograms> {
  const given = fromEnvironment(env);
  if (given) return given;
  const directory = peerDirectory(`kubernetes-${KUBERNETES}`, env);
  await buildKubernetes(directory, MAIN, ['kube-apiserver', 'etcd'], env);
  return { apiServer: join(directory, 'kube-apiserver'), etcd: join(directory, 'etcd') };
}

function fromEnvironment(env: NodeJS.ProcessEnv): ControlPlanePrograms | undefined {
  const { KUBE_APISERVER_BINARY: apiServer, ETCD_BINARY: etcd } = env;
  return apiServer && etcd ? { apiServer, etcd } : undefined;
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
  const build = async (go: (argv: readonly string[]) => Promise<string>, fresh: string) => {
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
  };
  await buildOnce(directory, build, outer);
}

if (import.meta.main) {
  const missing = missingControlPlane();
  console.log(
    missing === undefined ? `${KUBERNETES}, ${(await controlPlanePrograms()).apiServer}` : `not run: ${missing}`,
  );
}
