/**
 * Says, once each: that a lease has not computed for long, that it was parked, that somebody asks for it, that its time
 * is nearly over.
 */

import { Notification } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';

import { age } from '../common/format';
import { isDue, stretch } from './idle';
import { IGPUPool, ISlices } from '../tokens';
import { ILease } from '../pool/apitypes';

/** Whether a cell runs is asked no more often than this, in milliseconds. */
const ASKED_MS = 5_000;
/** How many seconds before its end a lease is spoken of. */
const SOON_S = 600;

export class Warnings {
  constructor(
    private _pool: IGPUPool,
    private _slices: ISlices,
    private _trans: TranslationBundle
  ) {
    const { myLeases, preferences } = _slices;
    myLeases.changed.connect(this._update, this);
    preferences.changed.connect(this._update, this);
    // Of slices that do not compute nothing changes but the time: the pool, while it is watched, speaks each second.
    _pool.changed.connect(this._update, this);
  }

  private _update(): void {
    const { myLeases, preferences } = this._slices;
    if (this._pool.connection.status === 'lost') {
      return; // what is known is old
    }
    const { idleMinutes } = preferences.choices;
    const at = Date.now() / 1000;
    const valid = new Set<string>();
    for (const lease of myLeases.held) {
      for (const { by, at: asked, message } of lease.asked_back ?? []) {
        const key = `asked ${lease.id} ${by} ${asked}`;
        valid.add(key);
        this._once(key, () => this._asked(lease, by, message));
      }
      if (typeof lease.expires_at === 'number' && lease.expires_at - at < this._soon(lease)) {
        const key = `end ${lease.id} ${lease.expires_at}`;
        valid.add(key);
        this._once(key, () => this._ending(lease, at));
      }
      if (lease.parked) {
        const key = `parked ${lease.id} ${lease.parked.since}`;
        valid.add(key);
        this._once(key, () => this._parked(lease));
      }
      valid.add(stretch(lease));
      if (isDue(lease, idleMinutes, at) && !this._said.has(stretch(lease))) {
        void this._idle(lease);
      }
    }
    // It computes again, was kept, extended or given back: what was said of it is true no longer.
    for (const [key, id] of this._shown) {
      if (!valid.has(key)) {
        Notification.dismiss(id);
        this._shown.delete(key);
      }
    }
  }

  /** A short lease's end is not near from its beginning. */
  private _soon(lease: ILease): number {
    const whole = (lease.expires_at ?? 0) - (lease.granted_at ?? 0);
    return Math.min(SOON_S, whole / 5);
  }

  private async _idle(lease: ILease): Promise<void> {
    const { actions, myLeases } = this._slices;
    const now = Date.now();
    if (now - (this._askedAt.get(lease.id) ?? 0) < ASKED_MS) {
      return;
    }
    this._askedAt.set(lease.id, now);
    if (await actions.isComputing(lease)) {
      return; // a cell runs: it may load, install or download what it computes with
    }
    const current = myLeases.held.find(one => stretch(one) === stretch(lease));
    if (!current) {
      return;
    }
    this._once(stretch(lease), () => {
      const trans = this._trans;
      const idle = age(Date.now() / 1000 - (lease.idle_since ?? 0), trans);
      const message = trans.__('%1 has not used its GPUs for %2.', actions.nameOf(lease), idle);
      return this._notify('warning', message, lease);
    });
  }

  private _asked(lease: ILease, by: string, message: string): string {
    const trans = this._trans;
    const name = this._slices.actions.nameOf(lease);
    return this._notify(
      'info',
      message
        ? trans.__('%1 asks you to release the GPU slices of %2: “%3”', by, name, message)
        : trans.__('%1 asks you to release the GPU slices of %2.', by, name),
      lease
    );
  }

  /** It goes away by itself, and at once when the lease wakes. */
  private _parked(lease: ILease): string {
    const trans = this._trans;
    return Notification.info(
      trans.__(
        '%1 is asleep: it was idle, and its GPUs went to somebody who waited. Nothing is lost; it wakes by itself.',
        this._slices.actions.nameOf(lease)
      ),
      { autoClose: 20_000 }
    );
  }

  private _ending(lease: ILease, at: number): string {
    const trans = this._trans;
    const { actions } = this._slices;
    return Notification.warning(
      trans.__(
        'The GPUs of %1 go back to the pool in %2.',
        actions.nameOf(lease),
        age((lease.expires_at ?? at) - at, trans)
      ),
      {
        autoClose: false,
        actions: [
          {
            label: trans.__('More time…'),
            callback: () => void actions.extend(lease).then(tell)
          }
        ]
      }
    );
  }

  /** With *release* and *keep*; it stays until it is answered. Its id. */
  private _notify(kind: 'info' | 'warning', message: string, lease: ILease): string {
    const trans = this._trans;
    const { actions } = this._slices;
    return Notification[kind](message, {
      autoClose: false,
      actions: [
        {
          label: trans.__('Release'),
          displayType: 'warn',
          callback: () => void actions.release(lease).then(tell)
        },
        { label: trans.__('Keep'), callback: () => void actions.keep(lease).then(tell) }
      ]
    });
  }

  private _once(key: string, say: () => string): void {
    if (!this._said.has(key)) {
      this._said.add(key);
      this._shown.set(key, say());
    }
  }

  private _askedAt = new Map<string, number>();
  private _said = new Set<string>();
  private _shown = new Map<string, string>();
}

function tell(trouble: string): void {
  if (trouble) {
    Notification.error(trouble);
  }
}
