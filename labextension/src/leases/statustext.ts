/** What the status bar says. Pure. */

import { TranslationBundle } from '@jupyterlab/translation';

import { part } from '../common/format';
import { IUse } from '../pool/state';
import { ILease } from '../pool/apitypes';

/** `2 × 0.8`; `2 × 0.8 + 1 × 0.5`; more kinds than two as `5 slices`. */
export function shares(leases: readonly ILease[], trans: TranslationBundle): string {
  const counts = new Map<string, number>();
  let slices = 0;
  for (const { memory_mib, total_mib } of leases.flatMap(lease => lease.slices)) {
    const share = total_mib > 0 ? memory_mib / total_mib : 1;
    const text = share.toLocaleString(undefined, { maximumFractionDigits: 2 });
    counts.set(text, (counts.get(text) ?? 0) + 1);
    slices += 1;
  }
  return counts.size > 2
    ? trans._n('%1 slice', '%1 slices', slices)
    : [...counts].map(([share, count]) => trans.__('%1 × %2', count, share)).join(' + ');
}

export interface IStatus {
  held: readonly ILease[];
  waiting: readonly ILease[];
  use: (lease: ILease) => IUse | undefined;
  /** How many wait in the whole pool. */
  queue: number;
}

/** `GPU 2 × 0.8 · 12.4 of 50.8 GiB`; of what waits, its place; of what is parked, that it wakes by itself. */
export function statusText(status: IStatus, trans: TranslationBundle): string {
  const { waiting, use, queue } = status;
  const held = status.held.filter(lease => lease.state !== 'PARKED');
  const parked = status.held.filter(lease => lease.state === 'PARKED');
  const waking = parked.find(lease => lease.position !== null);
  if (waking) {
    return trans.__('GPU: waking, position %1 of %2', waking.position ?? '…', Math.max(queue, 1));
  }
  if (held.length === 0 && parked.length > 0) {
    return trans.__('GPU: asleep, wakes by itself');
  }
  if (held.length > 0) {
    const granted = held
      .flatMap(lease => lease.slices)
      .reduce((sum, piece) => sum + piece.memory_mib, 0);
    const used = held.reduce((sum, lease) => sum + (use(lease)?.used_mib ?? 0), 0);
    return trans.__('GPU %1 · %2', shares(held, trans), part(used, granted, trans));
  }
  const [first] = waiting;
  return first
    ? trans.__('GPU: position %1 of %2', first.position ?? '…', Math.max(queue, waiting.length))
    : trans.__('GPU: none held');
}

/** What concerns the notebook in front, if something does; else everything. */
export function concerning(status: IStatus, mine: (lease: ILease) => boolean): IStatus {
  const held = status.held.filter(mine);
  const waiting = status.waiting.filter(mine);
  return held.length + waiting.length > 0 ? { ...status, held, waiting } : status;
}
