/** What administrators ask of a pool; the names are those of docs/architecture.md. */

import { PoolAPI } from '../api';
import { ILease } from '../wire';

/** One health check. `ok` is what pools of before say instead of `status`. */
export interface ICheck {
  name: string;
  detail: string;
  ok?: boolean;
  status?: 'ok' | 'warning' | 'failing' | 'unknown';
  value?: number | null;
  unit?: string;
  bound?: string;
  threshold?: number | null;
  advice?: string;
  server?: string;
  gpu?: string;
}

export interface IHealth {
  status: string;
  /** How old what it says is, in seconds. */
  age_s?: number;
  checks: ICheck[];
}

/** A token as it is listed; times in seconds since the epoch. */
export interface IToken {
  id: string;
  description: string;
  owner: string;
  namespace: string;
  administers: boolean;
  created_at: number;
  expires_at: number | null;
  revoked_at: number | null;
  last_used_at: number | null;
  state: 'valid' | 'expired' | 'revoked';
}

export interface INewToken {
  description: string;
  owner: string;
  namespace: string;
  administers: boolean;
  /** Seconds from now; null for ever. */
  expires_s: number | null;
}

export type Role = 'view' | 'use' | 'administer';

/** What a namespace may hold together; null: as much as there is. */
export interface ILimits {
  memory_mib: number | null;
  gpus: number | null;
  leases: number | null;
  user_share: number | null;
  lease_s: number | null;
  idle_s: number | null;
}

export interface INamespace {
  name: string;
  description: string;
  limits: Partial<ILimits>;
  weight: number;
  names_holders: boolean;
  members: Record<string, Role>;
}

/** Who calls, as the pool knows them. */
export interface IWho {
  owner: string;
  administers: boolean;
  namespace: string;
  role: Role | null;
}

export interface IEntry {
  at: number;
  actor: string;
  action: string;
  subject: string;
  outcome: string;
  namespace: string;
}

const at = encodeURIComponent;

/** Every call rejects with a `PoolError`; its status is 404 where the pool has no such call. */
export class Administration {
  constructor(private _api: PoolAPI) {}

  whoAmI(): Promise<IWho> {
    return this._api.other<IWho>('whoami');
  }

  /** A pool that is failing answers too. */
  health(): Promise<IHealth> {
    return this._api.other<IHealth>('health', 'GET', undefined, [503]);
  }

  async tokens(): Promise<IToken[]> {
    return (await this._api.other<{ tokens: IToken[] }>('tokens')).tokens;
  }

  /** The bundle, a tar: the one time that what the token is worth can be had. */
  createToken(token: INewToken): Promise<{ name: string; data: Blob }> {
    return this._api.file('tokens', token, 'application/x-tar');
  }

  extendToken(id: string, expires_s: number | null): Promise<IToken> {
    return this._api.other<IToken>(`tokens/${at(id)}`, 'PATCH', { expires_s });
  }

  revokeToken(id: string, endLeases: boolean): Promise<IToken> {
    return this._api.other<IToken>(`tokens/${at(id)}?end_leases=${endLeases ? 1 : 0}`, 'DELETE');
  }

  async namespaces(): Promise<INamespace[]> {
    return (await this._api.other<{ namespaces: INamespace[] }>('namespaces')).namespaces;
  }

  createNamespace(namespace: Partial<INamespace>): Promise<INamespace> {
    return this._api.other<INamespace>('namespaces', 'POST', namespace);
  }

  changeNamespace(name: string, changes: Partial<INamespace>): Promise<INamespace> {
    return this._api.other<INamespace>(`namespaces/${at(name)}`, 'PATCH', changes);
  }

  removeNamespace(name: string): Promise<unknown> {
    return this._api.other(`namespaces/${at(name)}`, 'DELETE');
  }

  async audit(): Promise<IEntry[]> {
    return (await this._api.other<{ entries: IEntry[] }>('audit')).entries;
  }

  release(id: string): Promise<ILease> {
    return this._api.release(id);
  }

  extend(id: string, seconds: number): Promise<ILease> {
    return this._api.extend(id, seconds);
  }

  /** How many seconds a lease of that namespace lasts at most from now on; null for no limit, or if it is not told. */
  longest(namespace: string): Promise<number | null> {
    return this._api.longest(namespace).catch(() => null);
  }

  /** Place nothing new on a server, or place on it again. */
  drain(server: string, draining: boolean): Promise<unknown> {
    return this._api.other(`servers/${at(server)}`, 'PATCH', { draining });
  }
}
