// SPDX-License-Identifier: Apache-2.0
//
// npm run e2e:kubernetes: the life cycle on two real nodes (kubelet, containerd, kube-proxy) with their control plane,
// in named steps. -- --contract shared|in-pod, --only 1,2 (sections), --keep (leaves it up until Ctrl-C). Exit code 1 if
// a step failed.

import { spawn } from 'node:child_process';
import { parseArgs } from 'node:util';
import { containerdDirectory, missingContainerd } from '../containerd/build.ts';
import { requireExecutable } from '../e2e/topology.ts';
import { missingControlPlane } from '../kubernetes/build.ts';
import { Testbed } from '../netns.ts';
import { nodePrograms } from './build.ts';
import { Cluster } from './cluster.ts';
import { type Contract, Ground } from './ground.ts';
import { lifeCycle } from './life-cycle.ts';
import { currentImage, nextImage } from './next.ts';
import { Steps } from './steps.ts';

const { values } = parseArgs({
  options: {
    contract: { type: 'string', default: 'shared' },
    only: { type: 'string' },
    keep: { type: 'boolean', default: false },
    inside: { type: 'boolean', default: false },
  },
});

/** The same again, in a network namespace of its own: nothing of the machine's is in the way or can be. */
async function outside(): Promise<number> {
  const missing = missingControlPlane();
  if (missing !== undefined) throw new Error(`no Kubernetes to test with: ${missing}`);
  requireExecutable();
  const begun = performance.now();
  const programs = [(await nodePrograms()).kubelet];
  if (missingContainerd() === undefined) programs.push(await containerdDirectory());
  const seconds = (performance.now() - begun) / 1000;
  if (seconds > 5) console.log(`built ${programs.join(' and ')} in ${seconds.toFixed(0)} s`);
  const { version } = await nextImage();
  console.log(`images: ${currentImage().version}, and ${version} to upgrade to`);
  const argv = ['--net', '--', process.execPath, import.meta.filename, ...process.argv.slice(2), '--inside'];
  const child = spawn('unshare', argv, { stdio: 'inherit' });
  // The terminal sends SIGINT to both; this one waits for the other's clean-up.
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => child.kill(signal));
  return new Promise((resolve) => {
    child.once('exit', (code, signal) => resolve(code ?? (signal === null ? 1 : 130)));
  });
}

async function inside(): Promise<number> {
  const steps = new Steps();
  using testbed = Testbed.open();
  const contract = values.contract as Contract;
  let cluster: Cluster | undefined;
  steps.section('The cluster');
  const up = await steps.step('two nodes with their control plane are ready', async () => {
    cluster = await Cluster.start(testbed);
    return cluster.description();
  });
  if (up && cluster !== undefined) {
    await lifeCycle(new Ground(cluster, steps, contract), values.only?.split(','));
  }
  steps.summary();
  if (values.keep && cluster !== undefined) {
    console.log(`kubectl: ${cluster.programs.kubectl} --kubeconfig=${cluster.kubeconfig}`);
    for (const node of cluster.nodes)
      console.log(`${node.name}: nsenter -t ${node.pid} -m -n -p -i -u; logs in ${node.logs}`);
    console.log(`the control plane's network: nsenter -t ${process.pid} -n`);
    await new Promise((resolve) => setTimeout(resolve, 2 ** 31 - 1));
  }
  return steps.failed.length === 0 && up ? 0 : 1;
}

process.exitCode = await (values.inside ? inside() : outside());
