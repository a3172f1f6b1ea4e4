/** A connection to `WS events` that comes back by itself and goes on where it was. */

import { apply, IPoolState } from './state';
import { Message } from './wire';

/** `off`: nobody wants it. `connecting`: for the first time. `lost`: what is shown is getting old. */
export type Status = 'off' | 'connecting' | 'live' | 'lost';

export interface IConnection {
  readonly status: Status;
  /** Why it is lost, one line; empty where nobody said. */
  readonly reason: string;
  /** When it is tried again, in milliseconds since the epoch; 0 while it is not lost. */
  readonly retryAt: number;
}

/** The pool speaks each second; after so many milliseconds of silence the connection counts as lost. */
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
    this._tell({ status: this._state ? 'lost' : 'connecting', reason: '', retryAt: 0 });
    this._connect();
  }

  /** Disconnect; the state stays, to be resumed from. */
  stop(): void {
    this._wanted = false;
    this._drop();
    this._tell({ status: 'off', reason: '', retryAt: 0 });
  }

  /** Do not wait for the next try. */
  retry(): void {
    if (this._wanted && this._connection.status !== 'live') {
      this._drop();
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
      this._lose(String(reason));
      return;
    }
    this._socket = socket;
    this._listen();
    socket.onmessage = event => {
      if (socket === this._socket) {
        this._hear(event.data as string);
      }
    };
    socket.onclose = event => {
      if (socket === this._socket) {
        this._lose(event.reason);
      }
    };
  }

  private _hear(data: string): void {
    this._listen();
    let next: IPoolState | null;
    try {
      next = apply(this._state, JSON.parse(data) as Message);
    } catch {
      next = null;
    }
    this._state = next;
    if (next === null) {
      // It does not follow on what is known: ask for everything, at once.
      this._drop();
      this._connect();
      return;
    }
    this._pause = FIRST_PAUSE_MS;
    this._connection = { status: 'live', reason: '', retryAt: 0 };
    this._options.onChange();
  }

  private _lose(reason: string): void {
    this._drop();
    if (!this._wanted) {
      return;
    }
    // Not all at the same moment, when a server that many watch comes back.
    const pause = this._pause * (0.75 + Math.random() / 2);
    this._pause = Math.min(LONGEST_PAUSE_MS, this._pause * 2);
    this._timer = setTimeout(() => this._connect(), pause);
    this._tell({ status: 'lost', reason, retryAt: Date.now() + pause });
    if (!reason) {
      void this._ask();
    }
  }

  /** A socket that is refused does not say why; the same question over HTTP may. */
  private async _ask(): Promise<void> {
    const reason = await this._options.why();
    if (reason && this._connection.status === 'lost' && !this._connection.reason) {
      this._tell({ ...this._connection, reason });
    }
  }

  /** From now on, silence is a loss. */
  private _listen(): void {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this._lose(''), SILENCE_MS);
  }

  private _drop(): void {
    clearTimeout(this._timer);
    const socket = this._socket;
    this._socket = null;
    socket?.close();
  }

  private _tell(connection: IConnection): void {
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
