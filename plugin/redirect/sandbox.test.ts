// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { formatAddress, parseAddress } from '../cni/address.ts';
import { validateResult } from '../cni/result.ts';
import { selectPodInterface, uniqueAddresses } from './sandbox.ts';

/** '' and "?..." cannot be opened, "own..." is the pod's. */
const isOwnNetns = (path: string) => (path === '' || path.startsWith('?') ? undefined : path.startsWith('own'));

function select(interfaces: unknown, ips: unknown) {
  const result = validateResult({ interfaces, ips }, '1.0.0');
  const { index, mac, addresses } = selectPodInterface(result, 'eth0', isOwnNetns);
  return { index, mac, addresses: addresses.map(formatAddress) };
}

const HOST = { name: 'veth1', mac: '02:00:00:00:00:01' };
const POD = { name: 'eth0', mac: '02:00:00:00:00:02', sandbox: 'own' };
const ip = (address: string, owner?: number | null) => ({ address, ...(owner !== undefined && { interface: owner }) });

test.each<[string, unknown, unknown, { index?: number; mac?: string; addresses: string[] }]>([
  ['ptp', [HOST, POD], [ip('10.0.0.2/24', 1)], { index: 1, mac: POD.mac, addresses: ['10.0.0.2'] }],
  [
    'both families, several each',
    [HOST, POD],
    [ip('10.0.0.2/24', 1), ip('fd00::2/64', 1), ip('10.0.1.2/24', 1)],
    { index: 1, mac: POD.mac, addresses: ['10.0.0.2', 'fd00::2', '10.0.1.2'] },
  ],
  [
    "another interface's address",
    [HOST, POD],
    [ip('10.0.0.1/24', 0), ip('10.0.0.2/24', 1)],
    { index: 1, mac: POD.mac, addresses: ['10.0.0.2'] },
  ],
  [
    'index absent, null, negative, out of range',
    [HOST, POD],
    [ip('10.0.0.2/24'), ip('10.0.0.3/24', null), ip('10.0.0.4/24', -1), ip('10.0.0.5/24', 2)],
    { index: 1, mac: POD.mac, addresses: ['10.0.0.2', '10.0.0.3', '10.0.0.4', '10.0.0.5'] },
  ],
  ['no interfaces', undefined, [ip('10.0.0.2/24', 0)], { addresses: ['10.0.0.2'] }],
  ['nothing', null, null, { addresses: [] }],
  ['only a host interface', [HOST], [ip('10.0.0.2/24'), ip('10.0.0.1/24', 0)], { addresses: ['10.0.0.2'] }],
  ['eth0 of the host', [{ name: 'eth0', sandbox: '' }], [ip('10.0.0.2/24', 0)], { addresses: [] }],
  ['eth0 of another netns', [{ ...POD, sandbox: 'other' }], [ip('10.0.0.2/24', 0)], { addresses: [] }],
  ['sandbox that cannot be opened', [{ ...POD, sandbox: '?gone' }], [], { index: 0, mac: POD.mac, addresses: [] }],
  [
    'a certain entry beats one that cannot be opened',
    [{ ...POD, mac: '', sandbox: '?gone' }, POD],
    [ip('10.0.0.2/24', 1)],
    { index: 1, mac: POD.mac, addresses: ['10.0.0.2'] },
  ],
  ['no MAC', [{ name: 'eth0', sandbox: 'own' }], [], { index: 0, addresses: [] }],
  [
    'MAC written otherwise',
    [{ ...POD, mac: '02-00-5E-00-00-AA' }],
    [],
    { index: 0, mac: '02:00:5e:00:00:aa', addresses: [] },
  ],
  [
    "nonsense in other interfaces' MACs",
    [{ name: 'dummy1', mac: '0', sandbox: '0' }, POD],
    [],
    { index: 1, mac: POD.mac, addresses: [] },
  ],
  [
    'twice the same address',
    [POD],
    [ip('10.0.0.2/24', 0), ip('::ffff:10.0.0.2/120')],
    { index: 0, mac: POD.mac, addresses: ['10.0.0.2'] },
  ],
])('%s', (_name, interfaces, ips, expected) => {
  expect(select(interfaces, ips)).toEqual({ index: undefined, mac: undefined, ...expected });
});

test.each([
  ['own', 'own2'],
  ['?a', '?b'],
])('eth0 twice: sandboxes %s and %s', (first, second) => {
  expect(() => select([{ ...POD, sandbox: first }, HOST, { ...POD, sandbox: second }], [])).toThrow(
    expect.objectContaining({
      code: 7,
      msg: 'prevResult has interface "eth0" 2 times',
      details:
        "prevResult.interfaces[0] and prevResult.interfaces[2] are both of that name and in the pod's network namespace",
    }),
  );
});

test.each(['0', '02:00:00:00:00', '02:00:00:00:00:0g', 'x'])('MAC %j', (mac) => {
  expect(() => select([{ ...POD, mac }], [])).toThrow(
    expect.objectContaining({
      code: 7,
      details: `prevResult.interfaces[0].mac = ${JSON.stringify(mac)}: expected a MAC address`,
    }),
  );
});

test('union keeps order and drops repetitions', () => {
  const bytes = (text: string) => parseAddress(text)?.bytes ?? expect.unreachable();
  const union = uniqueAddresses(['10.0.0.2', 'fd00::2', '10.0.0.2', 'fe80::1', 'fd00:0::2'].map(bytes));
  expect(union.map(formatAddress)).toEqual(['10.0.0.2', 'fd00::2', 'fe80::1']);
});
