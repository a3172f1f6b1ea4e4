/** The pool's state, live while at least one view watches it. */

import { DisposableDelegate, IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import { PoolAPI } from './api';
import { Feed, IConnection, Status } from './feed';
import { IPoolState } from './state';
import { IGPUPool } from '../tokens';

export class PoolModel implements IGPUPool, IDisposable {
  constructor(api: PoolAPI) {
    this.api = api;
    this._feed = new Feed({
      connect: query => api.events(query),
      why: () => api.trouble(),
      onChange: () => this._scheduleChanged()
    });
    document.addEventListener('visibilitychange', this._updateFeed);
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
    this._updateFeed();
    return new DisposableDelegate(() => {
      this._watchers -= 1;
      this._updateFeed();
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
    document.removeEventListener('visibilitychange', this._updateFeed);
    this._updateFeed();
    cancelAnimationFrame(this._frame);
    clearTimeout(this._pause);
    Signal.clearData(this);
  }

  /** Connect while a view watches and the page is visible, else disconnect. */
  private _updateFeed = (): void => {
    if (this._watchers > 0 && !document.hidden && !this._isDisposed) {
      this._feed.start();
    } else {
      this._feed.stop();
    }
  };

  /** Emit `changed` once for all messages of a frame. */
  private _scheduleChanged(): void {
    if (this._frame !== 0 || this._isDisposed) {
      return;
    }
    // Report a lost connection at once; figures may wait.
    const { status } = this._feed.connection;
    const rest = this._notifiedAt + 1000 * this.pace - Date.now();
    clearTimeout(this._pause);
    if (rest > 0 && status === this._status) {
      this._pause = setTimeout(() => this._scheduleChanged(), rest);
      return;
    }
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      this._notifiedAt = Date.now();
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
  private _notifiedAt = 0;
  private _watchers = 0;
}
