// SPDX-License-Identifier: Apache-2.0
//
// npm run conformance -- --plugin PATH --conf FILE [--json]: runs the CNI rules against any chained plugin.

import { accessSync, constants, readFileSync } from 'node:fs';
import { basename, resolve } from 'node:path';
import { Command, CommanderError } from 'commander';
import type { SubjectOptions } from './cases/subject.ts';
import { isObject, type JsonObject } from './runtime.ts';
import { conformance, type Finding, RULES, selected } from './suite.ts';

function json(text: string, what: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`${what}: ${error instanceof Error ? error.message : error}`);
  }
  if (!isObject(value)) throw new Error(`${what}: not a JSON object`);
  return value;
}

/** The plugin's entry: the file itself, or the one of its `plugins` that has the plugin's name for type. */
function entryOf(conf: JsonObject, plugin: string, file: string): JsonObject {
  if (!Array.isArray(conf.plugins)) return conf;
  const entry = conf.plugins.filter(isObject).find((one) => one.type === basename(plugin));
  if (!entry) throw new Error(`${file}: no plugin of type ${basename(plugin)} in it`);
  return entry;
}

const COLOURS = { pass: 32, fail: 31, 'not applicable': 90 };

function line({ id, version, verdict, level, title, spec, reason }: Finding): string {
  const word = { pass: 'pass', fail: 'FAIL', 'not applicable': 'n/a ' }[verdict];
  const shown = process.stdout.isTTY ? `\x1b[${COLOURS[verdict]}m${word}\x1b[0m` : word;
  const first = `${shown}  ${id.padEnd(6)} ${(version ?? '').padEnd(5)}  ${level.padEnd(8)}  ${title}  [${spec}]`;
  return reason && verdict !== 'pass' ? `${first}\n      ${reason}` : first;
}

async function main(): Promise<number> {
  const program = new Command('conformance')
    .description('Runs the rules of the CNI specification against a chained plugin, in throw-away namespaces.')
    .option('--plugin <path>', 'the executable')
    .option(
      '--conf <file>',
      `its entry of a conflist's plugins, or a conflist; \${DIR} and \${BPFFS} in it are replaced`,
    )
    .option('--cap-args <json>', 'capability arguments of the runtime, for capabilities that the entry declares')
    .option('--bad-keys <json>', "keys that make the plugin's own configuration invalid")
    .option('--live-state <regexp>', 'keys of kernel state that packets may change while a pod lives')
    .option('--pass-through', 'the plugin promises not to change the Result')
    .option('--rules <ids>', 'only these rules or families, with commas: A4,A5.1')
    .option('--list', 'print the rules and end')
    .option('--json', 'print one JSON document instead of lines')
    .exitOverride();
  program.parse();
  const options = program.opts<{
    plugin?: string;
    conf?: string;
    capArgs?: string;
    badKeys?: string;
    passThrough?: boolean;
    liveState?: string;
    rules?: string;
    list?: boolean;
    json?: boolean;
  }>();
  const only = options.rules?.split(',') ?? [];
  selected(only);
  if (options.list) {
    for (const rule of RULES)
      console.log(`${rule.id.padEnd(6)}  ${rule.level.padEnd(8)}  ${rule.title}  [${rule.spec}]`);
    return 0;
  }
  if (!options.plugin || !options.conf) throw new Error('--plugin and --conf are needed (or --list)');
  const plugin = resolve(options.plugin);
  try {
    accessSync(plugin, constants.X_OK);
  } catch {
    throw new Error(`${plugin}: no such executable`);
  }
  const subject: SubjectOptions = {
    plugin,
    entry: entryOf(json(readFileSync(options.conf, 'utf8'), options.conf), plugin, options.conf),
    passThrough: options.passThrough ?? false,
    ...(options.liveState && { liveState: new RegExp(options.liveState) }),
    ...(options.capArgs && { capabilityArgs: json(options.capArgs, '--cap-args') }),
    ...(options.badKeys && { badKeys: json(options.badKeys, '--bad-keys') }),
  };
  const findings = await conformance(subject, only, (finding) => {
    if (!options.json) console.log(line(finding));
  });
  const count = (verdict: Finding['verdict']) => findings.filter((one) => one.verdict === verdict).length;
  const summary = { passed: count('pass'), failed: count('fail'), notApplicable: count('not applicable') };
  if (options.json) console.log(JSON.stringify({ plugin, ...summary, findings }, null, 2));
  else console.log(`\n${summary.passed} passed, ${summary.failed} failed, ${summary.notApplicable} not applicable`);
  return summary.failed === 0 ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2;
  } else {
    const cause =
      error instanceof Error && error.cause ? `\n${String((error.cause as Error).stack ?? error.cause)}` : '';
    console.error(`conformance: ${error instanceof Error ? error.message : error}${cause}`);
    process.exitCode = 2;
  }
}
