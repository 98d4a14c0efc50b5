// SPDX-License-Identifier: Apache-2.0
// `agent`: the process around plugin/agent/agent.ts. Ends on SIGTERM or SIGINT and leaves the data path up.

import { Agent } from '../agent/agent.ts';
import { addAmbientConfig } from '../agent/ambient-config.ts';
import { addConflistWatch } from '../agent/conflist.ts';
import { servePorts } from '../agent/http.ts';
import { addKubernetes, clusterAccess } from '../agent/kubernetes/part.ts';
import { createAgentLog } from '../agent/log.ts';
import type { AgentSettings } from '../agent/settings.ts';
import { serveAgentSocket } from '../agent/socket.ts';
import { WorkloadsFile } from '../agent/workloads.ts';
import type { Native } from '../native.ts';

/** @returns the exit code: 0 after a signal, 1 if it could not start */
export async function agent(native: Native, settings: AgentSettings): Promise<number> {
  const log = createAgentLog(settings);
  const signal = firstSignal();
  const close: (() => Promise<void>)[] = [];
  try {
    const running = new Agent(native, settings, log);
    if (settings.workloads !== undefined) {
      const onError = (error: Error) => log.error({ error: error.message }, 'the earlier list of pods stays in force');
      running.directories.push(new WorkloadsFile(settings.workloads, onError));
    }
    const conflist = addConflistWatch(running);
    const access = clusterAccess(settings);
    const kubernetes = access === undefined ? undefined : addKubernetes(running, access);
    await running.start();
    close.unshift(() => running.stop());
    const socket = await serveAgentSocket(running);
    close.unshift(() => socket.close());
    const ports = await servePorts(running);
    close.unshift(() => ports.close());
    log.info({ zds: settings.zdsSocket, monitoring: ports.monitoring, health: ports.health }, 'the agent serves');
    await running.reconcile('start');
    const endConfig = addAmbientConfig({ native, settings, log, zds: () => running.zds });
    close.unshift(async () => endConfig());
    conflist.on('state', () => kubernetes?.look());
    conflist.start();
    close.unshift(async () => conflist.stop());
    kubernetes?.start();
    if (kubernetes !== undefined) close.unshift(() => kubernetes.stop());
    log.info({ signal: await signal }, 'the agent ends; what it attached stays');
    return 0;
  } catch (error) {
    log.fatal({ error: error instanceof Error ? error.message : String(error) }, 'the agent cannot run');
    return 1;
  } finally {
    for (const step of close) await step();
    if (process.connected) process.disconnect();
  }
}

function firstSignal(): Promise<string> {
  return new Promise((resolve) => {
    // Only of a process that was started with a channel, which `demo` does, so that none is left of a killed one.
    process.once('disconnect', () => resolve('disconnect'));
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => resolve(signal));
  });
}
