/** Pools as a feed would tell them. */

import { IDeltaMessage, IGPU, ILease, IStateMessage } from '../src/pool/apitypes';

export function gpu(fields: Partial<IGPU> = {}): IGPU {
  return {
    uuid: 'a',
    server: 'one',
    index: 0,
    name: 'Tesla V100',
    memory_mib: 32510,
    emulated: false,
    healthy: true,
    taken_mib: 0,
    trouble: '',
    granted_mib: 0,
    used_mib: 0,
    busy: 0,
    slices: [],
    ...fields
  };
}

export function lease(fields: Partial<ILease> = {}): ILease {
  const id = fields.id ?? 'lease-1';
  return {
    id,
    request: {
      id,
      owner: 'ada',
      num_gpus: 1,
      partial: 0.5,
      memory_mib: null,
      filters: {},
      spread: false,
      never_park: false,
      namespace: 'default',
      wait: true,
      label: 'notebook',
      client: 'host:1'
    },
    state: 'ACTIVE',
    slices: [],
    reason: '',
    created_at: 1,
    granted_at: 1,
    ended_at: null,
    environment: 'default',
    torch: '2.13.0',
    expires_at: null,
    idle_since: null,
    asked_back: [],
    parked: null,
    moving_to: [],
    position: null,
    waits_for: '',
    ttl_s: 15,
    worker: null,
    ...fields
  };
}

export function whole(fields: Partial<IStateMessage> = {}): IStateMessage {
  return {
    type: 'state',
    feed: 'f',
    seq: 0,
    at: 100,
    servers: [{ name: 'one', host: 'one', draining: false, gpus: ['a', 'b'] }],
    gpus: { a: gpu(), b: gpu({ uuid: 'b', index: 1 }) },
    leases: {},
    queue: [],
    healthy: true,
    ...fields
  };
}

export function delta(seq: number, fields: Partial<IDeltaMessage> = {}): IDeltaMessage {
  return { type: 'delta', seq, at: 100 + seq, ...fields };
}
