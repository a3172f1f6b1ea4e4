/** What a chart draws and says, made from series; nothing here draws. Pure. */

import { ISample, ISeries, percent } from '../series';
import { IPoolState, totals } from '../state';
import { IColumns, IHistory, ILease } from '../wire';

/** How far a chart looks back. */
export type Range = '5m' | '1h' | '24h' | '7d';

/** Seconds that a range covers, and of one slot: what a narrow sidebar can tell apart. */
export const RANGES: Readonly<Record<Range, { span: number; step: number }>> = {
  '5m': { span: 300, step: 5 },
  '1h': { span: 3600, step: 15 },
  '24h': { span: 86400, step: 300 },
  '7d': { span: 7 * 86400, step: 1800 }
};

/** The history of the pool, or of one of its GPUs, as a series that samples can be added to. */
export function seriesOf(history: IHistory, gpu: string | null): ISeries {
  const { step, times, until } = history;
  const empty = times.map(() => null);
  const none = { memory_mib: empty, granted_mib: empty, used_mib: empty, busy: empty };
  const columns: IColumns = gpu === null ? history : (history.gpus[gpu] ?? none);
  const { memory_mib, granted_mib, used_mib, busy } = columns;
  // The last slot has been measured since it began; samples come each second.
  const seen = times.length > 0 ? Math.max(1, Math.round(until - times[times.length - 1])) : 0;
  return { step, times, seen, memory_mib, granted_mib, used_mib, busy };
}

/** What the feed tells now, of the pool or of one of its GPUs; null where there is nothing to measure. */
export function sampleOf(state: IPoolState, gpu: string | null): ISample | null {
  if (gpu !== null) {
    const one = state.gpus[gpu];
    return one
      ? {
          at: state.at,
          memory_mib: one.memory_mib,
          granted_mib: one.granted_mib,
          used_mib: one.used_mib,
          busy: one.busy
        }
      : null;
  }
  const { gpus, memory_mib, granted_mib, used_mib, busy } = totals(state);
  return gpus === 0 ? null : { at: state.at, memory_mib, granted_mib, used_mib, busy };
}

/** Times, and in percent of the capacity: granted, used, busy. Null is a gap, also where there is no capacity. */
export type Drawn = [number[], (number | null)[], (number | null)[], (number | null)[]];

export function drawn(series: ISeries): Drawn {
  const of = (column: (number | null)[]) => column.map((v, n) => percent(v, series.memory_mib[n]));
  return [
    series.times,
    of(series.granted_mib),
    of(series.used_mib),
    series.busy.map(v => percent(v, 1))
  ];
}

/** Points with a gap on either side: no line shows them. */
export function isolated(column: readonly (number | null)[]): number[] {
  const found: number[] = [];
  column.forEach((value, n) => {
    if (value !== null && (column[n - 1] ?? null) === null && (column[n + 1] ?? null) === null) {
      found.push(n);
    }
  });
  return found;
}

/** The last slot in which something was measured; -1 where nothing was. */
export function latest(series: ISeries): number {
  let n = series.times.length - 1;
  while (n >= 0 && series.busy[n] === null) {
    n -= 1;
  }
  return n;
}

/** Who held something in a slot, and how much, as its mean over the slot. */
export interface IHeld {
  lease: ILease;
  mib: number;
}

/**
 * Whose slices make up what was granted in a slot, the largest first, as far as these leases tell. `untold` is
 * the rest: others' slices, or a lease's own from before it was resized. Where one begins or ends within the slot
 * nobody knows the rest: it is 0.
 */
export function holders(
  series: ISeries,
  n: number,
  leases: Iterable<ILease>,
  gpu: string | null
): { held: IHeld[]; untold: number } {
  const from = series.times[n];
  // The slot that is not over yet is as long as it has lasted.
  const to = from + (n === series.times.length - 1 ? Math.max(1, series.seen) : series.step);
  const held: IHeld[] = [];
  let whole = true;
  for (const lease of leases) {
    const begin = Math.max(from, lease.granted_at ?? Infinity);
    const end = Math.min(to, lease.ended_at ?? Infinity);
    if (end <= begin) {
      continue;
    }
    const mib = lease.slices
      .filter(piece => gpu === null || piece.gpu_uuid === gpu)
      .reduce((sum, piece) => sum + piece.memory_mib, 0);
    if (mib > 0) {
      whole &&= begin === from && end === to;
      held.push({ lease, mib: (mib * (end - begin)) / (to - from) });
    }
  }
  held.sort((a, b) => b.mib - a.mib);
  const told = held.reduce((sum, { mib }) => sum + mib, 0);
  const rest = (series.granted_mib[n] ?? 0) - told;
  return { held, untold: whole && rest >= 1 ? rest : 0 };
}

/** Rows of a table of a chart, at most `most`, the newest first; slots that nobody measured are left out. */
export function rows(series: ISeries, most: number): number[] {
  const measured = series.times.map((_, n) => n).filter(n => series.busy[n] !== null);
  const every = Math.max(1, Math.ceil(measured.length / most));
  return measured.reverse().filter((_, n) => n % every === 0);
}
