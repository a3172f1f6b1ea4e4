/** What the user holds and waits for, known to all of the page; and cheap while that is nothing. */

import { Event } from '@jupyterlab/services';
import { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { IUse, mineOf, split, uses } from './state';
import { IGPUPool } from './tokens';
import { ILease } from './wire';

/** The event that says that a lease changed; jupyter_gpupool/jupyter/lease_event.yaml. */
const EVENT = 'https://events.jupyter.org/jupyter_gpupool/lease/v1';
/** Events that come together are read together, in milliseconds. */
const GATHER_MS = 200;

/**
 * Events are hints to read again. The pool is watched for as long as there is something of the user's in it, and
 * only then: figures of nothing interest nobody.
 */
export class Holdings implements IDisposable {
  constructor(
    private _pool: IGPUPool,
    private _events: Event.IManager
  ) {}

  /** Begin to look: once when JupyterLab stands, then when there is a reason. */
  start(): void {
    this._events.stream.connect(this._hear, this);
    this._pool.changed.connect(this._look, this);
    document.addEventListener('visibilitychange', this._seen);
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
    this._events.stream.disconnect(this._hear, this);
    this._pool.changed.disconnect(this._look, this);
    document.removeEventListener('visibilitychange', this._seen);
    Signal.clearData(this);
  }

  /** Read them now. */
  async refresh(): Promise<void> {
    let leases: ILease[];
    try {
      leases = await this._pool.api.myLeases();
    } catch {
      return; // whoever opens the panel is told why
    }
    if (!this._isDisposed) {
      this._take(leases);
    }
  }

  /** Another pool may know the user by another name. */
  private async _ask(feed: string): Promise<void> {
    this._feed = feed;
    try {
      this._me = (await this._pool.api.whoAmI()).owner || null;
    } catch {
      this._me = null;
    }
    this._leases = null;
    this._look();
    this._changed.emit();
  }

  private _hear(_: unknown, event: Event.Emission): void {
    if (event.schema_id === EVENT && this._pool.connection.status !== 'live') {
      clearTimeout(this._timer);
      this._timer = setTimeout(() => void this.refresh(), GATHER_MS);
    }
  }

  private _seen = (): void => {
    // Events of the time in which the page was hidden may not have come.
    if (!document.hidden && this._watching === null) {
      void this.refresh();
    }
  };

  /** While the pool is watched, by whomever, the feed tells more than events do. */
  private _look(): void {
    const { state, connection } = this._pool;
    if (!state || connection.status !== 'live') {
      return;
    }
    if (state.feed !== this._feed) {
      void this._ask(state.feed);
      return;
    }
    if (state.leases !== this._leases) {
      this._leases = state.leases;
      this._take(mineOf(state.leases, this._me));
    }
    if (state.gpus !== this._gpus && this._held.length > 0) {
      this._gpus = state.gpus;
      this._uses = uses(state.gpus);
      this._used.emit();
    }
  }

  private _take(leases: readonly ILease[]): void {
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
