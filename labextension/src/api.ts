/** The pool over HTTP. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import { IHistory, ILease } from './wire';

/** What a user may ask for: GPUs, and of each one `partial` (0 to 1) or `memory_mib`. */
export interface IWish {
  num_gpus: number;
  partial?: number;
  memory_mib?: number;
  filters?: Record<string, string>;
}

/** What a wish would come to now: granted, a place in the queue, or a reason why never. */
export interface IForecast {
  outcome: 'granted' | 'queued' | 'impossible';
  position: number | null;
  reason: string;
}

/** The pool did not do what it was asked; `message` is one line for people. */
export class PoolError extends Error {
  constructor(
    message: string,
    readonly status = 0
  ) {
    super(message);
  }
}

/** The calls of docs/architecture.md. Every one rejects with a `PoolError`. */
export class PoolAPI {
  constructor(private _settings: ServerConnection.ISettings) {}

  /** Why the pool cannot be asked; empty if it can. */
  async trouble(): Promise<string> {
    try {
      await this._call('pool');
      return '';
    } catch (reason) {
      return reason instanceof Error ? reason.message : String(reason);
    }
  }

  /** Since then, of the whole pool and of the GPUs that are named. */
  history(since: number, step: number, gpus: readonly string[] = []): Promise<IHistory> {
    const query = new URLSearchParams({ since: String(since), step: String(step) });
    gpus.forEach(uuid => query.append('gpu', uuid));
    return this._call<IHistory>(`history?${query}`);
  }

  /** The user's own leases that have not ended. */
  async myLeases(): Promise<ILease[]> {
    return (await this._call<{ leases: ILease[] }>('leases?mine=1')).leases;
  }

  /** The user's leases of the last days, those that have ended too. */
  async pastLeases(): Promise<ILease[]> {
    return (await this._call<{ leases: ILease[] }>('leases?all=1')).leases;
  }

  /** What a wish would come to if it were asked for now. */
  forecast(wish: IWish): Promise<IForecast> {
    const query = new URLSearchParams({ num_gpus: String(wish.num_gpus) });
    if (wish.memory_mib !== undefined) {
      query.set('memory_mib', String(wish.memory_mib));
    } else {
      query.set('partial', String(wish.partial ?? 1));
    }
    for (const [key, value] of Object.entries(wish.filters ?? {})) {
      query.append('filter', `${key}=${value}`);
    }
    return this._call<IForecast>(`forecast?${query}`);
  }

  /** End a lease, or leave the queue. What is on its slices is lost. */
  release(id: string): Promise<ILease> {
    return this._call<ILease>(`leases/${encodeURIComponent(id)}`, 'DELETE');
  }

  /** Another share of the same GPUs; what is on them stays. */
  resize(id: string, share: { partial: number } | { memory_mib: number }): Promise<ILease> {
    return this._call<ILease>(`leases/${encodeURIComponent(id)}`, 'PATCH', share);
  }

  /** So many seconds more for a lease whose time is limited. */
  extend(id: string, seconds: number): Promise<ILease> {
    return this._call<ILease>(`leases/${encodeURIComponent(id)}`, 'PATCH', { extend_s: seconds });
  }

  /** Tell the holder of a lease that one would like to have it; an administrator or a colleague may. */
  ask(id: string, message: string): Promise<unknown> {
    return this._call<unknown>(`leases/${encodeURIComponent(id)}/ask`, 'POST', { message });
  }

  /** A lease is wanted still: it does not count as idle, and who asked for it has an answer. */
  keep(id: string): Promise<unknown> {
    return this._call<unknown>(`leases/${encodeURIComponent(id)}/keep`, 'POST', {});
  }

  /** The feed of the pool; see feed.ts. */
  events(query: string): WebSocket {
    const { wsUrl, token, appendToken, WebSocket } = this._settings;
    const url = URLExt.join(wsUrl, 'gpupool/api/v1/events') + query;
    const secret = appendToken && token ? `token=${encodeURIComponent(token)}` : '';
    return new WebSocket(secret ? `${url}${query ? '&' : '?'}${secret}` : url);
  }

  private async _call<T>(path: string, method = 'GET', body?: unknown): Promise<T> {
    const url = URLExt.join(this._settings.baseUrl, 'gpupool/api/v1', path);
    const init = { method, body: body === undefined ? undefined : JSON.stringify(body) };
    let response: Response;
    try {
      response = await ServerConnection.makeRequest(url, init, this._settings);
    } catch (reason) {
      throw new PoolError(reason instanceof Error ? reason.message : String(reason));
    }
    const answer: unknown = await response.json().catch(() => null);
    if (!response.ok) {
      const line = refusal(answer) ?? `${response.status} ${response.statusText}`;
      throw new PoolError(line, response.status);
    }
    if (answer === null) {
      throw new PoolError(`${url}: not JSON`, response.status);
    }
    return answer as T;
  }
}

/** The line that the pool gave as its reason, if it gave one. */
function refusal(body: unknown): string | undefined {
  const message = (body as { message?: unknown } | null)?.message;
  return typeof message === 'string' && message ? message : undefined;
}
