/** The request that a notebook keeps in its metadata, and how the form's choices change it. Pure. */

import { IGPURequest } from '../pool/apitypes';
import { WANTED_GPUS } from '../pool/openapi';

type Field = keyof IGPURequest;

/** Every field of a request; one that is undefined is not asked for. */
type Choice = { [K in Field]-?: IGPURequest[K] | undefined };

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
  /** The lease keeps its GPUs while it is idle; the form has no field for it and keeps it. */
  neverPark: boolean;
}

/** The request in a notebook's metadata; null where it has none, or one for no GPUs. */
export function requestFromMetadata(metadata: unknown): IGPURequest | null {
  if (!isRecord(metadata) || Object.keys(metadata).length === 0) {
    return null;
  }
  const request: Record<string, unknown> = { num_gpus: WANTED_GPUS.num_gpus.default };
  for (const name of Object.keys(WANTED_GPUS) as Field[]) {
    const value = read(name, metadata[name]);
    if (value !== undefined) {
      request[name] = value;
    }
  }
  const count = metadata['num_gpus'] ?? WANTED_GPUS.num_gpus.default;
  if (!Number.isInteger(count) || (count as number) < WANTED_GPUS.num_gpus.minimum) {
    return null;
  }
  if (request['memory_mib'] !== undefined) {
    delete request['partial'];
  }
  return request as IGPURequest;
}

/** A field's value as a request has it; undefined where it is of another type or says nothing. */
function read(name: Field, value: unknown): unknown {
  switch (WANTED_GPUS[name].type) {
    case 'boolean':
      return value === true ? true : undefined;
    case 'object': {
      const texts = Object.entries(isRecord(value) ? value : {})
        .filter(([, item]) => ['string', 'number', 'boolean'].includes(typeof item))
        .map(([key, item]) => [key, String(item)]);
      return texts.length > 0 ? Object.fromEntries(texts) : undefined;
    }
    default:
      return typeof value === 'number' ? value : undefined;
  }
}

/** The request that a choice makes. */
export function requestFromChoice(choice: IFormChoice): IGPURequest {
  const filters = { ...choice.filters, ...(choice.model ? { name: choice.model } : {}) };
  const { partial, memory_mib } = { partial: undefined, memory_mib: undefined, ...choice.memory };
  // A field that is new in the declaration is missing here, which does not compile.
  const chosen: Choice = {
    num_gpus: choice.numGpus,
    partial,
    memory_mib,
    filters: Object.keys(filters).length > 0 ? filters : undefined,
    spread: choice.spread || undefined,
    never_park: choice.neverPark || undefined
  };
  return Object.fromEntries(
    Object.entries(chosen).filter(([, value]) => value !== undefined)
  ) as unknown as IGPURequest;
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
    ([name]) => !(name in WANTED_GPUS)
  );
  return { ...Object.fromEntries(others), ...request };
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
