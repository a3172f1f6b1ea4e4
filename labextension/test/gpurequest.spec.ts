import { IGPURequest } from '../src/pool/apitypes';
import {
  filtersAsText,
  filtersFromText,
  metadataWith,
  otherFilters,
  requestFromChoice,
  requestFromMetadata
} from '../src/leases/gpurequest';

const FILTERS = { name: 'V100', server: 'gpu-1' };
const KEPT: IGPURequest = {
  num_gpus: 3,
  memory_mib: 24000,
  filters: FILTERS,
  spread: true,
  never_park: true
};
const UNTOUCHED = {
  numGpus: 3,
  memory: { memory_mib: 24000 },
  model: 'V100',
  filters: { server: 'gpu-1' },
  spread: true,
  neverPark: true
};

describe('the request in the metadata of a notebook', () => {
  it('has every field that a kernel understands', () => {
    expect(requestFromMetadata({ ...KEPT, require: true })).toEqual(KEPT);
    expect(requestFromMetadata({ num_gpus: 2, partial: 0.8 })).toEqual({
      num_gpus: 2,
      partial: 0.8
    });
  });

  it('has filters of numbers and of yes or no as texts', () => {
    const filters = { index: 0, emulated: true };
    expect(requestFromMetadata({ filters })?.filters).toEqual({ index: '0', emulated: 'true' });
  });

  it('is for one GPU unless it says otherwise', () => {
    expect(requestFromMetadata({ partial: 0.5, spread: false })).toEqual({
      num_gpus: 1,
      partial: 0.5
    });
  });

  it.each([undefined, null, 'two', [2], {}, { num_gpus: 0 }, { num_gpus: 1.5 }])(
    'is none in %j',
    metadata => {
      expect(requestFromMetadata(metadata)).toBeNull();
    }
  );
});

describe('a form that was opened for a notebook', () => {
  it('keeps what the user does not touch', () => {
    expect(requestFromChoice(UNTOUCHED)).toEqual(KEPT);
  });

  it('replaces the memory in MiB by a fraction, and keeps the rest', () => {
    const { memory_mib: _, ...others } = KEPT;
    expect(requestFromChoice({ ...UNTOUCHED, memory: { partial: 0.25 } })).toEqual({
      ...others,
      partial: 0.25
    });
  });

  it('has the model in a field of its own, and all other filters as text', () => {
    const { filters } = requestFromChoice({ ...UNTOUCHED, model: 'A100' });
    expect(filters).toEqual({ name: 'A100', server: 'gpu-1' });
    expect(requestFromChoice({ ...UNTOUCHED, model: '' }).filters).toEqual({ server: 'gpu-1' });
    expect(otherFilters(KEPT)).toEqual({ server: 'gpu-1' });
  });

  it('requests GPUs of several servers only if that is ticked', () => {
    expect(requestFromChoice({ ...UNTOUCHED, spread: false })).not.toHaveProperty('spread');
  });
});

it('filters are written as text and read from it', () => {
  const filters = { server: 'gpu-1', emulated: 'false' };
  expect(filtersFromText(' server = gpu-1,emulated=false, ')).toEqual(filters);
  expect(filtersFromText(filtersAsText(filters))).toEqual(filters);
  expect(filtersFromText('')).toEqual({});
  expect(filtersFromText('server')).toEqual({ server: '' });
});

it('metadata keeps the fields that are none of a request, and loses those that were replaced', () => {
  const metadata = { ...KEPT, require: true, later: 'unknown' };
  expect(metadataWith(metadata, { num_gpus: 1, partial: 0.5 })).toEqual({
    num_gpus: 1,
    partial: 0.5,
    require: true,
    later: 'unknown'
  });
  expect(metadataWith(undefined, KEPT)).toEqual(KEPT);
});
