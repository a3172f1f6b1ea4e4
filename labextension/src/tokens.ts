/** What this extension offers to others, and its parts to each other. */

import type { TranslationBundle } from '@jupyterlab/translation';
import { Token } from '@lumino/coreutils';
import type { IDisposable } from '@lumino/disposable';
import type { ISignal } from '@lumino/signaling';
import type { ReactNode } from 'react';

import type { Range } from './chart/data';
import type { Unit } from './common/format';
import type { PoolAPI } from './pool/api';
import type { IGPURequest, ILease } from './pool/apitypes';
import type { IConnection } from './pool/feed';
import type { IPoolState, IUse } from './pool/state';

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

/** The notebook or console that the user worked in last. */
export interface IActiveNotebook {
  /** Another notebook is active, or its kernel changed. */
  readonly changed: ISignal<IActiveNotebook, void>;
  /** `notebook.ipynb`; null where there is none. */
  readonly name: string | null;
  /** The id of its running kernel; null where none runs. */
  readonly kernel: string | null;
  readonly isBusy: boolean;
  /** Whether its metadata has been loaded. */
  readonly isReady: boolean;
  /** Whether a request can be kept in its metadata. */
  readonly remembers: boolean;
  /** The request in its metadata; null without one. */
  readonly wish: IGPURequest | null;
  /** Write a request into its metadata, which is saved when the user saves the notebook. */
  remember(wish: IGPURequest): void;
  /** Remove the request from its metadata. */
  forget(): void;
}

/** What a user does with GPU slices. Each action resolves to a line about what went wrong, empty if nothing did. */
export interface IActions {
  /** The name of the notebook that a lease is for, or the lease's label. */
  nameOf(lease: ILease): string;
  /** The path of that notebook; null where there is none. */
  pathOf(lease: ILease): string | null;
  /** Request GPU slices for a running kernel. */
  attach(kernelId: string, wish: IGPURequest): Promise<string>;
  /** Change the share of each GPU, from 0 to 1; the tensors stay. */
  resize(lease: ILease, partial: number): Promise<string>;
  /** Release a lease after a question. */
  release(lease: ILease): Promise<string>;
  /** Release several leases; `asks`: after one question. */
  releaseAll(leases: readonly ILease[], asks?: boolean): Promise<string>;
  /** Extend a lease by the minutes that the user enters. */
  extend(lease: ILease): Promise<string>;
  /** Ask another holder, in the user's words, to release a lease. */
  askBack(lease: string, holder: string): Promise<string>;
  /** Keep a lease: it no longer counts as idle. */
  keep(lease: ILease): Promise<string>;
  /** Whether a cell of the lease's notebook runs now. */
  isComputing(lease: ILease): Promise<boolean>;
  /** Remove a request from the queue. */
  leave(lease: ILease): Promise<string>;
}

/** The properties of schema/plugin.json. */
export interface IChoices {
  /** What the picker begins with, where the notebook does not say. */
  readonly numGpus: number;
  readonly partial: number;
  /** Seconds between two updates of what is seen. */
  readonly refresh: number;
  readonly units: Unit;
  /** Minutes after which a whole GPU that does not compute is warned of; 0 for never. */
  readonly idleMinutes: number;
  /** Whether the status bar shows the pool: while slices are held, always or never. */
  readonly statusBar: 'held' | 'always' | 'never';
  readonly chartRange: Range;
}

/** The user's settings. */
export interface ISettings {
  readonly changed: ISignal<ISettings, void>;
  readonly choices: IChoices;
  /** Change a setting and save it. */
  prefer<K extends keyof IChoices>(name: K, value: IChoices[K]): Promise<void>;
}

/** The user's leases and queued requests. */
export interface IMyLeases {
  /** The user's name in the pool; null where the pool does not give one. */
  readonly me: string | null;
  /** Leases that hold GPU slices, in order of arrival. */
  readonly held: readonly ILease[];
  /** Requests in the queue, in order of arrival. */
  readonly waiting: readonly ILease[];
  /** The number of requests in the whole pool's queue. */
  readonly queue: number;
  /** Leases came, went or changed. */
  readonly changed: ISignal<IMyLeases, void>;
  /** The use of leases changed. */
  readonly used: ISignal<IMyLeases, void>;
  /** A lease's use of its GPU slices, where it is known. */
  use(lease: ILease): IUse | undefined;
  /** Load the leases now. */
  refresh(): Promise<void>;
}

/** What a user does with GPU slices, and for which notebook. */
export interface ISlices {
  readonly activeNotebook: IActiveNotebook;
  readonly actions: IActions;
  readonly preferences: ISettings;
  readonly myLeases: IMyLeases;
  /** Bring a notebook to the front. */
  open(path: string): void;
  /** What administrators do. */
  openConsole(): void;
}

/** The parts of a page that a view needs beside the state. */
export interface IViewContext {
  pool: IGPUPool;
  slices: ISlices;
  trans: TranslationBundle;
}

/** What a view is given. The state may be old: the panel shows whether the connection is live. */
export interface IViewProps extends IViewContext {
  state: IPoolState;
}

/** A section of the sidebar. */
export interface ISidebarSection {
  /** Unique among the sections. */
  id: string;
  /** Sections stand in the order of their ranks; the built-in ones have 100, 200, and so on. */
  rank: number;
  /** The heading. */
  title: string;
  render: (props: IViewProps) => ReactNode;
}

/** The sections that extensions add to the sidebar. */
export interface ISidebarSections {
  /** By rank. */
  readonly items: readonly ISidebarSection[];
  /** A section was added or removed. */
  readonly changed: ISignal<ISidebarSections, void>;
  /** Add a section, until the answer is disposed of. Throws where the id is taken. */
  add(section: ISidebarSection): IDisposable;
}

export const ISidebarSections = new Token<ISidebarSections>(
  'jupyter-gpupool:ISidebarSections',
  'The sections of the sidebar: add one.'
);

export const ISlices = new Token<ISlices>(
  'jupyter-gpupool:ISlices',
  'GPU slices for notebooks: request, resize and release them.'
);

export const IGPUPool = new Token<IGPUPool>(
  'jupyter-gpupool:IGPUPool',
  'The pool of GPUs: its live state and its API.'
);
