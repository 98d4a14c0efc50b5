// SPDX-License-Identifier: Apache-2.0
// The command line: what a person or a DaemonSet runs. Loaded only when CNI_COMMAND is not set; each command's code
// is in plugin/cli/. Exit codes: 0, 1 for what failed or is impaired, 2 for wrong usage.

import { Command, CommanderError, InvalidArgumentError, Option } from 'commander';
import { loadNative } from './addon.ts';
import { AGENT_SETTINGS } from './agent/settings.ts';
import { agent } from './cli/agent.ts';
import { counters } from './cli/counters.ts';
import { demo } from './cli/demo.ts';
import { type DirectoryOptions, directoriesOf, settingsOf } from './cli/directories.ts';
import { doctor } from './cli/doctor.ts';
import { enroll, type TrafficOptions } from './cli/enroll.ts';
import { installCommand, uninstallCommand } from './cli/install.ts';
import { pods } from './cli/pods.ts';
import { clearProxies, setProxy, showProxies } from './cli/proxy.ts';
import { status } from './cli/status.ts';
import { processTerminal, type Terminal } from './cli/terminal.ts';
import { trace } from './cli/trace.ts';
import { type UnenrollOptions, unenroll } from './cli/unenroll.ts';
import { waitUninstalled } from './cli/wait-uninstalled.ts';
import { CniError, Code } from './cni/errors.ts';
import { runZtunnel, type ZtunnelProcessOptions } from './demo/ztunnel-process.ts';
import { ownVersion } from './own-version.ts';
import { parseCidr, parsePortRange } from './redirect/config.ts';
import {
  INSTALL_SETTINGS,
  readSettings,
  type SettingTable,
  settingOptions,
  UNINSTALL_SETTINGS,
  WAIT_UNINSTALLED_SETTINGS,
} from './settings.ts';

const WRONG_USAGE = 2;

/** @returns the exit code; never throws for what a command did */
export async function runCommandLine(args: readonly string[], terminal: Terminal = processTerminal()): Promise<number> {
  let exitCode = 0;
  const program = buildProgram(terminal, (code) => {
    exitCode = code;
  });
  try {
    await program.parseAsync(args, { from: 'user' });
    return exitCode;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : WRONG_USAGE;
    terminal.err(`ambient-redirect: ${describe(error)}\n`);
    return 1;
  }
}

type Finish = (exitCode: number) => void;

function buildProgram(terminal: Terminal, finish: Finish): Command {
  const program = new Command('ambient-redirect')
    .description("Redirects the TCP traffic of pods through the node's ambient mesh proxy.")
    .version(ownVersion(), '--version', 'print the version')
    .helpOption('--help', 'show help')
    .helpCommand(false)
    .configureOutput({ writeOut: (text) => terminal.out(text), writeErr: (text) => terminal.err(text) })
    .exitOverride();
  const command = (parent: Command, name: string, description: string) =>
    parent.command(name).description(description).helpOption('--help', 'show help');

  stateOptions(command(program, 'status', 'is the traffic of enrolled pods in order, and what carries it'))
    .addOption(format(['table', 'json']))
    .action(async (options: DirectoryOptions & Format) => {
      finish(await status(loadNative(), terminal, directoriesOf(options), options.output === 'json'));
    });

  stateOptions(command(program, 'pods', 'a row per attachment'))
    .addOption(format(['table', 'wide', 'json']))
    .action((options: DirectoryOptions & Format) => {
      finish(pods(loadNative(), terminal, directoriesOf(options), options.output as 'table' | 'wide' | 'json'));
    });

  stateOptions(command(program, 'counters', 'packets and bytes by program, pod and reason'))
    .addOption(podOption('only this pod'))
    .addOption(format(['table', 'json', 'prometheus']))
    .action((options: DirectoryOptions & Format & { pod?: string }) => {
      const output = options.output as 'table' | 'json' | 'prometheus';
      finish(counters(loadNative(), terminal, directoriesOf(options), output, options.pod));
    });

  stateOptions(command(program, 'trace', 'what the programs decide, packet by packet, until interrupted'))
    .addOption(podOption('only packets of this pod'))
    .option('--reason <reason>', 'only decisions for this reason')
    .addOption(new Option('--count <number>', 'end after that many').argParser(parseCount))
    .addOption(format(['text', 'json']))
    .action(async (options: DirectoryOptions & Format & { pod?: string; reason?: string; count?: number }) => {
      const output = options.output as 'text' | 'json';
      finish(await trace(loadNative(), terminal, directoriesOf(options), { ...options, output }));
    });

  settingsOptions(command(program, 'enroll', 'what ADD does, for a pod that runs already'))
    .requiredOption('--netns <path>', "the pod's network namespace")
    .option('--ifname <name>', 'interface in it', 'eth0')
    .addOption(podOption('whose it is'))
    .option('--service-account <name>', 'its service account')
    .option('--uid <uid>', 'its Kubernetes UID')
    .option('--container-id <id>', 'its sandbox, as the runtime names it')
    .addOption(listOption('--exclude-inbound-ports <list>', 'ports and ranges, also 8000-8100', parsePortRange))
    .addOption(listOption('--exclude-outbound-ports <list>', 'ports and ranges, also 8000-8100', parsePortRange))
    .addOption(listOption('--exclude-outbound-cidrs <list>', 'destinations, as IP prefixes', parseCidr))
    .option('--dns-capture', "its DNS queries go to the proxy's DNS port")
    .option('--no-drain', 'where its contract changes, cut connections that go through the proxy')
    .action(async (options: DirectoryOptions & TrafficOptions & { conf?: string; netns: string; ifname: string }) => {
      finish(await enroll(loadNative(), terminal, settingsOf(options), options));
    });

  const unenrollCommand = settingsOptions(command(program, 'unenroll', "takes a running pod's programs away"))
    .option('--netns <path>', 'the pod with this network namespace')
    .addOption(podOption('the pod of this name'))
    .option('--container-id <id>', 'the pod with this sandbox')
    .option('--no-drain', 'cut connections that go through the proxy')
    .action(async (options: DirectoryOptions & UnenrollOptions & { conf?: string }) => {
      const { netns, pod, containerId } = options;
      if ([netns, pod, containerId].filter((choice) => choice !== undefined).length !== 1) {
        unenrollCommand.error('error: exactly one of --netns, --pod and --container-id is needed');
      }
      finish(await unenroll(loadNative(), terminal, settingsOf(options), options));
    });

  const proxy = command(program, 'proxy', "a proxy that is no pod of this node's runtime").helpCommand(false);
  settingsOptions(command(proxy, 'set', 'new connections go to the proxy in this namespace'))
    .requiredOption('--netns <path>', "the proxy's network namespace")
    .option('--ifname <name>', 'interface in it', 'eth0')
    .addOption(podOption('a name for it'))
    .action((options: DirectoryOptions & { conf?: string; netns: string; ifname: string }) => {
      finish(setProxy(loadNative(), terminal, settingsOf(options), options));
    });
  stateOptions(command(proxy, 'show', 'proxies and their listeners, newest first'))
    .addOption(format(['table', 'json']))
    .action((options: DirectoryOptions & Format) => {
      finish(showProxies(loadNative(), terminal, directoriesOf(options), options.output === 'json'));
    });
  settingsOptions(command(proxy, 'clear', 'undo "proxy set"'))
    .option('--netns <path>', 'the proxy in this namespace, also one that came by ADD')
    .action((options: DirectoryOptions & { conf?: string; netns?: string }) => {
      finish(clearProxies(loadNative(), terminal, settingsOf(options), options.netns));
    });

  stateOptions(command(program, 'doctor', 'what would not work on this machine, and why'))
    .option('--conf-dir <directory>', "the runtime's CNI configurations", '/etc/cni/net.d')
    .addOption(format(['table', 'json']))
    .action((options: DirectoryOptions & Format & { confDir: string }) => {
      finish(doctor(loadNative(), terminal, directoriesOf(options), options.confDir, options.output === 'json'));
    });

  tableOptions(
    command(program, 'install', 'puts executable and entry in place, or what of them is missing'),
    INSTALL_SETTINGS,
  ).action(async (options: Record<string, unknown>) => {
    finish(await installCommand(terminal, readSettings(INSTALL_SETTINGS, options)));
  });
  tableOptions(
    command(program, 'uninstall', 'takes the entry away, then pods, state and executable'),
    UNINSTALL_SETTINGS,
  ).action(async (options: Record<string, unknown>) => {
    finish(await uninstallCommand(terminal, readSettings(UNINSTALL_SETTINGS, options)));
  });
  tableOptions(
    command(program, 'wait-uninstalled', 'until a DaemonSet of uninstalls has left every node; removes the agents'),
    WAIT_UNINSTALLED_SETTINGS,
  ).action(async (options: Record<string, unknown>) => {
    finish(await waitUninstalled(terminal, readSettings(WAIT_UNINSTALLED_SETTINGS, options)));
  });

  const agentCommand = command(program, 'agent', 'the node agent: speaks to ztunnel (ZDS) and to the plugin');
  for (const option of settingOptions(AGENT_SETTINGS)) agentCommand.addOption(option);
  agentCommand.action(async (options: Record<string, unknown>) => {
    finish(await agent(loadNative(), readSettings(AGENT_SETTINGS, options)));
  });

  program
    .command('stand-in-ztunnel', { hidden: true })
    .description('ztunnel of the demo as a process, for tests')
    .requiredOption('--socket <path>')
    .requiredOption('--xds <file>')
    .option('--misbehaviour <json>')
    .option('--drain-ms <ms>')
    .option('--deaf-to <uid>')
    .action(async (options: ZtunnelProcessOptions) => {
      finish(await runZtunnel(loadNative(), terminal, options));
    });

  command(program, 'demo', 'the whole thing in throw-away namespaces, with a proxy of its own')
    .addOption(
      new Option('--contract <contract>', 'how the proxy is reached').choices(['shared', 'in-pod']).default('shared'),
    )
    .addOption(new Option('--family <family>', 'IP versions').choices(['4', '6', 'both']).default('both'))
    .option('--keep', 'leave it up, and print how to look inside')
    .option('--remove <name>', 'take away one that was kept')
    .addOption(new Option('--serve <name>').hideHelp())
    .action(async (options: Parameters<typeof demo>[2]) => {
      finish(await demo(loadNative, terminal, options));
    });
  return program;
}

interface Format {
  output: string;
}

function format(choices: [string, ...string[]]): Option {
  return new Option('-o, --output <format>', 'how to print it').choices(choices).default(choices[0]);
}

function stateOptions(command: Command): Command {
  return command
    .option(
      '--state-dir <directory>',
      'pinned state (default: $AMBIENT_REDIRECT_STATE_DIR, /sys/fs/bpf/ambient-redirect)',
    )
    .option('--run-dir <directory>', 'locks (default: /run/ambient-redirect)');
}

function settingsOptions(command: Command): Command {
  return stateOptions(command).option('--conf <file>', 'settings: a conflist with our entry, or the entry alone');
}

function tableOptions(command: Command, table: SettingTable): Command {
  for (const option of settingOptions(table)) command.addOption(option);
  return command;
}

function parseCount(text: string): number {
  const value = Number(text);
  if (!/^[1-9][0-9]*$/.test(text) || !Number.isSafeInteger(value))
    throw new InvalidArgumentError('It must be 1 or more.');
  return value;
}

/** Comma-separated; `parse` returns undefined for what it refuses. */
function listOption<T>(flags: string, description: string, parse: (text: string) => T | undefined): Option {
  return new Option(flags, description).argParser((text) =>
    text.split(',').map((part) => {
      const value = parse(part.trim());
      if (value === undefined) throw new InvalidArgumentError(`"${part}" will not do.`);
      return value;
    }),
  );
}

function podOption(description: string): Option {
  return new Option('--pod <namespace/name>', description).argParser((text) => {
    if (!/^[^/\s]+\/[^/\s]+$/.test(text)) throw new InvalidArgumentError('It must be NAMESPACE/NAME.');
    return text;
  });
}

/** The error's own words; a stack only for a defect. */
function describe(error: unknown): string {
  if (error instanceof CniError && error.code !== Code.INTERNAL) return error.message;
  // Wrong arguments to the addon, or to Node's own functions.
  if (error instanceof TypeError || error instanceof RangeError) return error.stack ?? error.message;
  return error instanceof Error ? error.message : String(error);
}
