/** The pool, watched for as long as somebody looks. */

import { DisposableDelegate, IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { PoolAPI } from './api';
import { Feed, IConnection, Status } from './feed';
import { IPoolState } from './state';
import { IGPUPool } from './tokens';

export class PoolModel implements IGPUPool, IDisposable {
  constructor(api: PoolAPI) {
    this.api = api;
    this._feed = new Feed({
      connect: query => api.events(query),
      why: () => api.trouble(),
      onChange: () => this._later()
    });
    document.addEventListener('visibilitychange', this._settle);
  }

  readonly api: PoolAPI;

  /** Seconds between two `changed` at least. */
  pace = 0;

  get state(): IPoolState | null {
    return this._feed.state;
  }

  get connection(): IConnection {
    return this._feed.connection;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  watch(): IDisposable {
    this._watchers += 1;
    this._settle();
    return new DisposableDelegate(() => {
      this._watchers -= 1;
      this._settle();
    });
  }

  retry(): void {
    this._feed.retry();
  }

  dispose(): void {
    if (this._isDisposed) {
      return;
    }
    this._isDisposed = true;
    document.removeEventListener('visibilitychange', this._settle);
    this._settle();
    cancelAnimationFrame(this._frame);
    clearTimeout(this._pause);
    Signal.clearData(this);
  }

  /** Connected while somebody looks, and only then. */
  private _settle = (): void => {
    if (this._watchers > 0 && !document.hidden && !this._isDisposed) {
      this._feed.start();
    } else {
      this._feed.stop();
    }
  };

  /** What comes together is told together. */
  private _later(): void {
    if (this._frame !== 0 || this._isDisposed) {
      return;
    }
    // A lost connection is told at once; figures may wait.
    const { status } = this._feed.connection;
    const rest = this._told + 1000 * this.pace - Date.now();
    clearTimeout(this._pause);
    if (rest > 0 && status === this._status) {
      this._pause = setTimeout(() => this._later(), rest);
      return;
    }
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      this._told = Date.now();
      this._status = this._feed.connection.status;
      this._changed.emit();
    });
  }

  private _changed = new Signal<this, void>(this);
  private _feed: Feed;
  private _frame = 0;
  private _isDisposed = false;
  private _pause: ReturnType<typeof setTimeout> | undefined;
  private _status: Status = 'off';
  private _told = 0;
  private _watchers = 0;
}
