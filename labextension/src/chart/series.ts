/** The columns of a chart: the history, and the samples since. Pure. */

import { IColumns } from '../pool/apitypes';

/** One measurement. */
export interface ISample {
  at: number;
  memory_mib: number;
  granted_mib: number;
  used_mib: number;
  busy: number;
}

const FIELDS = ['memory_mib', 'granted_mib', 'used_mib', 'busy'] as const;

/** A regular grid of `step` seconds; its last slot is the mean of `seen` samples. */
export interface ISeries extends IColumns {
  step: number;
  times: number[];
  seen: number;
}

/**
 * The series with one more sample, and without values older than `span` seconds. Slots without a
 * measurement are null: a gap.
 */
export function extend(series: ISeries, sample: ISample, span: number): ISeries {
  const { step } = series;
  const slot = Math.floor(sample.at / step) * step;
  const last = series.times[series.times.length - 1] ?? slot - step;
  if (slot < last) {
    return series; // a clock that was set back
  }
  const next: ISeries = { ...series, times: series.times.slice() };
  for (const field of FIELDS) {
    next[field] = series[field].slice();
  }
  if (slot === last) {
    // The history's last slot was measured once a second since it began.
    const seen = series.seen;
    for (const field of FIELDS) {
      const column = next[field];
      const mean = column[column.length - 1] ?? null;
      column[column.length - 1] =
        mean === null ? sample[field] : (mean * seen + sample[field]) / (seen + 1);
    }
    next.seen = seen + 1;
  } else {
    // No more gaps than are visible.
    for (
      let at = Math.max(last + step, slot - Math.ceil(span / step) * step);
      at < slot;
      at += step
    ) {
      push(next, at, null);
    }
    push(next, slot, sample);
    next.seen = 1;
  }
  const first = next.times.findIndex(at => at >= sample.at - span - step);
  if (first > 0) {
    next.times.splice(0, first);
    FIELDS.forEach(field => next[field].splice(0, first));
  }
  return next;
}

function push(series: ISeries, at: number, sample: ISample | null): void {
  series.times.push(at);
  FIELDS.forEach(field => series[field].push(sample && sample[field]));
}

/** `part` of `whole` in percent; null if either is unknown or `whole` is 0. */
export function percent(part: number | null, whole: number | null): number | null {
  return part === null || whole === null || whole <= 0 ? null : (100 * part) / whole;
}
