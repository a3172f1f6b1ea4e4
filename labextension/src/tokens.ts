/** What this extension offers to others, and its parts to each other. */

import { Token } from '@lumino/coreutils';
import { IDisposable } from '@lumino/disposable';
import { ISignal } from '@lumino/signaling';

import { Actions } from './actions';
import { PoolAPI } from './api';
import { IConnection } from './feed';
import { Front } from './front';
import { Holdings } from './holdings';
import { Preferences } from './preferences';
import { IPoolState } from './state';

/** The pool that this Jupyter server offers. */
export interface IGPUPool {
  /** As last told, or null; it is as of now only while `connection.status` is `live`. */
  readonly state: IPoolState | null;
  readonly connection: IConnection;
  /** `state` or `connection` changed; at most once in a frame, and not while the page is hidden. */
  readonly changed: ISignal<IGPUPool, void>;
  /** Seconds between two `changed` at least; 0 for every frame. */
  pace: number;
  /** What can be asked of the pool. */
  readonly api: PoolAPI;
  /** Have the pool watched until the answer is disposed of. Nothing is read while nobody watches. */
  watch(): IDisposable;
  /** When the connection is lost: try now. */
  retry(): void;
}

/** What a user does with slices, and for which notebook. */
export interface ISlices {
  /** The notebook that the user worked in last. */
  readonly front: Front;
  readonly actions: Actions;
  readonly preferences: Preferences;
  /** What the user holds and waits for. */
  readonly holdings: Holdings;
  /** Bring a notebook to the front. */
  open(path: string): void;
  /** What administrators do. */
  openConsole(): void;
}

export const ISlices = new Token<ISlices>(
  'jupyter-gpupool:ISlices',
  'Slices for notebooks: ask for them, resize them, give them back.'
);

export const IGPUPool = new Token<IGPUPool>(
  'jupyter-gpupool:IGPUPool',
  'The pool of GPUs: its state, live, and what can be asked of it.'
);
