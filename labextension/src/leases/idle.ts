/** Which leases are to be warned of: those that do not compute, and sooner the more they hold. Pure. */

import { ILease } from '../pool/apitypes';

/** The least and the most that a lease counts, in whole GPUs. */
const LEAST = 0.5;
const MOST = 4;

/** How many whole GPUs a lease's slices come to. */
export function weight(lease: ILease): number {
  return lease.slices.reduce(
    (sum, piece) => sum + (piece.total_mib > 0 ? piece.memory_mib / piece.total_mib : 1),
    0
  );
}

/** After how many idle seconds a lease is warned of, where a whole GPU is after `minutes`; null for never. */
export function patience(lease: ILease, minutes: number): number | null {
  return minutes > 0 ? (60 * minutes) / Math.min(MOST, Math.max(LEAST, weight(lease))) : null;
}

/** Whether it is time to warn; `at` in seconds since the epoch. */
export function isDue(lease: ILease, minutes: number, at: number): boolean {
  const limit = patience(lease, minutes);
  const since = lease.idle_since ?? null;
  return limit !== null && since !== null && lease.state === 'ACTIVE' && at - since >= limit;
}

/** One stretch of idling: it is warned of once. */
export function stretch(lease: ILease): string {
  return `${lease.id} ${lease.idle_since}`;
}
