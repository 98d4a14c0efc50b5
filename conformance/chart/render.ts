// SPDX-License-Identifier: Apache-2.0
//
// The chart as helm renders it. Run by itself (node conformance/chart/render.ts) it writes the snapshots anew, for review.

import { mkdirSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { parseAllDocuments } from 'yaml';
import { CHART, helm } from './helm.ts';

const VALUES = join(import.meta.dirname, 'values');
export const SNAPSHOTS = join(import.meta.dirname, 'snapshots');

export interface Rendering {
  /** of the snapshot */
  name: string;
  /** files of VALUES */
  values: string[];
  kubeVersion: string;
  namespace: string;
}

/** Every file of values, and what hangs on the version of Kubernetes. */
export const MATRIX: readonly Rendering[] = [
  ...readdirSync(VALUES)
    .sort()
    .map((file) => ({
      name: basename(file, '.yaml'),
      values: [file],
      kubeVersion: '1.37.2',
      namespace: 'istio-system',
    })),
  // AppArmor by annotation, and not in istio-system.
  { name: 'kubernetes-1.25', values: ['default.yaml'], kubeVersion: '1.25.0', namespace: 'mesh' },
  { name: 'gke', values: ['istio-1.20.yaml'], kubeVersion: '1.37.2-gke.1', namespace: 'istio-system' },
];

export interface KubernetesObject {
  apiVersion: string;
  kind: string;
  metadata: { name: string; namespace?: string; annotations?: Record<string, string> };
  [key: string]: unknown;
}

/** `more`: arguments of helm, such as --set. Throws with helm's words. */
export async function render(
  { values, kubeVersion, namespace }: Omit<Rendering, 'name'>,
  more: readonly string[] = [],
): Promise<string> {
  const files = values.flatMap((file) => ['--values', join(VALUES, file)]);
  const outcome = await helm([
    ...['template', 'ambient-redirect', CHART, '--namespace', namespace, '--kube-version', kubeVersion],
    ...files,
    ...more,
  ]);
  if (outcome.status !== 0) throw new Error(outcome.stderr);
  return outcome.stdout;
}

export function objectsOf(rendered: string): KubernetesObject[] {
  return parseAllDocuments(rendered)
    .map((document) => {
      if (document.errors.length > 0) throw document.errors[0];
      return document.toJS() as KubernetesObject | null;
    })
    .filter((object) => object !== null);
}

if (import.meta.main) {
  rmSync(SNAPSHOTS, { recursive: true, force: true });
  mkdirSync(SNAPSHOTS);
  for (const one of MATRIX) writeFileSync(join(SNAPSHOTS, `${one.name}.yaml`), await render(one));
}
