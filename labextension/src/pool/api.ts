/** The pool over HTTP. */

import { ITransport } from './transport';
import { IForecast, IGPURequest, IHistory, ILease, IWhoAmI, Schemas } from './apitypes';

/** The pool did not do what it was asked; `message` is one line for people. */
export class PoolError extends Error {
  constructor(
    message: string,
    readonly status = 0
  ) {
    super(message);
  }
}

/** The calls of docs/reference/http.md. Every one rejects with a `PoolError`. */
export class PoolAPI {
  constructor(private _transport: ITransport) {}

  /** The URL of the calls, with a slash at its end. */
  get base(): string {
    return this._transport.base;
  }

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

  /** As whom the pool knows the user. */
  whoAmI(): Promise<IWhoAmI> {
    return this._call<IWhoAmI>('whoami');
  }

  /** The user's own leases that have not ended. */
  async myLeases(): Promise<ILease[]> {
    return (await this._call<Schemas['Leases']>('leases?mine=1')).leases;
  }

  /** The user's leases of the last days, those that have ended too. */
  async pastLeases(): Promise<ILease[]> {
    return (await this._call<Schemas['Leases']>('leases?all=1')).leases;
  }

  /** What a wish would come to if it were asked for now. */
  forecast(wish: IGPURequest): Promise<IForecast> {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(wish)) {
      if (typeof value === 'object') {
        Object.entries(value).forEach(pair => query.append('filter', pair.join('=')));
      } else {
        query.set(name, String(Number(value)));
      }
    }
    if (wish.memory_mib === undefined && wish.partial === undefined) {
      query.set('partial', '1');
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

  /** How many seconds a lease of a namespace lasts at most, counted from now; null for no limit. */
  async longest(namespace: string): Promise<number | null> {
    const { namespaces } = await this._call<Schemas['Namespaces']>('namespaces');
    return namespaces.find(one => one.name === namespace)?.limits.lease_s ?? null;
  }

  /** Tell the holder of a lease that one would like to have it; an administrator or a colleague may. */
  ask(id: string, message: string): Promise<Schemas['Asked']> {
    return this._call<Schemas['Asked']>(`leases/${encodeURIComponent(id)}/ask`, 'POST', {
      message
    });
  }

  /** A lease is wanted still: it does not count as idle, and who asked for it has an answer. */
  keep(id: string): Promise<ILease> {
    return this._call<ILease>(`leases/${encodeURIComponent(id)}/keep`, 'POST', {});
  }

  /** The feed of the pool; see feed.ts. */
  events(query: string): WebSocket {
    return this._transport.socket(`events${query}`);
  }

  /** Any call, for what is not everybody's. `expect`: refusals that are answers. */
  other<T>(
    path: string,
    method = 'GET',
    body?: unknown,
    expect: readonly number[] = []
  ): Promise<T> {
    return this._call<T>(path, method, body, expect);
  }

  /** A file, and what it is called. */
  async file(path: string, body: unknown, type: string): Promise<{ name: string; data: Blob }> {
    const response = await this._answer(path, 'POST', body, { Accept: type });
    if (!response.ok) {
      throw await refused(response);
    }
    const [, name] =
      /filename="([\w.-]+)"/.exec(response.headers.get('Content-Disposition') ?? '') ?? [];
    return { name: name ?? 'file', data: await response.blob() };
  }

  private async _call<T>(
    path: string,
    method = 'GET',
    body?: unknown,
    expect: readonly number[] = []
  ): Promise<T> {
    const response = await this._answer(path, method, body);
    if (!response.ok && !expect.includes(response.status)) {
      throw await refused(response);
    }
    const answer: unknown = await response.json().catch(() => null);
    if (answer === null) {
      throw new PoolError(`${response.url}: not JSON`, response.status);
    }
    return answer as T;
  }

  private async _answer(
    path: string,
    method: string,
    body: unknown,
    headers?: Record<string, string>
  ): Promise<Response> {
    const init: RequestInit = { method };
    if (body !== undefined) {
      init.body = JSON.stringify(body);
    }
    if (headers) {
      init.headers = headers;
    }
    try {
      return await this._transport.fetch(path, init);
    } catch (reason) {
      throw new PoolError(reason instanceof Error ? reason.message : String(reason));
    }
  }
}

async function refused(response: Response): Promise<PoolError> {
  const answer: unknown = await response.json().catch(() => null);
  return new PoolError(
    refusal(answer) ?? `${response.status} ${response.statusText}`,
    response.status
  );
}

/** The line that the pool gave as its reason, if it gave one. */
function refusal(body: unknown): string | undefined {
  const message = (body as { message?: unknown } | null)?.message;
  return typeof message === 'string' && message ? message : undefined;
}
