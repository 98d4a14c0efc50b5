// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import { DEFAULT_SELECTORS, isSelected, parseSelectors } from './selectors.ts';

type Labels = Record<string, string>;
const map = (labels: Labels) => new Map(Object.entries(labels));
const AMBIENT = { 'istio.io/dataplane-mode': 'ambient' };
const NONE = { 'istio.io/dataplane-mode': 'none' };

test("the default is what Istio's chart has", () => {
  const chart = `
- podSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
- podSelector:
    matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]
  namespaceSelector:
    matchLabels: {istio.io/dataplane-mode: ambient}
`;
  expect(parseSelectors(parse(chart))).toEqual(DEFAULT_SELECTORS);
});

test.each<[string, Labels, Labels | undefined, boolean | undefined]>([
  ['nothing said', {}, {}, false],
  ['the pod', AMBIENT, {}, true],
  ['the namespace', {}, AMBIENT, true],
  ['the namespace, not the pod', NONE, AMBIENT, false],
  ['another value of the pod', { 'istio.io/dataplane-mode': 'x' }, AMBIENT, true],
  ['the pod, namespace unknown', AMBIENT, undefined, true],
  ['pod says none, namespace unknown', NONE, undefined, false],
  ['it depends on the namespace', {}, undefined, undefined],
])('default: %s', (_what, pod, namespace, expected) => {
  expect(isSelected(DEFAULT_SELECTORS, map(pod), namespace && map(namespace))).toBe(expected);
});

describe('operators', () => {
  const select = (expression: object, labels: Labels) =>
    isSelected(parseSelectors([{ podSelector: { matchExpressions: [expression] } }]), map(labels), map({}));

  test.each<[string, string[] | undefined, Labels, boolean]>([
    ['In', ['a', 'b'], { k: 'b' }, true],
    ['In', ['a', 'b'], { k: 'c' }, false],
    ['In', ['a'], {}, false],
    ['NotIn', ['a'], { k: 'a' }, false],
    ['NotIn', ['a'], { k: 'b' }, true],
    // As in Kubernetes: who does not have the label does not have the value.
    ['NotIn', ['a'], {}, true],
    ['Exists', undefined, { k: '' }, true],
    ['Exists', undefined, {}, false],
    ['DoesNotExist', [], { k: '' }, false],
    ['DoesNotExist', undefined, {}, true],
  ])('%s %j, %j: %s', (operator, values, labels, expected) => {
    expect(select({ key: 'k', operator, ...(values && { values }) }, labels)).toBe(expected);
  });
});

test('all requirements of a selector have to hold, one selector is enough', () => {
  const selectors = parseSelectors([
    { podSelector: { matchLabels: { a: '1', b: '2' } }, namespaceSelector: { matchLabels: { team: 'x' } } },
    { namespaceSelector: { matchLabels: { all: 'yes' } } },
  ]);
  const chosen = (pod: Labels, namespace: Labels) => isSelected(selectors, map(pod), map(namespace));
  expect([
    chosen({ a: '1', b: '2' }, { team: 'x' }),
    chosen({ a: '1' }, { team: 'x' }),
    chosen({ a: '1', b: '2' }, {}),
    chosen({}, { all: 'yes' }),
  ]).toEqual([true, false, false, true]);
});

test('an empty selector matches every pod, an empty list none', () => {
  expect(isSelected(parseSelectors([{}]), map({}), undefined)).toBe(true);
  expect(isSelected(parseSelectors([]), map(AMBIENT), map(AMBIENT))).toBe(false);
});

test.each<[unknown, string]>([
  [null, 'invalid enablementSelectors = null: expected a list'],
  [['x'], 'invalid enablementSelectors[0] = "x": expected an object'],
  [[{ podselector: {} }], 'invalid enablementSelectors[0].podselector = {}: expected podSelector or namespaceSelector'],
  [
    [{ podSelector: { matchLabels: { a: true } } }],
    'invalid enablementSelectors[0].podSelector.matchLabels["a"] = true: expected a string',
  ],
  [
    [{ podSelector: { matchExpressions: [{ key: 'k', operator: 'in', values: ['a'] }] } }],
    'invalid enablementSelectors[0].podSelector.matchExpressions[0].operator = "in": expected In, NotIn, Exists or DoesNotExist',
  ],
  [
    [{ podSelector: { matchExpressions: [{ key: 'k', operator: 'In' }] } }],
    'invalid enablementSelectors[0].podSelector.matchExpressions[0].values = []: expected a value at least for In',
  ],
  [
    [{ namespaceSelector: { matchExpressions: [{ key: 'k', operator: 'Exists', values: ['a'] }] } }],
    'invalid enablementSelectors[0].namespaceSelector.matchExpressions[0].values = ["a"]: expected no value for Exists',
  ],
])('%j is refused', (value, message) => {
  expect(() => parseSelectors(value)).toThrow(expect.objectContaining({ code: 7, message }));
});
