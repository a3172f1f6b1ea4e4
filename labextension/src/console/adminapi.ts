/** The calls that administrators make; the names are those of docs/reference/http.md. */

import { PoolAPI } from '../pool/api';
import { ILease, IWhoAmI, Schemas } from '../pool/apitypes';
import { IDocument } from './apicalls';

/** One health check. Older pools send fewer fields, and `ok` instead of `status`. */
export type ICheck = Pick<Schemas['Check'], 'name' | 'detail'> &
  Partial<Schemas['Check']> & { ok?: boolean };

export interface IHealth {
  status: string;
  /** Seconds since the checks were made. */
  age_s?: number;
  checks: ICheck[];
}

/** A listed token; times are in seconds since the epoch. */
export type IToken = Schemas['Token'];

/** `expires_s`: seconds from now; null for no end. */
export type INewToken = Required<Schemas['NewToken']>;

export type Role = Schemas['Member']['role'];

/** What a namespace may hold in total; null for no limit. */
export type ILimits = Required<Schemas['Limits']>;

export type INamespace = Schemas['Namespace'];

export type IAuditEntry = Schemas['AuditEntry'];

export type IUsage = Schemas['Usage'];

/** GPU-hours of a user, a namespace or a GPU. */
export type IUsageRow = Schemas['UsageRow'];

export type UsageBy = IUsage['by'];

const at = encodeURIComponent;

/** Every call rejects with a `PoolError`; its status is 404 where the pool has no such call. */
export class AdminAPI {
  constructor(private _api: PoolAPI) {}

  /** The URL of the calls, with a slash at its end. */
  get base(): string {
    return this._api.base;
  }

  /** What describes every call, in OpenAPI's form. */
  openAPI(): Promise<IDocument> {
    return this._api.other<IDocument>('openapi.json');
  }

  whoAmI(): Promise<IWhoAmI> {
    return this._api.other<IWhoAmI>('whoami');
  }

  /** The checks, also of a pool with a failing check. */
  health(): Promise<IHealth> {
    return this._api.other<IHealth>('health', 'GET', undefined, [503]);
  }

  async tokens(): Promise<IToken[]> {
    return (await this._api.other<Schemas['Tokens']>('tokens')).tokens;
  }

  /** Create a token and return its bundle, a tar. Only this answer contains the token itself. */
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
    return (await this._api.other<Schemas['Namespaces']>('namespaces')).namespaces;
  }

  createNamespace(namespace: Partial<INamespace>): Promise<INamespace> {
    return this._api.other<INamespace>('namespaces', 'POST', namespace);
  }

  changeNamespace(name: string, changes: Partial<INamespace>): Promise<INamespace> {
    return this._api.other<INamespace>(`namespaces/${at(name)}`, 'PATCH', changes);
  }

  removeNamespace(name: string): Promise<Schemas['Deleted']> {
    return this._api.other(`namespaces/${at(name)}`, 'DELETE');
  }

  async audit(): Promise<IAuditEntry[]> {
    return (await this._api.other<Schemas['Audit']>('audit')).entries;
  }

  /** GPU-hours since then: the user's own, or everybody's for administrators. */
  usage(by: UsageBy, since: number): Promise<IUsage> {
    return this._api.other<IUsage>(`usage?by=${by}&since=${since}`);
  }

  release(id: string): Promise<ILease> {
    return this._api.release(id);
  }

  extend(id: string, seconds: number): Promise<ILease> {
    return this._api.extend(id, seconds);
  }

  /** The longest time of a lease of the namespace, in seconds from now; null if it has no limit or is unknown. */
  longest(namespace: string): Promise<number | null> {
    return this._api.longest(namespace).catch(() => null);
  }

  /** Drain a server, or grant on it again. */
  drain(server: string, draining: boolean): Promise<Schemas['Drained']> {
    return this._api.other(`servers/${at(server)}`, 'PATCH', { draining });
  }
}
