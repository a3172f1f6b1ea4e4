/** What the pool says, as JSON; the names are those of docs/architecture.md. */

/** A share of one GPU that a lease holds; whose it is stays unsaid (null) where the user may not know. */
export interface ISlice {
  lease: string | null;
  owner: string | null;
  label: string;
  memory_mib: number;
  used_mib: number;
  /** 0 to 1: the share of the last seconds in which it computed. */
  busy: number;
  state: LeaseState;
}

/** One GPU, and what is granted on it. `memory_mib` is all that the pool may grant of it. */
export interface IGPU {
  uuid: string;
  server: string;
  index: number;
  name: string;
  memory_mib: number;
  emulated: boolean;
  healthy: boolean;
  granted_mib: number;
  used_mib: number;
  busy: number;
  slices: ISlice[];
}

/** A machine that holds GPUs; `gpus` are their uuids. */
export interface IServer {
  name: string;
  host: string;
  gpus: string[];
  /** Nothing new is placed on it. */
  draining?: boolean;
}

export type LeaseState =
  'QUEUED' | 'GRANTED' | 'ACTIVE' | 'PARKED' | 'RELEASED' | 'EXPIRED' | 'LOST' | 'CANCELLED';

/** What somebody asked for; one of `partial` and `memory_mib` is set. */
export interface IRequest {
  id: string;
  owner: string;
  num_gpus: number;
  partial: number | null;
  memory_mib: number | null;
  filters: Record<string, string>;
  namespace: string;
  label: string;
  client: string;
}

/** A lease's share of one GPU. */
export interface IPiece {
  gpu_uuid: string;
  server: string;
  index: number;
  name: string;
  memory_mib: number;
  total_mib: number;
  emulated: boolean;
}

/** Somebody's wish to have what a lease holds. */
export interface IAskedBack {
  by: string;
  at: number;
  message: string;
}

/** `GET whoami`: as whom the pool knows the caller. */
export interface IWhoAmI {
  owner: string;
  /** Whether everybody's leases are the caller's to see and to end. */
  administers: boolean;
  namespace: string;
}

/** A request and what became of it; times in seconds since the epoch. */
export interface ILease {
  id: string;
  request: IRequest;
  state: LeaseState;
  slices: IPiece[];
  reason: string;
  created_at: number;
  granted_at: number | null;
  ended_at: number | null;
  /** When its time is over, where the pool limits it. */
  expires_at?: number | null;
  /** Since when it has computed nothing, once that is worth telling. */
  idle_since?: number | null;
  /** Who would like to have it. */
  asked_back?: IAskedBack[];
  position: number | null;
}

/** Columns over a regular grid of time; null where nobody measured. */
export interface IColumns {
  memory_mib: (number | null)[];
  granted_mib: (number | null)[];
  used_mib: (number | null)[];
  busy: (number | null)[];
}

/** `GET history`. */
export interface IHistory extends IColumns {
  since: number;
  until: number;
  step: number;
  times: number[];
  gpus: Record<string, IColumns>;
}

/** The first message of a feed: everything. */
export interface IStateMessage {
  type: 'state';
  feed: string;
  seq: number;
  at: number;
  servers: IServer[];
  gpus: Record<string, IGPU>;
  leases: Record<string, ILease>;
  queue: (string | null)[];
  healthy: boolean;
}

/** What differs from the message before; null for what is gone. */
export interface IDeltaMessage {
  type: 'delta';
  seq: number;
  at: number;
  servers?: IServer[];
  gpus?: Record<string, Partial<IGPU> | null>;
  leases?: Record<string, ILease | null>;
  queue?: (string | null)[];
  healthy?: boolean;
}

/** The deltas that were missed follow. */
export interface IResumedMessage {
  type: 'resumed';
  feed: string;
  seq: number;
  at: number;
}

export type Message = IStateMessage | IDeltaMessage | IResumedMessage;
