// SPDX-License-Identifier: Apache-2.0
//
// What a node and its cluster are made of beside etcd and API server, built once into the cache outside the checkout:
// kubelet, kube-proxy, controller manager, scheduler and kubectl of the same module.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { buildKubernetes, KUBERNETES, peerDirectory } from '../kubernetes/build.ts';

const PROGRAMS = ['kubelet', 'kube-proxy', 'kube-controller-manager', 'kube-scheduler', 'kubectl'] as const;

// One executable: the programs share most of their code, and linking is the slow part.
const MAIN = `package main

import (
	"context"
	"os"
	"path/filepath"
	_ "time/tzdata"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	kubectl "k8s.io/kubectl/pkg/cmd"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	var command *cobra.Command
	switch filepath.Base(os.Args[0]) {
	case "kube-controller-manager":
		command = controllers.NewControllerManagerCommand()
	case "kube-scheduler":
		command = scheduler.NewSchedulerCommand()
	case "kube-proxy":
		command = proxy.NewProxyCommand()
	case "kubectl":
		command = kubectl.NewDefaultKubectlCommand()
	default:
		command = kubelet.NewKubeletCommand(context.Background())
	}
	os.Exit(cli.Run(command))
}
`;

export type NodePrograms = Readonly<Record<(typeof PROGRAMS)[number], string>>;

/** Paths; built if they are not in the cache, which takes minutes. */
export async function nodePrograms(env: NodeJS.ProcessEnv = process.env): Promise<NodePrograms> {
  const directory = peerDirectory(`kubernetes-node-${KUBERNETES}`, env);
  if (!existsSync(join(directory, 'kubelet'))) await buildKubernetes(directory, MAIN, PROGRAMS, env);
  return Object.fromEntries(PROGRAMS.map((name) => [name, join(directory, name)])) as NodePrograms;
}
