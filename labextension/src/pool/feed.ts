/** A connection to `WS events` that reconnects automatically and resumes where it stopped. */

import { apply, IPoolState } from './state';
import { Message } from './apitypes';

/** `off`: nobody watches. `connecting`: for the first time. `lost`: the state may be out of date. */
export type Status = 'off' | 'connecting' | 'live' | 'lost';

export interface IConnection {
  readonly status: Status;
  /** Why the connection is lost, one line; empty where the reason is unknown. */
  readonly reason: string;
  /** When it is tried again, in milliseconds since the epoch; 0 while it is not lost. */
  readonly retryAt: number;
}

/** The pool sends a message each second; after so many milliseconds without one the connection is lost. */
export const SILENCE_MS = 8000;
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;

export class Feed {
  constructor(options: Feed.IOptions) {
    this._options = options;
  }

  get state(): IPoolState | null {
    return this._state;
  }

  get connection(): IConnection {
    return this._connection;
  }

  /** Connect, and stay connected until `stop`. Harmless when it is so already. */
  start(): void {
    if (this._wanted) {
      return;
    }
    this._wanted = true;
    this._pause = FIRST_PAUSE_MS;
    this._setConnection({ status: this._state ? 'lost' : 'connecting', reason: '', retryAt: 0 });
    this._connect();
  }

  /** Disconnect; the state stays, to be resumed from. */
  stop(): void {
    this._wanted = false;
    this._closeSocket();
    this._setConnection({ status: 'off', reason: '', retryAt: 0 });
  }

  /** Do not wait for the next try. */
  retry(): void {
    if (this._wanted && this._connection.status !== 'live') {
      this._closeSocket();
      this._connect();
    }
  }

  private _connect(): void {
    const state = this._state;
    const query = state ? `?feed=${encodeURIComponent(state.feed)}&seq=${state.seq}` : '';
    let socket: WebSocket;
    try {
      socket = this._options.connect(query);
    } catch (reason) {
      this._onLost(String(reason));
      return;
    }
    this._socket = socket;
    this._restartSilenceTimer();
    socket.onmessage = event => {
      if (socket === this._socket) {
        this._onMessage(event.data as string);
      }
    };
    socket.onclose = event => {
      if (socket === this._socket) {
        this._onLost(event.reason);
      }
    };
  }

  private _onMessage(data: string): void {
    this._restartSilenceTimer();
    let next: IPoolState | null;
    try {
      next = apply(this._state, JSON.parse(data) as Message);
    } catch {
      next = null;
    }
    this._state = next;
    if (next === null) {
      // It does not follow on what is known: ask for everything, at once.
      this._closeSocket();
      this._connect();
      return;
    }
    this._pause = FIRST_PAUSE_MS;
    this._connection = { status: 'live', reason: '', retryAt: 0 };
    this._options.onChange();
  }

  private _onLost(reason: string): void {
    this._closeSocket();
    if (!this._wanted) {
      return;
    }
    // Not all at the same moment, when a server that many watch comes back.
    const pause = this._pause * (0.75 + Math.random() / 2);
    this._pause = Math.min(LONGEST_PAUSE_MS, this._pause * 2);
    this._timer = setTimeout(() => this._connect(), pause);
    this._setConnection({ status: 'lost', reason, retryAt: Date.now() + pause });
    if (!reason) {
      void this._askReason();
    }
  }

  /** A refused WebSocket carries no reason; the same request over HTTP may return one. */
  private async _askReason(): Promise<void> {
    const reason = await this._options.why();
    if (reason && this._connection.status === 'lost' && !this._connection.reason) {
      this._setConnection({ ...this._connection, reason });
    }
  }

  /** Treat the connection as lost after SILENCE_MS without a message. */
  private _restartSilenceTimer(): void {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this._onLost(''), SILENCE_MS);
  }

  private _closeSocket(): void {
    clearTimeout(this._timer);
    const socket = this._socket;
    this._socket = null;
    socket?.close();
  }

  private _setConnection(connection: IConnection): void {
    this._connection = connection;
    this._options.onChange();
  }

  private _connection: IConnection = { status: 'off', reason: '', retryAt: 0 };
  private _options: Feed.IOptions;
  private _pause = FIRST_PAUSE_MS;
  private _socket: WebSocket | null = null;
  private _state: IPoolState | null = null;
  private _timer: ReturnType<typeof setTimeout> | undefined;
  private _wanted = false;
}

export namespace Feed {
  export interface IOptions {
    /** Open a socket; `query` is empty or begins with a question mark. */
    connect: (query: string) => WebSocket;
    /** Why the pool cannot be watched, one line; empty if it can or nobody knows. */
    why: () => Promise<string>;
    /** The state or the connection has changed. */
    onChange: () => void;
  }
}
