/** What a chart shows, computed from series. Pure. */

import { ISample, ISeries, percent } from './series';
import { IPoolState, totals } from '../pool/state';
import { IColumns, IHistory, ILease } from '../pool/apitypes';

/** How far a chart looks back. */
export type Range = '5m' | '1h' | '24h' | '7d';

/** The length of a range and of one slot, in seconds: as many slots as a narrow sidebar can show. */
export const RANGES: Readonly<Record<Range, { span: number; step: number }>> = {
  '5m': { span: 300, step: 5 },
  '1h': { span: 3600, step: 15 },
  '24h': { span: 86400, step: 300 },
  '7d': { span: 7 * 86400, step: 1800 }
};

/** The history of the pool, or of one GPU, as a series to which samples can be added. */
export function seriesOf(history: IHistory, gpu: string | null): ISeries {
  const { step, times, until } = history;
  const empty = times.map(() => null);
  const none = { memory_mib: empty, granted_mib: empty, used_mib: empty, busy: empty };
  const columns: IColumns = gpu === null ? history : (history.gpus[gpu] ?? none);
  const { memory_mib, granted_mib, used_mib, busy } = columns;
  // The last slot has been measured since it began; samples come each second.
  const last = times[times.length - 1];
  const seen = last === undefined ? 0 : Math.max(1, Math.round(until - last));
  return { step, times, seen, memory_mib, granted_mib, used_mib, busy };
}

/** The present values of the pool or of one GPU, from the feed; null if there is nothing to measure. */
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

/** The means of a slot in which something was measured; null where nothing was. */
export function sampleAt(series: ISeries, n: number): ISample | null {
  const [at, busy] = [series.times[n], series.busy[n]];
  if (at === undefined || typeof busy !== 'number') {
    return null;
  }
  return {
    at,
    busy,
    memory_mib: series.memory_mib[n] ?? 0,
    granted_mib: series.granted_mib[n] ?? 0,
    used_mib: series.used_mib[n] ?? 0
  };
}

/** Times, and granted, used and busy in percent of the capacity. Null, a gap, also where the capacity is unknown. */
export type Drawn = [number[], (number | null)[], (number | null)[], (number | null)[]];

export function drawn(series: ISeries): Drawn {
  const of = (column: (number | null)[]) =>
    column.map((v, n) => percent(v, series.memory_mib[n] ?? null));
  return [
    series.times,
    of(series.granted_mib),
    of(series.used_mib),
    series.busy.map(v => percent(v, 1))
  ];
}

/** The points with a gap on both sides, which no line shows. */
export function isolated(column: readonly (number | null)[]): number[] {
  const found: number[] = [];
  column.forEach((value, n) => {
    if (value !== null && (column[n - 1] ?? null) === null && (column[n + 1] ?? null) === null) {
      found.push(n);
    }
  });
  return found;
}

/** The pixels beyond the drawing for half of a label at its edge; at least 10. */
export function roomAtEdge(labels: readonly string[], width: (label: string) => number): number {
  return Math.max(10, ...labels.map(label => Math.ceil(width(label) / 2) + 2));
}

/** The last slot in which something was measured; -1 where nothing was. */
export function latest(series: ISeries): number {
  let n = series.times.length - 1;
  while (n >= 0 && series.busy[n] === null) {
    n -= 1;
  }
  return n;
}

/** A lease that held memory in a slot, and the mean over the slot. */
export interface IHeld {
  lease: ILease;
  mib: number;
}

/**
 * The given leases that held slices in a slot, the largest first. `untold` is the rest of the granted memory:
 * slices of other leases, or of a lease before it was resized. If a lease begins or ends within the slot, the rest
 * is unknown, and 0.
 */
export function holders(
  series: ISeries,
  n: number,
  leases: Iterable<ILease>,
  gpu: string | null
): { held: IHeld[]; untold: number } {
  const from = series.times[n];
  if (from === undefined) {
    return { held: [], untold: 0 };
  }
  // The last slot is not over: it is as long as it has lasted.
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

/** The rows of a chart's table, at most `most`, newest first; slots without a measurement are left out. */
export function rows(series: ISeries, most: number): number[] {
  const measured = series.times.map((_, n) => n).filter(n => series.busy[n] !== null);
  const every = Math.max(1, Math.ceil(measured.length / most));
  return measured.reverse().filter((_, n) => n % every === 0);
}
