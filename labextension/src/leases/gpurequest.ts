/** The request that a notebook keeps in its metadata, and how the form's choices change it. Pure. */

import { IGPURequest } from '../pool/api';

/** The fields that the form replaces as a whole; every other field of the metadata stays. */
const REPLACED = ['num_gpus', 'partial', 'memory_mib', 'filters', 'spread'] as const;

/** The memory of each GPU: a fraction of it, or so many MiB. */
export type Memory = { partial: number } | { memory_mib: number };

/** What the user chose in the form. */
export interface IFormChoice {
  numGpus: number;
  memory: Memory;
  /** A GPU's model; empty for any. */
  model: string;
  /** The filters besides the model. */
  filters: Record<string, string>;
  /** The GPUs may be of several servers. */
  spread: boolean;
}

/** The request in a notebook's metadata; null where it has none, or one for no GPUs. */
export function requestFromMetadata(metadata: unknown): IGPURequest | null {
  if (!isRecord(metadata) || Object.keys(metadata).length === 0) {
    return null;
  }
  const { num_gpus = 1, partial, memory_mib, filters, spread } = metadata;
  if (!Number.isInteger(num_gpus) || (num_gpus as number) < 1) {
    return null;
  }
  const request: IGPURequest = { num_gpus: num_gpus as number };
  if (typeof memory_mib === 'number') {
    request.memory_mib = memory_mib;
  } else if (typeof partial === 'number') {
    request.partial = partial;
  }
  const texts = Object.entries(isRecord(filters) ? filters : {})
    .filter(([, value]) => ['string', 'number', 'boolean'].includes(typeof value))
    .map(([name, value]) => [name, String(value)]);
  if (texts.length > 0) {
    request.filters = Object.fromEntries(texts);
  }
  if (spread === true) {
    request.spread = true;
  }
  return request;
}

/** The request that a choice makes. */
export function requestFromChoice(choice: IFormChoice): IGPURequest {
  const request: IGPURequest = { num_gpus: choice.numGpus, ...choice.memory };
  const filters = { ...choice.filters, ...(choice.model ? { name: choice.model } : {}) };
  if (Object.keys(filters).length > 0) {
    request.filters = filters;
  }
  if (choice.spread) {
    request.spread = true;
  }
  return request;
}

/** Filters as a user writes them: `server=gpu-1, emulated=false`. The pool refuses those that it does not know. */
export function filtersFromText(text: string): Record<string, string> {
  return Object.fromEntries(
    text
      .split(',')
      .filter(part => part.trim())
      .map(part => {
        const [name = '', ...value] = part.split('=');
        return [name.trim(), value.join('=').trim()];
      })
  );
}

/** Filters as text; the inverse of {@link filtersFromText}. */
export function filtersAsText(filters: Readonly<Record<string, string>>): string {
  return Object.entries(filters)
    .map(([name, value]) => `${name}=${value}`)
    .join(', ');
}

/** A request's filters without the model, which the form shows itself. */
export function otherFilters(request: IGPURequest | null): Record<string, string> {
  return Object.fromEntries(
    Object.entries(request?.filters ?? {}).filter(([name]) => name !== 'name')
  );
}

/** The metadata with a request in it; fields that no request has (`require`, or a later version's) stay. */
export function metadataWith(metadata: unknown, request: IGPURequest): Record<string, unknown> {
  const others = Object.entries(isRecord(metadata) ? metadata : {}).filter(
    ([name]) => !(REPLACED as readonly string[]).includes(name)
  );
  return { ...Object.fromEntries(others), ...request };
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
