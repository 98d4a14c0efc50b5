// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { CniError } from '../cni/errors.ts';
import { ANNOTATIONS_CAPABILITY, enrolmentAnnotations, podAnnotations, trafficAnnotations } from './annotations.ts';

const error = (read: () => unknown) => {
  try {
    read();
  } catch (thrown) {
    if (thrown instanceof CniError) return { code: thrown.code, msg: thrown.msg, details: thrown.details };
    throw thrown;
  }
  return undefined;
};
const map = (annotations: Record<string, string>) => new Map(Object.entries(annotations));
const SIDECAR = 'traffic.sidecar.istio.io';

test('what a kubelet sends comes through whole', () => {
  // kubectl's last-applied document has quotes and newlines; the config keys come with static pods.
  const sent = {
    'kubernetes.io/config.seen': '2026-08-01T10:00:00.123456789Z',
    'kubernetes.io/config.source': 'api',
    'kubectl.kubernetes.io/last-applied-configuration': '{"apiVersion":"v1","a":"x\\ny"}\n',
    'ambient-redirect/enroll': 'true',
  };
  expect(podAnnotations({ [ANNOTATIONS_CAPABILITY]: sent })).toEqual(map(sent));
});

test.each([[{}], [{ [ANNOTATIONS_CAPABILITY]: null }]])('none in %j', (runtimeConfig) => {
  expect(podAnnotations(runtimeConfig)).toBeNull();
});

test.each([
  [[], ' = []: expected an object of strings'],
  ['x', ' = "x": expected an object of strings'],
  [{ a: 1 }, '["a"] = 1: expected a string'],
])('annotations that are %j', (value, details) => {
  const path = `runtimeConfig["${ANNOTATIONS_CAPABILITY}"]`;
  expect(error(() => podAnnotations({ [ANNOTATIONS_CAPABILITY]: value }))).toMatchObject({
    code: 7,
    details: `${path}${details}`,
  });
});

test.each([
  [{}, undefined, undefined],
  [{ 'ambient-redirect/enroll': 'true' }, true, undefined],
  [{ 'ambient-redirect/enroll': 'false' }, false, undefined],
  [{ 'ambient-redirect/enroll': ' True ' }, true, undefined],
  [{ 'ambient-redirect/interfaces': 'eth0, net1' }, undefined, ['eth0', 'net1']],
  [{ 'ambient-redirect/interfaces': '' }, undefined, []],
])('%j', (annotations, enroll, interfaces) => {
  expect(enrolmentAnnotations(map(annotations), 'all')).toEqual({ enroll, interfaces });
});

const ALL = {
  'ambient-redirect/enroll': 'true',
  'ambient-redirect/interfaces': 'net1',
  'ambient.istio.io/dns-capture': 'true',
  'ambient.istio.io/bypass-inbound-capture': 'true',
  'istio.io/reroute-virtual-interfaces': 'kubevirt0,virt1',
  [`${SIDECAR}/excludeInboundPorts`]: '22,8000-8100',
  [`${SIDECAR}/excludeOutboundPorts`]: '9000',
  [`${SIDECAR}/excludeOutboundIPRanges`]: '10.0.0.1/8, fd00::/8',
};
const UNSAID = { enroll: undefined, interfaces: undefined };
const SAID = { enroll: true, interfaces: ['net1'] };
const NOTHING = {
  dnsCapture: undefined,
  bypassInbound: false,
  virtualInterfaces: [],
  exclude: { inboundPorts: [], outboundPorts: [], outboundCIDRs: [] },
};
const EVERYTHING = {
  dnsCapture: true,
  bypassInbound: true,
  virtualInterfaces: ['kubevirt0', 'virt1'],
  exclude: {
    inboundPorts: [
      { from: 22, to: 22 },
      { from: 8000, to: 8100 },
    ],
    outboundPorts: [{ from: 9000, to: 9000 }],
    outboundCIDRs: [
      { family: 4, bytes: Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 0]), length: 104 },
      { family: 6, bytes: Uint8Array.from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), length: 8 },
    ],
  },
};

test.each([
  ['all', SAID, EVERYTHING],
  ['enroll', SAID, NOTHING],
  ['exclusions', UNSAID, EVERYTHING],
  ['none', UNSAID, NOTHING],
] as const)('podOverrides %s', (overrides, enrolment, traffic) => {
  expect(enrolmentAnnotations(map(ALL), overrides)).toEqual(enrolment);
  expect(trafficAnnotations(map(ALL), overrides)).toEqual(traffic);
  expect(enrolmentAnnotations(null, overrides)).toEqual(UNSAID);
  expect(trafficAnnotations(null, overrides)).toEqual(NOTHING);
});

test.each([
  ['ambient-redirect/enroll', 'yes', 'true or false'],
  ['ambient-redirect/enroll', '', 'true or false'],
  ['ambient-redirect/interfaces', 'eth0,', 'interface names separated by commas'],
  ['ambient-redirect/interfaces', 'a/b', 'interface names separated by commas'],
  ['ambient-redirect/interfaces', 'abcdefghijklmnop', 'interface names separated by commas'],
  ['ambient.istio.io/dns-capture', 'on', 'true or false'],
  ['ambient.istio.io/bypass-inbound-capture', '2', 'true or false'],
  ['istio.io/reroute-virtual-interfaces', '..', 'interface names separated by commas'],
  [`${SIDECAR}/excludeInboundPorts`, '80;90', 'ports or ranges "from-to" separated by commas'],
  [`${SIDECAR}/excludeOutboundPorts`, '80,0', 'ports or ranges "from-to" separated by commas'],
  [`${SIDECAR}/excludeOutboundIPRanges`, '10.0.0.0/8,*', 'IP prefixes separated by commas'],
  [`${SIDECAR}/excludeOutboundIPRanges`, '10.0.0.1', 'IP prefixes separated by commas'],
])('%s: %j does not parse', (key, text, expected) => {
  const annotations = map({ [key]: text });
  const read = (overrides: 'all' | 'none') => {
    enrolmentAnnotations(annotations, overrides);
    trafficAnnotations(annotations, overrides);
  };
  expect(error(() => read('all'))).toEqual({
    code: 7,
    msg: `invalid pod annotation ${key}`,
    details: `${key} = ${JSON.stringify(text)}: expected ${expected}`,
  });
  // What does not count is not read.
  expect(error(() => read('none'))).toBeUndefined();
});
