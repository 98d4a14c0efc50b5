// SPDX-License-Identifier: Apache-2.0
// The curves of the published experiment as SVG, drawn by Vega: medians, with bars from the least to the greatest.

import { parse, View } from 'vega';
import { compile, type TopLevelSpec } from 'vega-lite';

export interface Point {
  x: number;
  series: string;
  median: number;
  min: number;
  max: number;
}

export interface Plot {
  /** File name without extension. */
  name: string;
  title: string;
  xTitle: string;
  yTitle: string;
  logY?: boolean;
  points: readonly Point[];
}

export async function svg(plot: Plot): Promise<string> {
  const xs = [...new Set(plot.points.map(({ x }) => x))].sort((a, b) => a - b);
  const series = [...new Set(plot.points.map((point) => point.series))];
  const x = { field: 'x', type: 'ordinal' as const, title: plot.xTitle, sort: xs, axis: { labelAngle: 0 } };
  const scale = plot.logY ? { type: 'log' as const } : { zero: true };
  const color = {
    field: 'series',
    type: 'nominal' as const,
    title: null,
    sort: series,
    scale: { scheme: 'tableau10' as const },
    legend: { labelLimit: 400, symbolOpacity: 1 },
  };
  const y = (field: string) => ({ field, type: 'quantitative' as const, title: plot.yTitle, scale });
  const spec: TopLevelSpec = {
    title: plot.title,
    width: 560,
    height: 320,
    background: 'white',
    data: { values: plot.points.map((point) => ({ ...point })) },
    layer: [
      { mark: { type: 'rule', opacity: 0.4 }, encoding: { x, y: y('min'), y2: { field: 'max' }, color } },
      { mark: { type: 'line', point: true }, encoding: { x, y: y('median'), color } },
    ],
  };
  const view = new View(parse(compile(spec).spec), { renderer: 'none' });
  try {
    return await view.toSVG();
  } finally {
    view.finalize();
  }
}
