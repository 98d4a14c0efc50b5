// SPDX-License-Identifier: Apache-2.0
// npm run bench -- [--quick|--full] [--only TEXT] [--resume] [--publish]
// npm run bench -- publish [DIRECTORY]
// npm run bench -- add [--rounds N] [--attachments 1,1000]
// npm run bench -- agent [--pods 1000]
// npm run bench -- compare EXECUTABLE [--rounds N] [--instructions]

import { parseArgs } from 'node:util';
import { missingControlPlane } from '../kubernetes/build.ts';
import { benchAdd } from './add.ts';
import { benchAgent } from './agent.ts';
import { compareInstructions, comparePackets, compareReport } from './compare.ts';
import { benchEnrolment, enrolmentReport } from './enrolment.ts';
import { peer } from './programs.ts';
import { addReport, report } from './report.ts';
import { benchTraffic, finished, publish } from './traffic.ts';

const USAGE = `usage: npm run bench -- [--quick | --full] [--only TEXT] [--resume] [--publish]
         --quick     under 5 minutes; default under 40 minutes; --full hours
         --only      what matches this regular expression: names of loads (fortio, wrk, rr, crr, iperf, hold,
                     haproxy), programs, add
         --resume    go on with the newest run of this profile that was interrupted
         --publish   write BENCHMARKS.md and its plots from the result
       npm run bench -- publish [DIRECTORY of a result]
       npm run bench -- add [--rounds N] [--attachments N,N]
       npm run bench -- agent [--pods N]
       npm run bench -- compare EXECUTABLE [--rounds N] [--instructions]
                     the programs of this checkout and of another build, by turns; --instructions counts what is
                     executed for a packet, in an emulated machine
`;

function refuse(): never {
  process.stderr.write(USAGE);
  process.exit(2);
}

const { values, positionals } = (() => {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        quick: { type: 'boolean', default: false },
        full: { type: 'boolean', default: false },
        only: { type: 'string' },
        resume: { type: 'boolean', default: false },
        publish: { type: 'boolean', default: false },
        rounds: { type: 'string', default: '30' },
        attachments: { type: 'string', default: '1,1000' },
        instructions: { type: 'boolean', default: false },
        inside: { type: 'boolean', default: false },
        pods: { type: 'string', default: '1000' },
      },
    });
  } catch {
    refuse();
  }
})();
const [what, ...more] = positionals;
if (more.length > (what === 'publish' || what === 'compare' ? 1 : 0) || (values.quick && values.full)) refuse();
if (values.publish && (values.quick || values.only !== undefined)) refuse();

async function compare(other: string): Promise<void> {
  const note = (text: string) => process.stderr.write(`${text}\n`);
  const rounds = Number(values.rounds);
  if (!(rounds > 0)) refuse();
  if (values.inside) {
    const counted = await comparePackets({ other, rounds: 2, repeat: 1000, prefix: [], note });
    process.stdout.write(JSON.stringify(counted));
  } else if (values.instructions) {
    process.stdout.write(compareReport(await compareInstructions(other), 'instructions'));
  } else {
    // Nobody else's time slice falls into a run.
    const prefix = ['chrt', '-f', '20', 'taskset', '-c', '1'];
    process.stdout.write(compareReport(await comparePackets({ other, rounds, repeat: 5000, prefix, note }), 'ns'));
  }
}

async function main(): Promise<void> {
  if (what === 'add') {
    const rounds = Number(values.rounds);
    const attachments = values.attachments.split(',').map(Number);
    if (!(rounds > 0) || !attachments.every((count) => Number.isInteger(count) && count >= 0)) refuse();
    const programs = { peer: await peer(), fortio: undefined };
    const note = (text: string) => process.stderr.write(`${text}\n`);
    const costs = await benchAdd(programs, {
      rounds,
      atOnceRounds: Math.ceil(rounds / 5),
      attachments,
      seconds: 0.5,
      note,
    });
    process.stdout.write(addReport(costs));
  } else if (what === 'agent') {
    const pods = Number(values.pods);
    if (!Number.isInteger(pods) || pods < 1) refuse();
    const note = (text: string) => process.stderr.write(`${text}\n`);
    await benchAgent(pods);
    const missing = missingControlPlane();
    if (missing === undefined) {
      process.stdout.write(enrolmentReport(await benchEnrolment({ pods, flips: 100, idleSeconds: 60, note })));
    } else note(`enrolment through the API not run: ${missing}`);
  } else if (what === undefined) {
    const { directory, result } = await benchTraffic({
      profile: values.quick ? 'quick' : values.full ? 'full' : 'default',
      ...(values.only !== undefined && { only: values.only }),
      resume: values.resume,
    });
    process.stdout.write(report(result));
    process.stderr.write(`results, tables and plots: ${directory}\n`);
    if (values.publish) process.stderr.write(`written: ${(await publish(result)).join(', ')}\n`);
    if (result.runs.some((run) => run.invalid !== undefined)) process.exitCode = 1;
  } else if (what === 'compare') {
    await compare(more[0] ?? refuse());
  } else if (what === 'publish') {
    process.stderr.write(`written: ${(await publish(finished(more[0]).result)).join(', ')}\n`);
  } else {
    refuse();
  }
}

try {
  await main();
} catch (error) {
  process.stderr.write(`bench: ${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
}
