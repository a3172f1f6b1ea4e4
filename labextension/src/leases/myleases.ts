/** The user's leases and queued requests, shared by the whole page. */

import { Event } from '@jupyterlab/services';
import { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { IUse, mineOf, split, uses } from '../pool/state';
import type { IGPUPool, IMyLeases } from '../tokens';
import { ILease } from '../pool/apitypes';

/** The event that says that a lease changed; jupyter_gpupool/jupyter/lease_event.yaml. */
const EVENT = 'https://events.jupyter.org/jupyter_gpupool/lease/v1';
/** Events that come together are read together, in milliseconds. */
const GATHER_MS = 200;

/**
 * Events trigger a reload. The pool is watched only while the user has a lease or a queued request, so that a user
 * without one costs the server nothing.
 */
export class MyLeases implements IMyLeases, IDisposable {
  constructor(
    private _pool: IGPUPool,
    private _events: Event.IManager
  ) {}

  /** Load the leases once, then on events. Call it when JupyterLab has been restored. */
  start(): void {
    this._events.stream.connect(this._onEvent, this);
    this._pool.changed.connect(this._update, this);
    document.addEventListener('visibilitychange', this._onVisibilityChange);
    void this.refresh();
  }

  /** As whom the pool knows the user; null where it does not say, and shows nobody else's leases. */
  get me(): string | null {
    return this._me;
  }

  /** Leases that hold slices, in order of arrival. */
  get held(): readonly ILease[] {
    return this._held;
  }

  /** Requests in the queue, in order of arrival. */
  get waiting(): readonly ILease[] {
    return this._waiting;
  }

  /** What a lease makes of what it holds, as last told. */
  use(lease: ILease): IUse | undefined {
    return this._uses.get(lease.id);
  }

  /** How many wait in the whole pool. */
  get queue(): number {
    return this._pool.state?.queue.length ?? this._waiting.length;
  }

  /** Leases came, went or changed. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** The figures of leases changed. */
  get used(): ISignal<this, void> {
    return this._used;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    clearTimeout(this._timer);
    this._watching?.dispose();
    this._events.stream.disconnect(this._onEvent, this);
    this._pool.changed.disconnect(this._update, this);
    document.removeEventListener('visibilitychange', this._onVisibilityChange);
    Signal.clearData(this);
  }

  /** Read them now. */
  async refresh(): Promise<void> {
    let leases: ILease[];
    try {
      leases = await this._pool.api.myLeases();
    } catch {
      return; // the panel shows the reason
    }
    if (!this._isDisposed) {
      this._setLeases(leases);
    }
  }

  /** Ask the pool for the user's name: another pool may use another one. */
  private async _identify(feed: string): Promise<void> {
    this._feed = feed;
    try {
      this._me = (await this._pool.api.whoAmI()).owner || null;
    } catch {
      this._me = null;
    }
    this._leases = null;
    this._update();
    this._changed.emit();
  }

  private _onEvent(_: unknown, event: Event.Emission): void {
    if (event.schema_id === EVENT && this._pool.connection.status !== 'live') {
      clearTimeout(this._timer);
      this._timer = setTimeout(() => void this.refresh(), GATHER_MS);
    }
  }

  private _onVisibilityChange = (): void => {
    // Events of the time in which the page was hidden may not have come.
    if (!document.hidden && this._watching === null) {
      void this.refresh();
    }
  };

  /** Update from the feed while any view watches the pool: it is newer than the events. */
  private _update(): void {
    const { state, connection } = this._pool;
    if (!state || connection.status !== 'live') {
      return;
    }
    if (state.feed !== this._feed) {
      void this._identify(state.feed);
      return;
    }
    if (state.leases !== this._leases) {
      this._leases = state.leases;
      this._setLeases(mineOf(state.leases, this._me));
    }
    if (state.gpus !== this._gpus && this._held.length > 0) {
      this._gpus = state.gpus;
      this._uses = uses(state.gpus);
      this._used.emit();
    }
  }

  private _setLeases(leases: readonly ILease[]): void {
    const living = leases.filter(lease => lease.ended_at === null);
    const before = JSON.stringify([this._held, this._waiting]);
    const { held, waiting } = split(living);
    this._held = held;
    this._waiting = waiting;
    if (living.length > 0) {
      this._watching ??= this._pool.watch();
    } else {
      this._watching?.dispose();
      this._watching = null;
    }
    if (JSON.stringify([held, waiting]) !== before) {
      this._changed.emit();
    }
  }

  private _changed = new Signal<this, void>(this);
  private _feed = '';
  private _gpus: unknown = null;
  private _held: ILease[] = [];
  private _isDisposed = false;
  private _leases: unknown = null;
  private _me: string | null = null;
  private _timer: ReturnType<typeof setTimeout> | undefined;
  private _used = new Signal<this, void>(this);
  private _uses = new Map<string, IUse>();
  private _waiting: ILease[] = [];
  private _watching: IDisposable | null = null;
}
