// SPDX-License-Identifier: Apache-2.0
// Section 7: README's quick start for Kubernetes, its commands word by word, on nodes that have nothing of ours.

import { mkdirSync, readFileSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { HUB, imageReference, ROOT } from '../../deploy/image/reference.ts';
import { helmProgram } from '../chart/helm.ts';
import { exec } from '../netns.ts';
import { NODE_NAMES } from './cluster.ts';
import { type Contract, type Ground, SHOP } from './ground.ts';
import { SYSTEM, ztunnel } from './manifests.ts';

/** What README leaves to its reader, and what it is here. */
function filledIn(command: string, version: string): string {
  return command.replace('REGISTRY/PATH', HUB).replace('TAG', version);
}

/** The first block of shell of a section of README. Throws if there is none. */
function block(heading: string): string {
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
  const [, section = ''] = readme.split(`\n${heading}\n`);
  const [, text] = /^```sh\n(.*?)^```$/ms.exec(section.split(/^##/m)[0] ?? '') ?? [];
  if (text === undefined) throw new Error(`README has no block of shell below "${heading}"`);
  return text;
}

/** A block's commands, one a line, without their comments. */
export function commandsOf(text: string): string[] {
  return text
    .replaceAll(/\\\n\s*/g, '')
    .split('\n')
    .map((line) => line.replace(/(^|\s+)#.*/, ''))
    .filter((line) => line !== '');
}

/** Of README's two ways to install, the one with the value of Istio 1.20's document is that of the contract shared. */
function isOf(contract: Contract, command: string): boolean {
  return !command.startsWith('helm install') || command.includes('redirectMode=ebpf') === (contract === 'shared');
}

export async function quickStart(ground: Ground): Promise<void> {
  const { step, section, cluster, contract } = ground;
  const { version } = cluster.images.current;
  section('7 README’s quick start for Kubernetes');
  const programs = join(cluster.plane.directory, 'quick-start');
  mkdirSync(programs);
  symlinkSync(cluster.programs.kubectl, join(programs, 'kubectl'));
  symlinkSync(await helmProgram(), join(programs, 'helm'));

  /** As an administrator types it, in the checkout; returns its stdout. */
  const type = async (script: string, argv: (command: string[]) => string[] = (command) => command) => {
    const env = {
      PATH: `${programs}:${process.env.PATH}`,
      HOME: cluster.plane.directory,
      KUBECONFIG: cluster.kubeconfig,
    };
    const outcome = await exec(argv(['sh', '-ec', script]), { cwd: ROOT, env, timeout: 420_000 });
    if (outcome.status !== 0) throw new Error(`exit ${outcome.status}: ${outcome.stderr.trim()} ${outcome.stdout}`);
    return outcome.stdout;
  };
  const onEachNode = async (script: string) => {
    for (const name of NODE_NAMES) {
      const node = cluster.node(name);
      const inNode = `cd '${ROOT}'; PATH="${node.options.containerd ?? ''}:$PATH"; ${script}`;
      await type(inNode, (command) => node.argv(command));
    }
  };

  /** What holds after a command, by how it begins; every command of README is here, and everything here is in README. */
  const expectations: Record<string, (command: string) => Promise<unknown>> = {
    'npm run image': type,
    'ctr ': async (command) => {
      await onEachNode(command);
      for (const name of NODE_NAMES) {
        const images = await cluster.node(name).ctr(['images', 'list', '-q']);
        if (!images.split('\n').includes(imageReference(version))) throw new Error(`${name} has ${images}`);
      }
    },
    'helm install ': type,
    'kubectl -n istio-system rollout status ': async (command) => {
      await type(command);
      await cluster.untilAllReady(SYSTEM, 'k8s-app=istio-cni-node', NODE_NAMES.length, 5_000);
      await ground.traffic(false);
    },
    'kubectl label namespace shop ': async (command) => {
      await type(command);
      await ground.untilAnnotated('enabled');
      await ground.traffic(true);
    },
    'kubectl -n istio-system exec ': async (command) => {
      const said = await type(command);
      if (!/^pods +[1-9]\d* enrolled/m.test(said) || !/^problems +none$/m.test(said)) throw new Error(said);
    },
    'helm uninstall ': async (command) => {
      await type(command);
      await ground.traffic(false);
    },
  };

  await step('the nodes have neither us nor our image; ztunnel runs, the pods go on', async () => {
    await ground.label(null);
    for (const name of NODE_NAMES)
      await cluster.node(name).ctr(['images', 'remove', '--sync', imageReference(version)]);
    await cluster.apply(...ztunnel(contract));
    await cluster.untilAllReady(SYSTEM, 'app=ztunnel', NODE_NAMES.length);
    await ground.traffic(false);
  });
  const left = new Set(Object.keys(expectations));
  for (const command of commandsOf(block('## Kubernetes')).filter((one) => isOf(contract, one))) {
    const known = await step(command, async () => {
      const [begin, expectation] = Object.entries(expectations).find(([key]) => command.startsWith(key)) ?? [];
      if (begin === undefined || expectation === undefined) throw new Error('nothing is expected of it here');
      left.delete(begin);
      await expectation(filledIn(command, version));
    });
    if (!known) return;
    if (command.startsWith('kubectl label')) await step('the whole cluster at a glance', () => glance(type));
  }
  await step('that is all that was expected', async () => {
    if (left.size > 0) throw new Error(`README has no ${[...left].join(', no ')}`);
  });
}

/** README's loop over the nodes, with its four questions. */
async function glance(type: (script: string) => Promise<string>): Promise<void> {
  const text = block('### The whole cluster at a glance');
  const questions = text.split('\n').filter((line) => line.startsWith('each ')).length;
  const answers = (await type(text)).split(/^== /m).slice(1);
  for (const name of NODE_NAMES) {
    const mine = answers.filter((answer) => answer.startsWith(`${name}\n`));
    const empty = mine.filter((answer) => answer.trim() === name);
    // The client runs on one of the nodes.
    if (questions === 0 || mine.length !== questions || empty.length > 1) {
      throw new Error(`${name}: ${mine.length} answers to ${questions} questions, ${empty.length} empty`);
    }
  }
  if (!answers.some((answer) => answer.includes(`${SHOP}/client`))) throw new Error(`nobody has ${SHOP}/client`);
}
