/** What the pool says over HTTP; the names are those of docs/architecture.md. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

/** A share of one GPU that a lease holds; whose it is stays unsaid (null) where it is another user's. */
export interface ISlice {
  lease: string | null;
  owner: string | null;
  memory_mib: number;
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
  slices: ISlice[];
}

/** A machine that holds GPUs. */
export interface IServer {
  name: string;
  host: string;
  gpus: IGPU[];
}

/** The pool at one instant; `queue` holds the ids of the leases that wait, in their order. */
export interface IPool {
  version: string;
  servers: IServer[];
  queue: (string | null)[];
  healthy: boolean;
}

/** The pool did not answer as it should; `message` is one line for people. */
export class PoolError extends Error {}

/** Read the pool. Rejects with a `PoolError`. */
export async function fetchPool(settings: ServerConnection.ISettings): Promise<IPool> {
  return (await get('pool', settings)) as IPool;
}

async function get(path: string, settings: ServerConnection.ISettings): Promise<unknown> {
  const url = URLExt.join(settings.baseUrl, 'gpupool/api/v1', path);
  let response: Response;
  try {
    response = await ServerConnection.makeRequest(url, {}, settings);
  } catch (reason) {
    throw new PoolError(reason instanceof Error ? reason.message : String(reason));
  }
  const body: unknown = await response.json().catch(() => null);
  if (!response.ok) {
    throw new PoolError(refusal(body) ?? `${response.status} ${response.statusText}`);
  }
  if (body === null) {
    throw new PoolError(`${url}: not JSON`);
  }
  return body;
}

/** The line that the pool gave as its reason, if it gave one. */
function refusal(body: unknown): string | undefined {
  const message = (body as { message?: unknown } | null)?.message;
  return typeof message === 'string' && message ? message : undefined;
}
