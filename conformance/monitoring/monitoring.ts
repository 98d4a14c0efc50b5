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

export interface Panel {
  title: string;
  queries: string[];
}

interface DashboardPanel {
  title: string;
  type: string;
  targets?: { expr: string }[];
}

/** Panels with queries, as Grafana sends them for all nodes. `window`: its $__rate_interval. */
export function dashboard(window: string): Panel[] {
  const { panels } = JSON.parse(readFileSync(DASHBOARD, 'utf8')) as { panels: DashboardPanel[] };
  const variables: Record<string, string> = { $node: '.*', $__rate_interval: window };
  return panels.flatMap(({ title, targets = [] }) =>
    targets.length === 0
      ? []
      : [{ title, queries: targets.map(({ expr }) => expr.replace(/\$\w+/g, (name) => variables[name] ?? name)) }],
  );
}

/** `metric` and `metric{...}` of a query. */
export function selectors(expr: string): string[] {
  return expr.match(/\b(?:ambient_redirect|istio_cni|nodeagent|ztunnel|process|nodejs)_\w+(?:\{[^}]*\})?/g) ?? [];
}

/** The metric of a selector; that of its buckets for a histogram. */
export function metricOf(selector: string): string {
  return selector.replace(/\{.*/s, '').replace(/_(bucket|sum|count)$/, '');
}
