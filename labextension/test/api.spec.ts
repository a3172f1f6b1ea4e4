import { PoolAPI } from '../src/pool/api';
import { IGPURequest } from '../src/pool/apitypes';
import { WANTED_GPUS } from '../src/pool/openapi';

/** The query by which the panel asks what a request would come to. */
async function asked(wish: IGPURequest): Promise<string[][]> {
  let path = '';
  const api = new PoolAPI({
    fetch: (called: string) => {
      path = called;
      return Promise.resolve(new Response('{}'));
    },
    base: 'https://pool/gpupool/api/v1/',
    socket: () => {
      throw new Error('no socket is needed');
    }
  });
  await api.forecast(wish);
  return [...new URLSearchParams(path.split('?')[1])];
}

describe('a forecast', () => {
  const all: Required<IGPURequest> = {
    num_gpus: 3,
    partial: 0.5,
    memory_mib: 24000,
    filters: { name: 'V100', server: 'gpu-1' },
    spread: true,
    never_park: true
  };

  it('is asked for every field of a request', async () => {
    expect(Object.keys(all).sort()).toEqual(Object.keys(WANTED_GPUS).sort());
    expect(await asked(all)).toEqual([
      ['num_gpus', '3'],
      ['partial', '0.5'],
      ['memory_mib', '24000'],
      ['filter', 'name=V100'],
      ['filter', 'server=gpu-1'],
      ['spread', '1'],
      ['never_park', '1']
    ]);
  });

  it('is for whole GPUs where the request says no size', async () => {
    expect(await asked({ num_gpus: 1 })).toEqual([
      ['num_gpus', '1'],
      ['partial', '1']
    ]);
  });
});
