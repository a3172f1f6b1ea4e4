/** Lifetimes that users choose from, and the time at which they end. */

import { TranslationBundle } from '@jupyterlab/translation';

const DAY = 86400;
// Created once: creating a formatter takes a hundred times as long as using it.
const DAYS = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium' });
const INSTANTS = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'medium' });

/** The default choice. */
export const USUAL_LIFE = '1y';

/** The lifetimes of a token: seconds and label; null for no end. */
export function lives(trans: TranslationBundle): [string, number | null, string][] {
  return [
    ['1d', DAY, trans.__('1 day')],
    ['7d', 7 * DAY, trans.__('7 days')],
    ['30d', 30 * DAY, trans.__('30 days')],
    ['90d', 90 * DAY, trans.__('90 days')],
    [USUAL_LIFE, 365 * DAY, trans.__('1 year')],
    ['never', null, trans.__('for ever')]
  ];
}

/** In seconds; null for no end. */
export function lifeOf(chosen: string, trans: TranslationBundle): number | null {
  return lives(trans).find(([id]) => id === chosen)?.[1] ?? null;
}

/** A day, in the user's locale; seconds since the epoch. */
export function day(at: number): string {
  return DAYS.format(at * 1000);
}

/** A day and the time. */
export function instant(at: number): string {
  return INSTANTS.format(at * 1000);
}
