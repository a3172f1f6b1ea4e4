/** Figures and times as people read them, in their language. */

import { TranslationBundle } from '@jupyterlab/translation';

import { IPiece } from '../pool/apitypes';

/** `auto`: MiB below one GiB, GiB above. */
export type Unit = 'auto' | 'MiB' | 'GiB';

let unit: Unit = 'auto';

/** Write sizes in this unit from now on, on the whole page. */
export function write(wanted: Unit): void {
  unit = wanted;
}

/** `780 MiB` or `25.4 GiB`: three digits are enough to choose by. */
export function size(mib: number, trans: TranslationBundle): string {
  if (unit === 'MiB' || (unit === 'auto' && mib < 1024)) {
    return trans.__('%1 MiB', figure(mib, 0));
  }
  const gib = mib / 1024;
  return trans.__('%1 GiB', figure(gib, gib < 100 ? 1 : 0));
}

/** `12.4 of 50.8 GiB`: both in the unit of the whole. */
export function part(mib: number, whole: number, trans: TranslationBundle): string {
  if (unit === 'MiB' || (unit === 'auto' && whole < 1024)) {
    return trans.__('%1 of %2 MiB', figure(mib, 0), figure(whole, 0));
  }
  return trans.__('%1 of %2 GiB', figure(mib / 1024, 1), figure(whole / 1024, 1));
}

/** `26,008 MiB`, exactly. */
export function exactly(mib: number, trans: TranslationBundle): string {
  return trans.__('%1 MiB', figure(mib, 0));
}

/** `26,008`, where the unit follows. */
export function plain(mib: number): string {
  return figure(mib, 0);
}

/** `0.8` of something as `80 %`, in the user's manner. */
export function share(part: number): string {
  return PERCENT.format(part);
}

/** `45 s`, `12 min`, `3 h`, `2 d`. */
export function age(seconds: number, trans: TranslationBundle): string {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) {
    return trans.__('%1 s', s);
  }
  if (s < 3600) {
    return trans.__('%1 min', Math.floor(s / 60));
  }
  if (s < 86400) {
    return trans.__('%1 h', figure(s / 3600, s < 36000 ? 1 : 0));
  }
  return trans.__('%1 d', figure(s / 86400, 0));
}

/** The hour, and the day where it is not today's; seconds since the epoch. */
export function moment(at: number): string {
  const date = new Date(at * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today
    ? date.toLocaleTimeString()
    : date.toLocaleString(undefined, { dateStyle: 'short', timeStyle: 'short' });
}

// `toLocaleString` makes a formatter each time, which takes a hundred times as long as its use.
const PERCENT = new Intl.NumberFormat(undefined, { style: 'percent', maximumFractionDigits: 0 });
const FIGURES = {
  0: new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 }),
  1: new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 })
};

function figure(value: number, digits: 0 | 1): string {
  return FIGURES[digits].format(value);
}

/** `2 × 26,008 MiB: GPU 0, 1 of vm`, once for each server and size. */
export function placed(slices: readonly IPiece[], trans: TranslationBundle): string {
  const parts = new Map<string, { server: string; memory_mib: number; indices: number[] }>();
  for (const { server, memory_mib, index } of slices) {
    const key = JSON.stringify([server, memory_mib]);
    const indices = parts.get(key)?.indices ?? [];
    parts.set(key, { server, memory_mib, indices: [...indices, index] });
  }
  return [...parts.values()]
    .map(({ server, memory_mib, indices }) =>
      trans.__(
        '%1 × %2: GPU %3 of %4',
        indices.length,
        trans.__('%1 MiB', plain(memory_mib)),
        indices.join(', '),
        server
      )
    )
    .join(' · ');
}
