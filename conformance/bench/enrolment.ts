// SPDX-License-Identifier: Apache-2.0
//
// What the agent costs and how long a label takes: pods of a real API server that run already are enrolled from a cold
// start, then one pod's label goes to and fro, then nothing happens.

import { readFileSync, readlinkSync } from 'node:fs';
import { loadavg } from 'node:os';
import { basename } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import { ControlPlane } from '../kubernetes/control-plane.ts';
import { Site } from '../kubernetes/site.ts';
import { Testbed, until } from '../netns.ts';
import { quantile } from './statistics.ts';

export interface EnrolmentCosts {
  pods: number;
  /** seconds from the agent's start until every pod is attached and annotated */
  coldStart: number;
  /** MiB: when all are enrolled, and the most until then */
  rss: number;
  peakRss: number;
  /** seconds that nothing else could be done in, at most, while pods were enrolled */
  eventLoopLag: number;
  /** milliseconds from sending the label until the programs are attached */
  labelToRedirected: { p50: number; p99: number; samples: number };
  /** of one processor, while nothing changes */
  idleCpu: number;
  /** of the machine's last minute when the agent was started */
  load: number;
  /** what the API server refused while the pods were made, before the agent was started */
  refusals: readonly string[];
}

/** An API server and an agent on two processors with a load of 25 need a quarter of it. */
const COLD_START_LIMIT_MS = 1_200_000;
/** Also how exact the cold start is. */
const ASK_EVERY_MS = 200;
const NAMESPACE = 'bench';
const MODE = 'istio.io/dataplane-mode';

export async function benchEnrolment(options: {
  pods: number;
  flips: number;
  idleSeconds: number;
  note: (text: string) => void;
}): Promise<EnrolmentCosts> {
  const { note } = options;
  using testbed = Testbed.open();
  const plane = await ControlPlane.start(testbed);
  await plane.createNamespace(NAMESPACE, { [MODE]: 'ambient' });
  const site = await Site.start(plane, 'bench');
  try {
    note(`${options.pods} pods that run already`);
    await site.idlePods(NAMESPACE, options.pods);

    note('cold start');
    const load = loadavg()[0] ?? 0;
    const started = performance.now();
    const agent = site.startAgent();
    let lag = 0;
    // The first value has the start in it: until then nobody could ask.
    let asked = false;
    for (let annotated = 0; annotated < options.pods; ) {
      if (!agent.alive) throw new Error(`the agent ended: ${agent.output.slice(-2_000)}`);
      if (performance.now() - started > COLD_START_LIMIT_MS) {
        throw new Error(
          `${annotated} of ${options.pods} pods annotated; the agent said: ${agent.output.slice(-2_000)}`,
        );
      }
      await new Promise((resolve) => setTimeout(resolve, ASK_EVERY_MS));
      const page = await metrics(site);
      const value = (name: string) => Number(page?.find((line) => line.startsWith(`${name} `))?.split(' ')[1] ?? 0);
      if (asked) lag = Math.max(lag, value('nodejs_eventloop_lag_max_seconds'));
      asked ||= page !== undefined;
      annotated = value('ambient_redirect_enrolments_total{event="annotated"}');
    }
    const coldStart = (performance.now() - started) / 1000;
    const pid = agentPid(agent.pid);
    const [rss, peakRss] = [memory(pid, 'VmRSS'), memory(pid, 'VmHWM')];

    note('label to redirected');
    const labelToRedirected = await flip(site, options.flips);

    note(`idle for ${options.idleSeconds} s`);
    const before = processorSeconds(pid);
    const since = performance.now();
    await new Promise((resolve) => setTimeout(resolve, options.idleSeconds * 1_000));
    const idleCpu = (processorSeconds(pid) - before) / ((performance.now() - since) / 1000);
    const { refusals } = site;
    return {
      pods: options.pods,
      coldStart,
      rss,
      peakRss,
      eventLoopLag: lag,
      labelToRedirected,
      idleCpu,
      load,
      refusals,
    };
  } finally {
    await site.close();
  }
}

/** Lines of the agent's page, by something that costs little beside what is measured; undefined: no answer. */
async function metrics(site: Site): Promise<string[] | undefined> {
  const outcome = await site.topology.node.exec(['curl', '-sf', '-m', '5', 'http://127.0.0.1:15014/metrics']);
  return outcome.status === 0 ? outcome.stdout.split('\n') : undefined;
}

/** One pod, out by its label and in again. */
async function flip(site: Site, flips: number): Promise<EnrolmentCosts['labelToRedirected']> {
  const native = loadNative();
  const state = native.openState(site.topology.stateDir);
  try {
    const path = `/api/v1/namespaces/${NAMESPACE}/pods/pod-0`;
    const found = native.listAttachments(state).find(({ record }) => record.podName === 'pod-0');
    if (found === undefined) throw new Error('pod-0 is not recorded');
    const attached = () => native.getAttachment(state, found.key)?.state === 'attached';
    const samples: number[] = [];
    for (let i = 0; i < flips; i++) {
      await site.plane.label(path, { [MODE]: 'none' });
      await until('it is detached', () => !attached(), 20_000);
      const sent = performance.now();
      const answered = site.plane.label(path, { [MODE]: null });
      while (!attached()) await new Promise(setImmediate);
      samples.push(performance.now() - sent);
      await answered;
    }
    return { p50: quantile(samples, 0.5), p99: quantile(samples, 0.99), samples: samples.length };
  } finally {
    native.closeState(state);
  }
}

/** setpriv and nsenter become the agent. */
function agentPid(pid: number): number {
  const program = readlinkSync(`/proc/${pid}/exe`);
  if (basename(program) !== 'ambient-redirect') throw new Error(`process ${pid} is ${program}, not the agent`);
  return pid;
}

function memory(pid: number, field: 'VmRSS' | 'VmHWM'): number {
  const line = readFileSync(`/proc/${pid}/status`, 'latin1')
    .split('\n')
    .find((one) => one.startsWith(`${field}:`));
  return Number(line?.split(/\s+/)[1] ?? 0) / 1024;
}

/** utime and stime; USER_HZ is 100. */
function processorSeconds(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

export function enrolmentReport(costs: EnrolmentCosts): string {
  const { labelToRedirected: label } = costs;
  const rows = [
    ['pods enrolled from a cold start', `${costs.pods}`],
    ['… until all are attached and annotated', `${costs.coldStart.toFixed(1)} s`],
    ['… longest that the event loop was busy', `${(costs.eventLoopLag * 1000).toFixed(0)} ms`],
    ['memory then (RSS), and the most until then', `${costs.rss.toFixed(0)} MiB, ${costs.peakRss.toFixed(0)} MiB`],
    [`label to redirected, ${label.samples} times`, `p50 ${label.p50.toFixed(1)} ms, p99 ${label.p99.toFixed(1)} ms`],
    ['processor while nothing changes', `${(costs.idleCpu * 100).toFixed(1)} % of one`],
    ['load of the machine before', costs.load.toFixed(1)],
    ['API server', 'its etcd does not wait for the disk (--unsafe-no-fsync), everything on this machine'],
    ['… requests it refused while pods were made', refusedText(costs.refusals)],
  ];
  return `${rows.map(([what = '', value]) => `${what.padEnd(46)}${value}`).join('\n')}\n`;
}

function refusedText(refusals: readonly string[]): string {
  const [first] = refusals;
  return first === undefined ? '0' : `${refusals.length}, sent again; the first: ${first}`;
}
