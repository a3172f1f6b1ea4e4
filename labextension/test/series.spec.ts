import { extend, ISample, ISeries, percent } from '../src/chart/series';

function sample(at: number, busy: number): ISample {
  return { at, busy, memory_mib: 100, granted_mib: 50, used_mib: 10 };
}

const EMPTY: ISeries = {
  step: 5,
  seen: 0,
  times: [],
  memory_mib: [],
  granted_mib: [],
  used_mib: [],
  busy: []
};

it('a slot is the mean of what was measured in it', () => {
  let series = extend(EMPTY, sample(100, 0), 300);
  series = extend(series, sample(101, 1), 300);
  series = extend(series, sample(104.9, 0.5), 300);
  expect(series.times).toEqual([100]);
  expect(series.busy[0]).toBeCloseTo(0.5);
  series = extend(series, sample(105, 1), 300);
  expect(series.times).toEqual([100, 105]);
  expect(series.busy[1]).toBe(1);
});

it('what nobody measured is a gap', () => {
  const series = extend(extend(EMPTY, sample(100, 1), 300), sample(120, 1), 300);
  expect(series.times).toEqual([100, 105, 110, 115, 120]);
  expect(series.busy).toEqual([1, null, null, null, 1]);
});

it('what is too old goes, and a long gap has no more points than can be seen', () => {
  let series = EMPTY;
  for (let at = 0; at < 1000; at += 5) {
    series = extend(series, sample(at, 0), 300);
  }
  expect(series.times[0]).toBeGreaterThanOrEqual(995 - 305);
  expect(series.times).toHaveLength(series.busy.length);
  series = extend(series, sample(1e9, 0), 300);
  expect(series.times.length).toBeLessThan(70);
  expect(series.granted_mib[series.granted_mib.length - 1]).toBe(50);
});

it('a clock that was set back adds nothing', () => {
  const series = extend(EMPTY, sample(100, 0), 300);
  expect(extend(series, sample(50, 1), 300)).toBe(series);
});

it('percent of nothing is not known', () => {
  expect(percent(1, 0)).toBeNull();
  expect(percent(null, 10)).toBeNull();
  expect(percent(5, 10)).toBe(50);
});
