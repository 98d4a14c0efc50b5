// SPDX-License-Identifier: Apache-2.0
//
// What can stand beside the plugin on a pod's interface, as factors; the whole product of them, and a selection in
// which every pair of values that can occur together does.

export const factors = {
  primary: ['bridge', 'ptp'],
  /** The other chained plugin, and where it stands. */
  chained: ['none', 'bandwidth', 'portmap', 'tuning', 'sbr', 'firewall'],
  position: ['after us', 'before us'],
  /**
   * filter: clsact, priority 1, handle 1, passes on; there before us.
   * ok filter: the same, but returns TC_ACT_OK, which ends the chain of filters.
   * tcx ahead, tcx behind: a TCX program that passes on, put ahead of all after our ADD, or there before it.
   */
  foreign: ['none', 'filter', 'ok filter', 'tcx ahead', 'tcx behind'],
  hook: ['tcx', 'clsact'],
  family: [4, 6],
} as const;

export type Factor = keyof typeof factors;
export type Combination = { readonly [F in Factor]: (typeof factors)[F][number] };

const names = Object.keys(factors) as Factor[];

/** Without a chained plugin there is no position: 'after us' stands for it. */
function isReal(one: Combination): boolean {
  return one.chained !== 'none' || one.position === 'after us';
}

/** Every combination that exists. */
export function product(): Combination[] {
  let partial: Partial<Combination>[] = [{}];
  for (const name of names) {
    partial = partial.flatMap((row) => factors[name].map((value) => ({ ...row, [name]: value })));
  }
  return (partial as Combination[]).filter(isReal);
}

/** "primary=ptp, hook=tcx" and so on: the pairs of values that a combination covers. */
export function pairsOf(one: Combination): string[] {
  const values = names.map((name) => `${name}=${one[name]}`);
  return values.flatMap((first, index) => values.slice(index + 1).map((second) => `${first}, ${second}`));
}

/**
 * Combinations of `all`, the `wanted` ones first, that together cover every pair that `all` covers. Greedy; of equals
 * the one whose pairs have been taken least, so that factors do not go in step in rows that could have any value.
 */
export function pairwise(all: readonly Combination[], wanted: readonly Combination[] = []): Combination[] {
  const missing = new Set(all.flatMap(pairsOf));
  const selection: Combination[] = [];
  const taken = new Map<string, number>();
  const use = (one: Combination) => pairsOf(one).reduce((sum, pair) => sum + (taken.get(pair) ?? 0) ** 2, 0);
  const take = (one: Combination) => {
    selection.push(one);
    for (const pair of pairsOf(one)) {
      taken.set(pair, (taken.get(pair) ?? 0) + 1);
      missing.delete(pair);
    }
  };
  wanted.forEach(take);
  while (missing.size > 0) {
    let best: Combination | undefined;
    let most = 0;
    for (const one of all) {
      const gain = pairsOf(one).filter((pair) => missing.has(pair)).length;
      if (gain > most || (gain === most && best !== undefined && use(one) < use(best))) [best, most] = [one, gain];
    }
    if (best === undefined) throw new Error(`no combination has ${[...missing].join('; ')}`);
    take(best);
  }
  return selection;
}

/** Pairs are not enough for what bandwidth does to each hook, in either order. */
export const always: readonly Combination[] = (['tcx', 'clsact'] as const).flatMap((hook) =>
  factors.position.map((position, index) => ({
    primary: index === 0 ? 'ptp' : 'bridge',
    chained: 'bandwidth',
    position,
    foreign: 'none',
    hook,
    family: index === 0 ? 6 : 4,
  })),
);

export function describeCombination(one: Combination): string {
  const chained = one.chained === 'none' ? 'alone' : `${one.chained} ${one.position}`;
  const foreign = one.foreign === 'none' ? 'no foreign program' : `foreign ${one.foreign}`;
  return `${one.primary}, ${one.hook}, ${chained}, ${foreign}, IPv${one.family}`;
}

/** How the chain's ADD has to end. */
export type Ending =
  /** The pod works and its traffic takes the proxy. */
  | 'redirected'
  /** Our ADD fails with 102 and says what is in the way. */
  | 'refused'
  /** The same chain fails without us too, for the same reason; ours changes nothing of it. */
  | 'impossible';

export function endingOf(one: Combination): Ending {
  // TCX runs before every filter, and nobody can tell what a program returns.
  if (one.hook === 'clsact' && one.foreign === 'tcx behind') return 'refused';
  if (one.chained !== 'bandwidth') return 'redirected';
  // bandwidth's ingress qdisc and clsact exclude each other on one veth, whoever comes first.
  if (one.hook === 'clsact') return 'refused';
  const foreignClsact = one.foreign === 'filter' || one.foreign === 'ok filter';
  return foreignClsact && one.position === 'after us' ? 'impossible' : 'redirected';
}
