// SPDX-License-Identifier: Apache-2.0
//
// `enrollment: agent`: the agent says who is in the mesh, and while it is not there the failure policy does.

import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { executable, PluginError, type Pod, requireExecutable, Topology } from '../e2e/topology.ts';
import { until } from '../netns.ts';
import { AgentSite } from './processes.ts';

let topology: Topology;
let site: AgentSite;

beforeEach(() => {
  requireExecutable();
});
afterEach(() => topology.close());

function open(entry: Record<string, unknown>): void {
  topology = new Topology({ primary: 'ptp', hook: 'tcx', rpFilter: 1, entry: { enrollment: 'agent', ...entry } });
  site = new AgentSite(topology);
}

interface Row {
  name: string;
  role: string;
  state: string;
  serviceAccount: string;
}

async function pods(): Promise<Row[]> {
  const { stateDir, runDir } = topology;
  const outcome = await topology.node.exec([
    executable,
    'pods',
    '-o',
    'json',
    '--state-dir',
    stateDir,
    '--run-dir',
    runDir,
  ]);
  expect(outcome, outcome.stderr).toMatchObject({ status: 0 });
  return (JSON.parse(outcome.stdout) as Row[]).map(({ name, role, state, serviceAccount }) => ({
    name,
    role,
    state,
    serviceAccount,
  }));
}

async function refusal(pod: Pod): Promise<{ code: number; msg: string; details: string }> {
  try {
    await topology.addOurs(pod);
  } catch (error) {
    if (error instanceof PluginError) return JSON.parse(error.outcome.stdout);
    throw error;
  }
  throw new Error('ADD succeeded');
}

const pending = () => {
  const directory = join(topology.runDir, 'pending');
  return existsSync(directory) ? readdirSync(directory) : [];
};

describe('failurePolicy closed', () => {
  test('without the agent no pod starts that only it can judge, and nothing is left; with it each as it says', async () => {
    open({});
    const [listed, other] = [topology.pod('listed'), topology.pod('other')];
    await topology.addPrimary(listed);
    expect(await refusal(listed)).toMatchObject({
      code: 11,
      msg: 'the node agent is not there',
      details: `no node agent serves ${topology.runDir}/agent.sock`,
    });
    expect(pending()).toEqual([]);
    site.know(listed);
    await site.agent();
    await topology.addOurs(listed);
    await topology.add(other);
    expect(await pods()).toEqual([
      { name: 'listed', role: 'pod', state: 'attached', serviceAccount: 'listed-sa' },
      { name: 'other', role: 'none', state: 'recorded', serviceAccount: '' },
    ]);
  });

  test('pods of which the entry itself says enough start without it', async () => {
    open({});
    const proxy = topology.pod('ztunnel-1', { namespace: 'istio-system' });
    await topology.add(proxy);
    const excluded = topology.pod('dns', { namespace: 'kube-system' });
    await topology.add(excluded);
    expect((await pods()).map(({ role }) => role)).toEqual(expect.arrayContaining(['proxy', 'none']));
  });
});

describe('failurePolicy open', () => {
  test('without the agent a pod starts outside the mesh; the agent enrols it when it is there', async () => {
    open({ failurePolicy: 'open' });
    const [listed, deleted] = [topology.pod('listed'), topology.pod('deleted')];
    await topology.add(listed, deleted);
    expect((await pods()).map(({ role, state }) => `${role} ${state}`)).toEqual(['none recorded', 'none recorded']);
    expect(pending().length).toBe(2);
    await topology.delete(deleted);
    expect(pending().length).toBe(1);
    site.know(listed, deleted);
    const agent = await site.agent();
    await until('the pod is enrolled', async () => (await pods())[0]?.role === 'pod');
    expect(await pods()).toEqual([{ name: 'listed', role: 'pod', state: 'attached', serviceAccount: 'listed-sa' }]);
    expect(pending()).toEqual([]);
    expect(agent.log.map(({ msg }) => msg)).toContain('enrolled late');
    // SIGTERM leaves what it attached.
    await agent.stop();
    expect((await pods())[0]?.role).toBe('pod');
  });

  test('a pod that the agent, when it is back, does not want stays outside', async () => {
    open({ failurePolicy: 'open' });
    const pod = topology.pod('other');
    await topology.add(pod);
    await site.agent();
    await until('the agent has looked', () => pending().length === 0);
    expect((await pods())[0]?.role).toBe('none');
  });
});

test('CHECK takes what is recorded, whether the agent is there or not', async () => {
  open({});
  const pod = topology.pod('listed');
  site.know(pod);
  const agent = await site.agent();
  await topology.add(pod);
  await agent.stop();
  const check = await topology.node.exec([executable], {
    env: topology.environment('CHECK', pod),
    input: JSON.stringify(topology.entry(pod)),
  });
  expect(check, check.stdout).toMatchObject({ status: 0 });
});
