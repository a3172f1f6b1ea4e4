/** What the panel knows of the pool, read again from time to time. */

import { ServerConnection } from '@jupyterlab/services';
import { IDisposable } from '@lumino/disposable';
import { Poll } from '@lumino/polling';
import { ISignal, Signal } from '@lumino/signaling';

import { fetchPool, IGPU, IPool } from './api';

/** A lease as the pool's GPUs show it: who holds it (null: somebody else), and how much of which GPUs. */
export interface IHolding {
  lease: string | null;
  owner: string | null;
  shares: { gpu: IGPU; memory_mib: number }[];
}

/** The last reading of the pool, and a poll that renews it while `wanted()` says so. */
export class PoolModel implements IDisposable {
  constructor(options: PoolModel.IOptions) {
    this._poll = new Poll<IPool>({
      auto: true,
      name: 'jupyter-gpupool:pool',
      factory: () => this._read(options.serverSettings),
      frequency: { interval: options.interval, backoff: true, max: 30 * 1000 },
      standby: () => (options.wanted() ? 'when-hidden' : true)
    });
  }

  /** The pool as last read; null before the first reading and while it cannot be read. */
  get pool(): IPool | null {
    return this._pool;
  }

  /** Why the pool cannot be read, in one line; empty when it can. */
  get error(): string {
    return this._error;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get isDisposed(): boolean {
    return this._poll.isDisposed;
  }

  /** Milliseconds between two readings. */
  set interval(milliseconds: number) {
    this._poll.frequency = { ...this._poll.frequency, interval: milliseconds };
  }

  /** Read now. */
  refresh(): void {
    void this._poll.refresh();
  }

  dispose(): void {
    this._poll.dispose();
    Signal.clearData(this);
  }

  private async _read(settings: ServerConnection.ISettings): Promise<IPool> {
    try {
      this._pool = await fetchPool(settings);
      this._error = '';
      return this._pool;
    } catch (reason) {
      // An old reading would pass for a present one.
      this._pool = null;
      this._error = reason instanceof Error ? reason.message : String(reason);
      // The poll waits longer after a failure when it is told of it.
      throw reason;
    } finally {
      this._changed.emit();
    }
  }

  private _changed = new Signal<this, void>(this);
  private _error = '';
  private _poll: Poll<IPool>;
  private _pool: IPool | null = null;
}

export namespace PoolModel {
  export interface IOptions {
    serverSettings: ServerConnection.ISettings;
    /** Milliseconds between two readings. */
    interval: number;
    /** Whether anybody looks; without that nothing is read. */
    wanted: () => boolean;
  }
}

/**
 * The leases that hold slices now, in the order in which the GPUs name them. What others hold comes
 * last and as one, since their leases cannot be told apart.
 */
export function holdings(pool: IPool): IHolding[] {
  const byLease = new Map<string, IHolding>();
  const others: IHolding = { lease: null, owner: null, shares: [] };
  for (const gpu of pool.servers.flatMap(server => server.gpus)) {
    for (const { lease, owner, memory_mib } of gpu.slices) {
      const share = { gpu, memory_mib };
      if (lease === null) {
        others.shares.push(share);
        continue;
      }
      const holding = byLease.get(lease) ?? { lease, owner, shares: [] };
      holding.shares.push(share);
      byLease.set(lease, holding);
    }
  }
  return others.shares.length > 0 ? [...byLease.values(), others] : [...byLease.values()];
}
