// SPDX-License-Identifier: Apache-2.0
// A chained plugin that changes nothing: it writes down how the runtime calls it and hands prevResult on, but refuses
// ADD for pods of the name `refusedPod`.
// Run as `node recorder.ts FILE`; each call becomes one line of FILE, a `Call` as JSON.
import { appendFileSync, readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

export const refusedPod = 'refused';

export type NetworkConfiguration = {
  cniVersion: string;
  name: string;
  type: string;
  prevResult?: { ips?: { address: string }[] };
  runtimeConfig?: Record<string, unknown>;
};
export type Call = {
  /** The CNI_* variables only. */
  environment: Record<string, string>;
  stdin: NetworkConfiguration;
};

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [file] = process.argv.slice(2);
  if (!file) throw new Error('usage: recorder.ts FILE');
  const stdin = JSON.parse(readFileSync(0, 'utf8')) as NetworkConfiguration;
  const environment = Object.fromEntries(Object.entries(process.env).filter(([key]) => key.startsWith('CNI_')));
  // One write of less than a page to a file opened with O_APPEND: parallel calls do not mix.
  appendFileSync(file, `${JSON.stringify({ environment, stdin })}\n`);
  if (environment.CNI_COMMAND === 'ADD') {
    if (environment.CNI_ARGS?.split(';').includes(`K8S_POD_NAME=${refusedPod}`)) {
      const error = { cniVersion: stdin.cniVersion, code: 100, msg: 'refused', details: 'as the test asks for' };
      process.stdout.write(JSON.stringify(error));
      process.exitCode = 1;
    } else {
      process.stdout.write(JSON.stringify(stdin.prevResult));
    }
  }
}

/** The calls written to `file` so far. */
export function recordedCalls(file: string): Call[] {
  return readFileSync(file, 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Call);
}
