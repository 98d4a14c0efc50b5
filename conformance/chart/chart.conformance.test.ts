// SPDX-License-Identifier: Apache-2.0
//
// The chart with a real helm: what it renders is what was reviewed, what it refuses it refuses with words, and what it
// sets is what the executable reads.

import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import { AGENT_SETTINGS } from '../../plugin/agent/settings.ts';
import { parseConfig } from '../../plugin/redirect/config.ts';
import {
  CONFLIST_SETTINGS,
  DIRECTORY_SETTINGS,
  ENTRY_SETTINGS,
  INSTALL_SETTINGS,
  readSettings,
  type SettingTable,
  UNINSTALL_SETTINGS,
  WAIT_UNINSTALLED_SETTINGS,
} from '../../plugin/settings.ts';
import { exec } from '../netns.ts';
import { CHART, helm, helmProgram, missingHelm } from './helm.ts';
import { type KubernetesObject, MATRIX, objectsOf, type Rendering, render, SNAPSHOTS } from './render.ts';

const ROOT = join(import.meta.dirname, '../..');

interface Container {
  name: string;
  args: string[];
  env: { name: string; value?: string }[];
  securityContext: Record<string, unknown>;
}

interface PodSpec {
  initContainers?: Container[];
  containers: Container[];
}

const one = (name: string): Rendering => {
  const found = MATRIX.find((each) => each.name === name);
  if (found === undefined) throw new Error(`no rendering is called ${name}`);
  return found;
};

function containersOf(objects: readonly KubernetesObject[]): Container[] {
  return objects.flatMap(({ spec }) => {
    const pod = (spec as { template?: { spec: PodSpec } } | undefined)?.template?.spec;
    return pod === undefined ? [] : [...(pod.initContainers ?? []), ...pod.containers];
  });
}

/** Variables by the command that the container runs. */
function variablesOf(objects: readonly KubernetesObject[]): Map<string, Map<string, string>> {
  return new Map(
    containersOf(objects).map(({ args, env }) => [
      args[0] ?? '',
      new Map(env.map(({ name, value }) => [name, value ?? 'NODE'])),
    ]),
  );
}

function entryOf(objects: readonly KubernetesObject[]): Record<string, unknown> {
  const map = objects.find(({ kind }) => kind === 'ConfigMap') as { data?: Record<string, string> } | undefined;
  return JSON.parse(map?.data?.['entry.json'] ?? '') as Record<string, unknown>;
}

describe.runIf(missingHelm() === undefined)('the chart, with helm (optional)', () => {
  beforeAll(async () => {
    await helmProgram();
  }, 3_000_000);

  test('helm lint --strict', async () => {
    const values = MATRIX.flatMap(({ values }) => values).filter((file, i, all) => all.indexOf(file) === i);
    for (const file of values) {
      const outcome = await helm(['lint', '--strict', CHART, '--values', join(import.meta.dirname, 'values', file)]);
      expect(outcome, outcome.stdout).toMatchObject({
        status: 0,
        stdout: expect.stringContaining('0 chart(s) failed'),
      });
    }
  });

  test('there is a snapshot for each rendering, and no other', () => {
    expect(readdirSync(SNAPSHOTS).sort()).toEqual(MATRIX.map(({ name }) => `${name}.yaml`).sort());
  });

  test.each(MATRIX)('$name renders to its snapshot', async (rendering) => {
    const rendered = await render(rendering);
    expect(rendered, 'node conformance/chart/render.ts writes them anew').toBe(
      readFileSync(join(SNAPSHOTS, `${rendering.name}.yaml`), 'utf8'),
    );
    // A key that is there twice is an error of the parser's.
    expect(objectsOf(rendered).length).toBeGreaterThan(4);
  });

  test.each([
    ['entry.failurePolicy=ajar', "at '/entry/failurePolicy': value must be one of 'closed', 'open'"],
    ['entry.failurPolicy=open', "at '/entry': additional properties 'failurPolicy' not allowed"],
    ['entry.proxy.ports.outbound=70000', "at '/entry/proxy/ports/outbound': maximum: got 70,000, want 65,535"],
    ['cni.ambient.redirectMode=nftables', "at '/cni/ambient/redirectMode': value must be one of"],
    ['maxPods=4096', "at '': additional properties 'maxPods' not allowed"],
    ['cni.maxPods=4096', "at '/cni': additional properties 'maxPods' not allowed"],
    ['agent.healthPort=0', "at '/agent/healthPort': minimum: got 0, want 1"],
    ['agent.stateDir=/var/lib/state', "at '/agent/stateDir': '/var/lib/state' does not match pattern"],
    ['logging.level=loud', "at '/logging/level': 'loud' does not match pattern"],
    ['cniConfDir=etc/cni', "at '/cniConfDir': 'etc/cni' does not match pattern"],
    ['uninstall.timeout=soon', "at '/uninstall/timeout': 'soon' does not match pattern"],
    [
      'cni.ambient.redirectMode=iptables',
      'ambient.redirectMode is iptables: this chart redirects with eBPF and nothing',
    ],
    ['cni.ambient.enabled=false', 'ambient.enabled is false: this chart is nothing but ambient redirection'],
    [
      'cni.chained=false',
      'chained is false: the plugin works on an interface that another plugin of its list has made',
    ],
    ['cni.image=install-cni', "image is install-cni: that is Istio's own node agent"],
    ['updateStrategy.rollingUpdate.maxSurge=1', 'maxSurge has to be 0: a node has one agent'],
  ])('%s is refused', async (value, words) => {
    const refusal = await render(one('default'), ['--set', value]).then(
      () => '',
      (error: Error) => error.message,
    );
    expect(refusal).toContain(words);
  });

  test('an older Kubernetes is refused', async () => {
    await expect(render({ ...one('default'), kubeVersion: '1.24.0' })).rejects.toThrow(
      /chart requires kubeVersion: >=1.25.0-0/,
    );
  });

  describe('istio-cni', () => {
    test('redirectMode under cni., as in 1.20: contract shared, and the agent is told', async () => {
      const objects = objectsOf(await render(one('default'), ['--set', 'cni.ambient.redirectMode=ebpf']));
      expect(parseConfig(entryOf(objects)).proxy.contract).toBe('shared');
      const environment = Object.fromEntries(variablesOf(objects).get('agent') ?? []);
      const agent = readSettings(AGENT_SETTINGS, {}, environment);
      expect(agent).toMatchObject({ redirectMode: 'ebpf', ambientConfigDir: '/etc/ambient-config' });
      // The socket of an istio-cni that serves the ztunnels of another contract is not touched.
      expect(agent.zdsSocket).toBe('/run/ambient-redirect/ztunnel.sock');
    });

    test("1.20's values say the same as the words of today", async () => {
      const istio = objectsOf(await render(one('istio-1.20')));
      const agent = variablesOf(istio).get('agent');
      expect(agent?.get('LOG_LEVEL')).toBe('debug');
      expect(parseConfig(entryOf(istio))).toMatchObject({ logLevel: 'debug', dnsCapture: false });
      expect(parseConfig(entryOf(istio)).excludeNamespaces).toEqual(['istio-system', 'kube-system']);
      const flat = await render(one('default'), [
        ...[
          '--set',
          'ambient.redirectMode=ebpf,logging.level=debug,logLevel=debug,hub=registry.example/mesh,tag=0.1.0',
        ],
        ...['--set', 'excludeNamespaces={istio-system,kube-system},global.imagePullSecrets={regcred}'],
        ...['--set', 'resources.requests.memory=100Mi,rollingMaxUnavailable=1'],
      ]);
      expect(objectsOf(flat)).toEqual(istio);
    });

    test('on GKE the plugins are where GKE has them, as in its own chart', async () => {
      const variables = variablesOf(objectsOf(await render(one('gke'))));
      expect(variables.get('install')?.get('CNI_BIN_DIR')).toBe('/home/kubernetes/bin');
    });

    const notes = async (file: string, more: string[] = []) => {
      const values = join(import.meta.dirname, 'values', file);
      const { status, stdout, stderr } = await helm([
        ...['install', 'ambient-redirect', CHART, '--dry-run=client', '--namespace', 'istio-system'],
        ...['--values', values, ...more],
      ]);
      expect({ status, stderr: status === 0 ? '' : stderr }).toEqual({ status: 0, stderr: '' });
      return stdout.slice(stdout.indexOf('\nNOTES:\n'));
    };

    test('NOTES names every value without meaning that was given, and why', async () => {
      const named = (text: string) => [...text.matchAll(/^- ([\w.]+): .+$/gm)].map(([, path]) => path ?? '');
      expect(named(await notes('default.yaml'))).toEqual([]);
      const ignored = parse(readFileSync(join(CHART, 'files/ignored.yaml'), 'utf8')) as Record<string, string>;
      const istio = [...named(await notes('istio-1.20.yaml')), ...named(await notes('istio-today.yaml'))];
      // What Istio's own files do not have, or have empty.
      const others = ['global.nativeNftables', 'global.platform', 'global.resourceScope', 'global.variant'].concat([
        'ownerName',
        'psp_cluster_role',
        'variant',
      ]);
      const given = others.flatMap((path) => ['--set', `${path}=${path === 'global.nativeNftables' ? 'true' : 'x'}`]);
      const rest = named(await notes('default.yaml', given));
      expect([...istio, ...rest].filter((path, i, all) => all.indexOf(path) === i).sort()).toEqual(
        Object.keys(ignored).sort(),
      );
      expect(rest.sort()).toEqual(others);
    });

    test('NOTES says what is given up', async () => {
      expect(await notes('no-uninstall.yaml')).toContain('`helm uninstall` leaves conflist entry');
      expect(await notes('default.yaml', ['--set', 'hostPID=false'])).toContain("can forge ztunnel's mark");
      expect(await notes('default.yaml', ['--set', 'cni.ambient.redirectMode=ebpf'])).toContain(
        'ambient Writing ambient config: {"ztunnelReady":true,"redirectMode":"eBPF"}',
      );
    });
  });

  describe('what the chart sets is what the executable reads', () => {
    const commands: Record<string, SettingTable> = {
      install: INSTALL_SETTINGS,
      agent: AGENT_SETTINGS,
      uninstall: UNINSTALL_SETTINGS,
      'wait-uninstalled': WAIT_UNINSTALLED_SETTINGS,
    };

    /** Settings that no value reaches, and why. */
    const unset: Record<string, string[]> = {
      // entry: the file of AMBIENT_REDIRECT_CONF has what they would say. chained: false is refused.
      install: [...Object.keys(ENTRY_SETTINGS).filter((name) => name !== 'conf'), 'chained'],
      // workloads: for nodes without Kubernetes. The files are where Kubernetes puts them.
      agent: ['workloads', 'kubeCaFile', 'kubeTokenFile'],
      uninstall: ['kubeCaFile', 'kubeTokenFile', 'cniCacheDir'],
      'wait-uninstalled': ['kubeCaFile', 'kubeTokenFile'],
    };

    test.each(MATRIX)('$name: no variable but those', async (rendering) => {
      for (const [command, variables] of variablesOf(objectsOf(await render(rendering)))) {
        const table = commands[command];
        if (table === undefined) throw new Error(`no command ${command}`);
        const known = Object.values(table).flatMap(({ environment }) => environment);
        // `env` goes to all containers, and the second of these is the agent's.
        const extra = rendering.name === 'everything' ? ['EXTRA', 'AMBIENT_REDIRECT_RECONCILE_SECONDS'] : [];
        expect([...variables.keys()].filter((name) => !known.includes(name) && !extra.includes(name))).toEqual([]);
        expect(() => readSettings(table, {}, Object.fromEntries(variables))).not.toThrow();
      }
    });

    test('each setting can be reached by a value', async () => {
      const variables = variablesOf(objectsOf(await render(one('everything'))));
      expect([...variables.keys()].sort()).toEqual(Object.keys(commands).sort());
      for (const [command, table] of Object.entries(commands)) {
        const given = variables.get(command) ?? new Map();
        const missing = Object.entries(table)
          .filter(([, { environment }]) => !environment.some((name) => given.has(name)))
          .map(([name]) => name);
        expect({ command, missing: missing.sort() }).toEqual({ command, missing: unset[command]?.sort() });
      }
    });

    test('where both have a directory it is the same', async () => {
      for (const name of ['default', 'everything']) {
        const variables = variablesOf(objectsOf(await render(one(name))));
        const read = (command: string, table: SettingTable) =>
          readSettings(table, {}, Object.fromEntries(variables.get(command) ?? []));
        const { stateDir, runDir, cniNetDir, cniBinDir } = read('install', INSTALL_SETTINGS);
        expect(read('agent', AGENT_SETTINGS)).toMatchObject({ stateDir, runDir });
        expect(read('uninstall', UNINSTALL_SETTINGS)).toMatchObject({ stateDir, runDir, cniNetDir, cniBinDir });
      }
      expect(Object.keys(DIRECTORY_SETTINGS)).toEqual(['stateDir', 'runDir', 'cniNetDir', 'cniBinDir']);
      expect(Object.keys(CONFLIST_SETTINGS)).toContain('ownedConflistName');
    });

    test.each(MATRIX)('$name: the entry is one that the plugin takes', async (rendering) => {
      const entry = entryOf(objectsOf(await render(rendering)));
      expect(() => parseConfig(entry)).not.toThrow();
    });

    test("the entry's schema has the plugin's keys, and everything.yaml gives each", async () => {
      const schema = JSON.parse(readFileSync(join(CHART, 'values.schema.json'), 'utf8')) as {
        definitions: { entry: { properties: Record<string, unknown> } };
      };
      const directories = ['stateDir', 'runDir'];
      const keys = Object.keys(parseConfig({})).filter((key) => !directories.includes(key));
      expect(Object.keys(schema.definitions.entry.properties).sort()).toEqual([...keys, 'capabilities'].sort());
      const given = parseConfig(entryOf(objectsOf(await render(one('everything'))))) as unknown as Record<
        string,
        unknown
      >;
      const preset = parseConfig({}) as unknown as Record<string, unknown>;
      for (const key of keys) expect({ [key]: given[key] }).not.toEqual({ [key]: preset[key] });
    });
  });
});

test("the chart's version is the project's", () => {
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string };
  expect(parse(readFileSync(join(CHART, 'Chart.yaml'), 'utf8'))).toMatchObject({ version, appVersion: version });
});

test("the README's table of values is that of values.yaml", async () => {
  const outcome = await exec([process.execPath, join(ROOT, '.ci/chart-values.mjs')]);
  expect(outcome).toMatchObject({ status: 0, stdout: '', stderr: '' });
});
