/** The pool's state, and how each message of a feed changes it. Pure. */

import { IDeltaMessage, IGPU, ILease, IServer, Message } from './apitypes';

/**
 * The pool at one instant. Values are never changed in place: what is the same object as before is
 * the same as before.
 */
export interface IPoolState {
  /** Which feed this is, and its last message: what to resume from. */
  readonly feed: string;
  readonly seq: number;
  /** When it was so, in seconds since the epoch. */
  readonly at: number;
  readonly servers: readonly IServer[];
  readonly gpus: Readonly<Record<string, IGPU>>;
  /** The leases that the user may see and that have not ended. */
  readonly leases: Readonly<Record<string, ILease>>;
  /** Who waits, in order; null for a request of somebody else. */
  readonly queue: readonly (string | null)[];
  readonly healthy: boolean;
  /** Leases that ended while this was watched, the newest first. */
  readonly ended: readonly ILease[];
}

/** How many ended leases are remembered. */
const ENDED = 20;

/**
 * The state after a message; null when the message does not follow on it, so that the whole state has
 * to be asked for again.
 */
export function apply(state: IPoolState | null, message: Message): IPoolState | null {
  switch (message.type) {
    case 'state': {
      const { feed, seq, at, servers, gpus, leases, queue, healthy } = message;
      const ended = state?.ended ?? [];
      return { feed, seq, at, servers, gpus, leases, queue, healthy, ended };
    }
    case 'resumed':
      return state && state.feed === message.feed && state.seq === message.seq ? state : null;
    case 'delta':
      return state && message.seq === state.seq + 1 ? changed(state, message) : null;
    default:
      return state; // of a newer pool: what it means cannot be needed here
  }
}

function changed(state: IPoolState, delta: IDeltaMessage): IPoolState {
  let { gpus, leases, ended } = state;
  if (delta.gpus) {
    const next = { ...gpus };
    for (const [uuid, fields] of Object.entries(delta.gpus)) {
      if (fields === null) {
        delete next[uuid];
      } else {
        const known = next[uuid];
        // The first that a feed sends of a GPU is all of it.
        next[uuid] = known ? { ...known, ...fields } : (fields as IGPU);
      }
    }
    gpus = next;
  }
  if (delta.leases) {
    const next = { ...leases };
    const over: ILease[] = [];
    for (const [id, lease] of Object.entries(delta.leases)) {
      if (lease === null || lease.ended_at !== null) {
        delete next[id];
      } else {
        next[id] = lease;
      }
      if (lease?.ended_at) {
        over.push(lease);
      }
    }
    leases = next;
    ended = over.length > 0 ? [...over, ...ended].slice(0, ENDED) : ended;
  }
  return {
    feed: state.feed,
    seq: delta.seq,
    at: delta.at,
    servers: delta.servers ?? state.servers,
    gpus,
    leases,
    queue: delta.queue ?? state.queue,
    healthy: delta.healthy ?? state.healthy,
    ended
  };
}

/** The pool in figures. */
export interface ITotals {
  gpus: number;
  free: number;
  partly: number;
  full: number;
  unhealthy: number;
  emulated: number;
  memory_mib: number;
  granted_mib: number;
  used_mib: number;
  /** MiB that healthy GPUs have left. */
  free_mib: number;
  /** The mean of all GPUs, 0 to 1. */
  busy: number;
  /** The most MiB that one GPU has left. */
  largest_mib: number;
  waiting: number;
}

/** What is left of a GPU; nothing of one that is not healthy. */
export function freeOf(gpu: IGPU): number {
  return gpu.healthy ? Math.max(0, gpu.memory_mib - gpu.granted_mib) : 0;
}

export function totals(state: IPoolState): ITotals {
  const sum: ITotals = {
    gpus: 0,
    free: 0,
    partly: 0,
    full: 0,
    unhealthy: 0,
    emulated: 0,
    memory_mib: 0,
    granted_mib: 0,
    used_mib: 0,
    free_mib: 0,
    busy: 0,
    largest_mib: 0,
    waiting: state.queue.length
  };
  for (const gpu of Object.values(state.gpus)) {
    const free = freeOf(gpu);
    sum.gpus += 1;
    sum.emulated += gpu.emulated ? 1 : 0;
    sum.memory_mib += gpu.memory_mib;
    sum.granted_mib += gpu.granted_mib;
    sum.used_mib += gpu.used_mib;
    sum.free_mib += free;
    sum.busy += gpu.busy;
    sum.largest_mib = Math.max(sum.largest_mib, free);
    if (!gpu.healthy) {
      sum.unhealthy += 1;
    } else if (gpu.memory_mib === 0) {
      continue; // it does not tell its memory, of which nothing can be granted
    } else if (gpu.granted_mib === 0) {
      sum.free += 1;
    } else if (free > 0) {
      sum.partly += 1;
    } else {
      sum.full += 1;
    }
  }
  sum.busy = sum.gpus > 0 ? sum.busy / sum.gpus : 0;
  return sum;
}

/** What one lease makes of what it holds. */
export interface IUse {
  granted_mib: number;
  used_mib: number;
  /** The mean over its GPUs, 0 to 1. */
  busy: number;
}

/** The use of every lease that the user may see, by its id. */
export function uses(gpus: IPoolState['gpus']): Map<string, IUse> {
  const found = new Map<string, IUse & { count: number }>();
  for (const gpu of Object.values(gpus)) {
    for (const slice of gpu.slices) {
      if (slice.lease === null) {
        continue;
      }
      let use = found.get(slice.lease);
      if (!use) {
        found.set(slice.lease, (use = { granted_mib: 0, used_mib: 0, busy: 0, count: 0 }));
      }
      use.granted_mib += slice.memory_mib;
      use.used_mib += slice.used_mib;
      use.busy = (use.busy * use.count + slice.busy) / (use.count + 1);
      use.count += 1;
    }
  }
  return found;
}

/** The leases of one user; all of them where the pool does not say who that is. */
export function mineOf(leases: IPoolState['leases'], me: string | null): ILease[] {
  const all = Object.values(leases);
  return me === null ? all : all.filter(lease => lease.request.owner === me);
}

/** What somebody else holds, as far as the user may know. */
export interface IHolder {
  lease: string;
  owner: string;
  label: string;
  /** By server: the GPUs' indices. */
  where: ReadonlyMap<string, readonly number[]>;
  memory_mib: number;
}

/** The leases of others whose holders the user may know, by their names. */
export function holdersOf(gpus: IPoolState['gpus'], me: string | null): IHolder[] {
  const found = new Map<string, IHolder & { where: Map<string, number[]> }>();
  for (const gpu of Object.values(gpus)) {
    for (const { lease, owner, label, memory_mib } of gpu.slices) {
      if (lease === null || owner === null || me === null || owner === me) {
        continue;
      }
      let holder = found.get(lease);
      if (!holder) {
        found.set(lease, (holder = { lease, owner, label, where: new Map(), memory_mib: 0 }));
      }
      holder.memory_mib += memory_mib;
      holder.where.set(gpu.server, [...(holder.where.get(gpu.server) ?? []), gpu.index]);
    }
  }
  return [...found.values()].sort((a, b) => (a.owner < b.owner ? -1 : a.owner > b.owner ? 1 : 0));
}

/** The leases that hold slices, and those that wait; each in order of arrival. */
export function split(leases: readonly ILease[]): { held: ILease[]; waiting: ILease[] } {
  const all = [...leases].sort((a, b) => a.created_at - b.created_at);
  return {
    held: all.filter(lease => lease.state !== 'QUEUED'),
    waiting: all.filter(lease => lease.state === 'QUEUED')
  };
}

/** What a share of a GPU's memory is in MiB, as the pool reckons: rounded down. */
export function shareOf(memory_mib: number, partial: number): number {
  // 0.29 of 100 are 29, although 0.29 * 100 is a little less in binary.
  return Math.floor(memory_mib * partial + 1e-6);
}
