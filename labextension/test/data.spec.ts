import {
  drawn,
  holders,
  isolated,
  latest,
  roomAtEdge,
  rows,
  sampleAt,
  sampleOf,
  seriesOf
} from '../src/chart/data';
import { extend, ISeries } from '../src/chart/series';
import { apply, IPoolState } from '../src/pool/state';
import { IHistory } from '../src/pool/apitypes';
import { gpu, lease, whole } from './pool';

const HISTORY: IHistory = {
  since: 100,
  until: 118,
  step: 5,
  times: [100, 105, 110, 115],
  memory_mib: [200, null, 200, 200],
  granted_mib: [0, null, 100, 150],
  used_mib: [0, null, 50, 50],
  busy: [0, null, 1, 0.5],
  gpus: {
    a: {
      memory_mib: [null, null, 100, 100],
      granted_mib: [null, null, 100, 100],
      used_mib: [null, null, 50, 50],
      busy: [null, null, 1, 1]
    }
  }
};

const piece = {
  gpu_uuid: 'a',
  server: 'one',
  index: 0,
  name: 'V100',
  memory_mib: 100,
  total_mib: 100,
  emulated: false
};

function state(fields = {}): IPoolState {
  return apply(null, whole(fields)) as IPoolState;
}

it('what is drawn is percent of the capacity, and gaps stay gaps', () => {
  expect(drawn(seriesOf(HISTORY, null))).toEqual([
    [100, 105, 110, 115],
    [0, null, 50, 75],
    [0, null, 25, 25],
    [0, null, 100, 50]
  ]);
});

it('GPUs that tell no memory are drawn by what computes alone', () => {
  const series = seriesOf({ ...HISTORY, memory_mib: [0, null, 0, 0] }, null);
  const [, granted, used, busy] = drawn(series);
  expect(granted).toEqual([null, null, null, null]);
  expect(used).toEqual([null, null, null, null]);
  expect(busy).toEqual([0, null, 100, 50]);
});

it('one GPU has its own columns; one that nobody knew has only gaps', () => {
  expect(drawn(seriesOf(HISTORY, 'a'))[1]).toEqual([null, null, 100, 100]);
  expect(drawn(seriesOf(HISTORY, 'b'))[1]).toEqual([null, null, null, null]);
  expect(latest(seriesOf(HISTORY, 'b'))).toBe(-1);
  expect(latest(seriesOf(HISTORY, 'a'))).toBe(3);
});

it('the history goes on with what the feed tells', () => {
  const now = state({ at: 121, gpus: { a: gpu({ memory_mib: 200, granted_mib: 20, busy: 1 }) } });
  const sample = sampleOf(now, null);
  expect(sample).toEqual({ at: 121, memory_mib: 200, granted_mib: 20, used_mib: 0, busy: 1 });
  const series = extend(seriesOf(HISTORY, null), sample!, 300);
  expect(series.times).toEqual([100, 105, 110, 115, 120]);
  expect(series.granted_mib[4]).toBe(20);
  // Within the last slot it counts as one second of those that the slot has lasted.
  const same = extend(seriesOf(HISTORY, null), { ...sample!, at: 119 }, 300);
  expect(same.granted_mib[3]).toBeCloseTo((3 * 150 + 20) / 4);
});

it('a pool without GPUs has nothing to measure', () => {
  expect(sampleOf(state({ gpus: {}, servers: [] }), null)).toBeNull();
  expect(sampleOf(state(), 'gone')).toBeNull();
});

it('points that no line shows are found', () => {
  expect(isolated([1, null, 2, 3, null, 4])).toEqual([0, 5]);
  expect(isolated([null, 7, null])).toEqual([1]);
  expect(isolated([])).toEqual([]);
});

describe('who held what', () => {
  const series: ISeries = seriesOf(HISTORY, null);
  const ada = lease({ id: '1', granted_at: 60, slices: [piece] });

  it('is told by the leases, and the rest is not', () => {
    expect(holders(series, 2, [ada], null)).toEqual({
      held: [{ lease: ada, mib: 100 }],
      untold: 0
    });
    const { held, untold } = holders(series, 2, [], null);
    expect(held).toEqual([]);
    expect(untold).toBe(100);
  });

  it('is the mean of a slot in which a lease began or ended, and no rest is made up', () => {
    const late = lease({ id: '1', granted_at: 112, ended_at: 114, slices: [piece] });
    expect(holders(series, 2, [late], null)).toEqual({
      held: [{ lease: late, mib: 40 }],
      untold: 0
    });
    expect(holders(series, 0, [late], null).held).toEqual([]);
  });

  it('the slot that is not over is as long as it has lasted', () => {
    expect(holders(series, 3, [ada], null).untold).toBe(50);
  });

  it('is told by GPU', () => {
    expect(holders(seriesOf(HISTORY, 'a'), 2, [ada], 'a').held).toHaveLength(1);
    expect(holders(series, 2, [ada], 'b').held).toHaveLength(0);
  });
});

it('a table has the newest first, without what nobody measured, and no more rows than asked for', () => {
  const series = seriesOf(HISTORY, null);
  expect(rows(series, 10)).toEqual([3, 2, 0]);
  expect(rows(series, 2)).toEqual([3, 0]);
});

it('the legend has the mean of a slot, and what is so now where none is pointed at', () => {
  const series = seriesOf(HISTORY, null);
  expect(sampleAt(series, 3)).toEqual({
    at: 115,
    memory_mib: 200,
    granted_mib: 150,
    used_mib: 50,
    busy: 0.5
  });
  expect(sampleAt(series, 1)).toBeNull();
  expect(sampleAt(series, 4)).toBeNull();
});

it('half of the widest time fits beside the drawing', () => {
  const width = (label: string) => 6 * label.length;
  expect(roomAtEdge(['06:05 PM', '7:05'], width)).toBeGreaterThan(width('06:05 PM') / 2);
  expect(roomAtEdge(['7'], width)).toBe(10);
});
