// SPDX-License-Identifier: Apache-2.0
// `install` beside an istio-cni in ambient mode: its entry in the primary's list (of 1.20 and of today), and the list of
// its own that istio-cni writes where it is told to. Refused, replaced, and put back to the byte.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, test } from 'vitest';
import { executable, requireExecutable } from '../e2e/topology.ts';
import { type Outcome, Testbed } from '../netns.ts';

const testbed = Testbed.open();
beforeEach(() => requireExecutable());
afterAll(() => testbed.close());

const primary = [
  '    { "type": "ptp", "ipam": { "type": "host-local", "subnet": "10.1.0.0/24" } }',
  '    { "type": "portmap", "capabilities": { "portMappings": true } }',
];
/** What 1.20's template makes, and what today's agent writes. */
const ISTIO = {
  '1.20': `    {
      "ambient_enabled": true,
      "kubernetes": {
        "cni_bin_dir": "/opt/cni/bin",
        "exclude_namespaces": ["kube-system"],
        "kubeconfig": "/etc/cni/net.d/ZZZ-istio-cni-kubeconfig"
      },
      "log_level": "info",
      "log_uds_address": "/var/run/istio-cni/log.sock",
      "name": "istio-cni",
      "type": "istio-cni"
    }`,
  today: `    {
      "ambient_enabled": true,
      "cni_agent_run_dir": "/var/run/istio-cni",
      "dns": {},
      "enable_ambient_detection_retry": false,
      "enablement_selectors": [
        { "podSelector": { "matchLabels": { "istio.io/dataplane-mode": "ambient" } } }
      ],
      "exclude_namespaces": ["kube-system"],
      "ipam": {},
      "name": "istio-cni",
      "native_nftables": false,
      "plugin_log_level": "info",
      "pod_namespace": "istio-system",
      "type": "istio-cni"
    }`,
} as const;
const list = (...plugins: string[]) =>
  `{\n  "cniVersion": "0.3.1",\n  "name": "k8s-pod-network",\n  "plugins": [\n${plugins.join(',\n')}\n  ]\n}\n`;
const PRIMARY = '10-pods.conflist';
const ISTIO_OWNED = '02-istio-cni.conflist';
const OURS_OWNED = '02-ambient-redirect.conflist';

let directories: string[];
let netDir: string;
let count = 0;
beforeEach(() => {
  count += 1;
  const base = testbed.bpffs(`bpffs-${count}`);
  netDir = testbed.directory(`net.d-${count}`);
  directories = [
    ...['--state-dir', join(base, 'ambient-redirect'), '--run-dir', join(testbed.directory(`run-${count}`), 'run')],
    ...['--cni-net-dir', netDir, '--cni-bin-dir', testbed.directory(`bin-${count}`)],
  ];
});
const node = testbed.namespace('node');
const run = (command: string, ...more: string[]): Promise<Outcome> =>
  node.exec([executable, command, ...directories, ...more]);
const install = (...more: string[]) => run('install', '--enrollment', 'all', '--wait', '0', ...more);
const write = (files: Record<string, string>) => {
  for (const [name, text] of Object.entries(files)) writeFileSync(join(netDir, name), text);
};
const contents = () =>
  Object.fromEntries(readdirSync(netDir).map((name) => [name, readFileSync(join(netDir, name), 'utf8')]));
const chains = () =>
  Object.fromEntries(
    Object.entries(contents()).map(([name, text]) => [
      name,
      (JSON.parse(text) as { plugins: { type: string }[] }).plugins.map(({ type }) => type),
    ]),
  );

/** Refused, with nothing changed. */
async function refused(...more: string[]): Promise<string> {
  const before = contents();
  const { status, stderr } = await install(...more);
  expect(status).toBe(1);
  expect(contents()).toEqual(before);
  return stderr;
}

/** Everything as it was before install. */
async function putBack(before: Record<string, string>): Promise<void> {
  const { status, stderr } = await run('uninstall', '--executable-delay', '0');
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  expect(contents()).toEqual(before);
}

describe.each(Object.entries(ISTIO))('an entry of istio-cni %s', (_, istio) => {
  test('in the primary’s list', async () => {
    write({ [PRIMARY]: list(...primary, istio) });
    const before = contents();
    expect(await refused()).toContain(`${PRIMARY} has an entry of istio-cni with ambient_enabled`);
    expect(await install('--replace-istio-cni')).toMatchObject({ status: 0 });
    expect(chains()).toEqual({ [PRIMARY]: ['ptp', 'portmap', 'ambient-redirect'] });
    await putBack(before);
  });

  test('in Istio’s own list, which is read before the primary’s', async () => {
    write({ [ISTIO_OWNED]: list(...primary, istio), [PRIMARY]: list(...primary) });
    const before = contents();
    expect(await refused()).toContain(`${ISTIO_OWNED} has an entry of istio-cni with ambient_enabled`);
    expect(await install('--replace-istio-cni')).toMatchObject({ status: 0 });
    expect(chains()).toEqual({ [ISTIO_OWNED]: ['ptp', 'portmap', 'ambient-redirect'], [PRIMARY]: ['ptp', 'portmap'] });
    await putBack(before);
  });

  test('in Istio’s own list, and ours is to be a list of its own, too', async () => {
    write({ [ISTIO_OWNED]: list(...primary, istio), [PRIMARY]: list(...primary) });
    const before = contents();
    for (const more of [[], ['--cni-conf-name', PRIMARY]]) {
      expect(await refused('--owned-conflist', ...more)).toContain('an entry of istio-cni with ambient_enabled');
      expect(await install('--owned-conflist', '--replace-istio-cni', ...more)).toMatchObject({ status: 0 });
      expect(chains()).toEqual({
        [OURS_OWNED]: ['ptp', 'portmap', 'ambient-redirect'],
        [ISTIO_OWNED]: ['ptp', 'portmap', 'istio-cni'],
        [PRIMARY]: ['ptp', 'portmap'],
      });
      await putBack(before);
    }
  });

  test('in Istio’s own list, and the primary’s is named, where nobody would call us', async () => {
    write({ [ISTIO_OWNED]: list(...primary, istio), [PRIMARY]: list(...primary) });
    expect(await refused('--cni-conf-name', PRIMARY)).toContain(`${ISTIO_OWNED} is read before ${PRIMARY}`);
    expect(await refused('--cni-conf-name', PRIMARY, '--replace-istio-cni')).toContain(
      `an entry in ${PRIMARY} would never be called; name ${ISTIO_OWNED}, or no file`,
    );
  });
});

test('Istio takes its own list away afterwards: the entry goes into the primary’s', async () => {
  write({ [ISTIO_OWNED]: list(...primary, ISTIO.today), [PRIMARY]: list(...primary) });
  expect(await install('--replace-istio-cni')).toMatchObject({ status: 0 });
  const [[name = '']] = [Object.keys(chains()).filter((each) => each !== PRIMARY)];
  expect(name).toBe(ISTIO_OWNED);
  await node.exec(['rm', join(netDir, name)]);
  expect(await install('--replace-istio-cni')).toMatchObject({ status: 0 });
  expect(chains()).toEqual({ [PRIMARY]: ['ptp', 'portmap', 'ambient-redirect'] });
  await putBack({ [PRIMARY]: list(...primary) });
});

test('for sidecars alone it stays where it is', async () => {
  const sidecars = ISTIO['1.20'].replace('"ambient_enabled": true', '"ambient_enabled": false');
  write({ [PRIMARY]: list(...primary, sidecars) });
  const before = contents();
  expect(await install()).toMatchObject({ status: 0 });
  expect(chains()).toEqual({ [PRIMARY]: ['ptp', 'portmap', 'istio-cni', 'ambient-redirect'] });
  await putBack(before);
});
