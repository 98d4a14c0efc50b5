// SPDX-License-Identifier: Apache-2.0
//
// What deploy/monitoring holds, read as its readers do.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';

const DIRECTORY = join(import.meta.dirname, '../../deploy/monitoring');
export const ALERTS = join(DIRECTORY, 'alerts.yaml');
export const SCRAPE = join(DIRECTORY, 'scrape.yaml');
export const DASHBOARD = join(DIRECTORY, 'dashboard.json');

export interface Alert {
  alert: string;
  expr: string;
  labels: Record<string, string>;
  annotations: Record<string, string>;
}

export function alerts(): Alert[] {
  const { groups } = parse(readFileSync(ALERTS, 'utf8')) as { groups: { rules: Alert[] }[] };
  return groups.flatMap(({ rules }) => rules);
}
