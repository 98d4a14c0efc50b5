// SPDX-License-Identifier: Apache-2.0
// Istio's enablementSelectors: which pods are in the mesh, by labels of theirs and of their namespace. Label selectors
// mean what Kubernetes means by them (apimachinery, metav1.LabelSelector).

import { CniError, Code, quote } from '../cni/errors.ts';

export type Labels = ReadonlyMap<string, string>;

type Operator = 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';

export interface LabelRequirement {
  key: string;
  operator: Operator;
  /** none for Exists and DoesNotExist, one at least for the others */
  values: readonly string[];
}

/** All of them have to hold; none: everything matches. */
export type LabelSelector = readonly LabelRequirement[];

export interface EnablementSelector {
  pod: LabelSelector;
  namespace: LabelSelector;
}

export const DATAPLANE_MODE = 'istio.io/dataplane-mode';

/** Istio's own: the pod says so, or its namespace does and the pod does not say "none". */
export const DEFAULT_SELECTORS: readonly EnablementSelector[] = [
  { pod: [{ key: DATAPLANE_MODE, operator: 'In', values: ['ambient'] }], namespace: [] },
  {
    pod: [{ key: DATAPLANE_MODE, operator: 'NotIn', values: ['none'] }],
    namespace: [{ key: DATAPLANE_MODE, operator: 'In', values: ['ambient'] }],
  },
];

/** Any of them matches. undefined: it depends on the namespace's labels, which are not known. */
export function isSelected(
  selectors: readonly EnablementSelector[],
  pod: Labels,
  namespace: Labels | undefined,
): boolean | undefined {
  let unknown = false;
  for (const selector of selectors) {
    if (!matches(selector.pod, pod)) continue;
    if (selector.namespace.length === 0) return true;
    if (namespace === undefined) unknown = true;
    else if (matches(selector.namespace, namespace)) return true;
  }
  return unknown ? undefined : false;
}

function matches(selector: LabelSelector, labels: Labels): boolean {
  return selector.every((requirement) => holds(requirement, labels.get(requirement.key)));
}

function holds({ operator, values }: LabelRequirement, value: string | undefined): boolean {
  switch (operator) {
    case 'In':
      return value !== undefined && values.includes(value);
    case 'NotIn':
      return value === undefined || !values.includes(value);
    case 'Exists':
      return value !== undefined;
    case 'DoesNotExist':
      return value === undefined;
  }
}

/**
 * A list as Istio's charts write it: [{podSelector, namespaceSelector}], each a LabelSelector. Throws CniError 7 with the
 * path of what is wrong: a selector that is read as something else would put pods into the mesh, or out of it.
 */
export function parseSelectors(value: unknown, path = 'enablementSelectors'): readonly EnablementSelector[] {
  return list(value, path).map((item, i) => {
    const at = `${path}[${i}]`;
    const fields = section(item, at, ['podSelector', 'namespaceSelector']);
    return {
      pod: labelSelector(fields.podSelector, `${at}.podSelector`),
      namespace: labelSelector(fields.namespaceSelector, `${at}.namespaceSelector`),
    };
  });
}

function labelSelector(value: unknown, path: string): LabelSelector {
  if (value === undefined || value === null) return [];
  const { matchLabels, matchExpressions } = section(value, path, ['matchLabels', 'matchExpressions']);
  const labels = Object.entries(section(matchLabels ?? {}, `${path}.matchLabels`)).map(
    ([key, text]): LabelRequirement => ({
      key,
      operator: 'In',
      values: [string(text, `${path}.matchLabels["${key}"]`)],
    }),
  );
  const expressions = list(matchExpressions ?? [], `${path}.matchExpressions`).map((item, i) =>
    requirement(item, `${path}.matchExpressions[${i}]`),
  );
  return [...labels, ...expressions];
}

function requirement(value: unknown, path: string): LabelRequirement {
  const fields = section(value, path, ['key', 'operator', 'values']);
  const key = string(fields.key, `${path}.key`);
  const values = list(fields.values ?? [], `${path}.values`).map((item, i) => string(item, `${path}.values[${i}]`));
  switch (fields.operator) {
    case 'In':
    case 'NotIn':
      if (values.length === 0) throw invalid(`${path}.values`, values, `a value at least for ${fields.operator}`);
      return { key, operator: fields.operator, values };
    case 'Exists':
    case 'DoesNotExist':
      if (values.length > 0) throw invalid(`${path}.values`, values, `no value for ${fields.operator}`);
      return { key, operator: fields.operator, values };
    default:
      throw invalid(`${path}.operator`, fields.operator, 'In, NotIn, Exists or DoesNotExist');
  }
}

function section(value: unknown, path: string, keys?: readonly string[]): Readonly<Record<string, unknown>> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw invalid(path, value, 'an object');
  const unknown = Object.keys(value).find((key) => keys !== undefined && !keys.includes(key));
  if (unknown !== undefined) throw invalid(`${path}.${unknown}`, Reflect.get(value, unknown), keys?.join(' or ') ?? '');
  return value as Readonly<Record<string, unknown>>;
}

function list(value: unknown, path: string): readonly unknown[] {
  if (!Array.isArray(value)) throw invalid(path, value, 'a list');
  return value;
}

/** YAML reads `true` and `1` as no strings; Kubernetes refuses them too. */
function string(value: unknown, path: string): string {
  if (typeof value !== 'string') throw invalid(path, value, 'a string');
  return value;
}

function invalid(path: string, value: unknown, expected: string): CniError {
  return new CniError(Code.INVALID_NETWORK_CONFIG, `invalid ${path} = ${quote(value)}`, `expected ${expected}`);
}
