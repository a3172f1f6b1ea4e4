/** The JSON of the pool, by the names that the panel uses; openapi.ts says what each field means. */

import type { components } from './openapi';

export type Schemas = components['schemas'];

/** None of its fields is null: one that is not given is left out. */
type Given<T> = { [K in keyof T]: NonNullable<T[K]> };

/** What a user may ask for: GPUs, and of each one `partial` (0 to 1) or `memory_mib`; of several servers if `spread`. */
export type IGPURequest = Given<Schemas['WantedGPUs']> & { num_gpus: number };

/** A share of one GPU that a lease holds; whose it is is null where the user may not know. */
export type ISlice = Schemas['GPUSlice'];

/** One GPU, and what is granted on it. */
export type IGPU = Schemas['GPU'];

/** A machine that holds GPUs; `gpus` are their uuids. */
export type IServer = Schemas['Server'];

export type LeaseState = Schemas['LeaseState'];

/** A lease's share of one GPU. */
export type IPiece = Schemas['Slice'];

/** A request by another user that a lease be released. */
export type IAskedBack = Schemas['AskedBack'];

/** `GET whoami`: as whom the pool knows the caller. */
export type IWhoAmI = Schemas['WhoAmI'];

/** A request and what became of it; times in seconds since the epoch. */
export type ILease = Schemas['Lease'];

/** Columns over a regular grid of time; null where nobody measured. */
export type IColumns = Schemas['Columns'];

/** `GET history`. */
export type IHistory = Schemas['History'];

/** `GET forecast`: granted, a place in the queue, or a reason why never. */
export type IForecast = Schemas['Forecast'];

/** The messages of a feed; feed.ts reads them. */
export type IStateMessage = Schemas['StateMessage'];
export type IDeltaMessage = Schemas['DeltaMessage'];
export type IResumedMessage = Schemas['ResumedMessage'];

export type Message = IStateMessage | IDeltaMessage | IResumedMessage;
