// SPDX-License-Identifier: Apache-2.0
//
// The agent's role as the chart has it, for tests that run the agent without helm.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';
import type { ControlPlane } from './control-plane.ts';

export interface Rule {
  apiGroups: string[];
  resources: string[];
  verbs: string[];
}

export const RULES_FILE = join(import.meta.dirname, '../../deploy/chart/files/rules.yaml');

const RBAC = '/apis/rbac.authorization.k8s.io/v1';

/** Of the ClusterRole that the chart makes. */
export function roleRules(): Rule[] {
  return parse(readFileSync(RULES_FILE, 'utf8')) as Rule[];
}

/** A service account with the role, which has its name; returns the account's UID. */
export async function grantRole(plane: ControlPlane, namespace: string, name: string): Promise<string> {
  const uid = await plane.createServiceAccount(namespace, name);
  await plane.admin.create(`${RBAC}/clusterroles`, { metadata: { name }, rules: roleRules() });
  await plane.admin.create(`${RBAC}/clusterrolebindings`, {
    metadata: { name },
    roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'ClusterRole', name },
    subjects: [{ kind: 'ServiceAccount', name, namespace }],
  });
  return uid;
}
