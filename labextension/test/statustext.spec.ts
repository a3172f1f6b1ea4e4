import { part, size, write } from '../src/common/format';
import { isDue, patience, stretch, weight } from '../src/leases/idle';
import { IUse } from '../src/pool/state';
import { concerning, shares, statusText } from '../src/leases/statustext';
import { ILease, IPiece } from '../src/pool/apitypes';
import { english as trans } from './english';
import { lease } from './pool';

function piece(memory_mib: number, total_mib = 32510): IPiece {
  return {
    gpu_uuid: 'a',
    server: 'one',
    index: 0,
    name: '',
    memory_mib,
    total_mib,
    emulated: false
  };
}

const two = lease({ id: 'two', slices: [piece(26008), piece(26008)] });
const half = lease({ id: 'half', slices: [piece(16255)] });
const none = { held: [], waiting: [], queue: 0, use: () => undefined };
const use = (): IUse => ({ used_mib: 12698, granted_mib: 52016, busy: 0 });

afterEach(() => write('auto'));

it('sizes are written in the unit that is wanted', () => {
  expect(size(780, trans)).toBe('780 MiB');
  expect(size(26008, trans)).toBe('25.4 GiB');
  expect(part(12698, 52016, trans)).toBe('12.4 of 50.8 GiB');
  write('MiB');
  expect(size(26008, trans)).toBe('26,008 MiB');
  expect(part(12698, 52016, trans)).toBe('12,698 of 52,016 MiB');
  write('GiB');
  expect(size(512, trans)).toBe('0.5 GiB');
});

describe('the status bar', () => {
  it('says what is held, and how much of it is used', () => {
    expect(statusText({ ...none, held: [two], use }, trans)).toBe('GPU 2 × 0.8 · 12.4 of 50.8 GiB');
  });

  it('sums what several leases hold', () => {
    const text = statusText({ ...none, held: [two, half], use }, trans);
    expect(text).toBe('GPU 2 × 0.8 + 1 × 0.5 · 24.8 of 66.7 GiB');
    const tenth = lease({ id: 'tenth', slices: [piece(3251)] });
    expect(shares([two, half, tenth], trans)).toBe('4 slices');
  });

  it('says the place of what waits, and that nothing is held', () => {
    const waits = lease({ id: 'w', state: 'QUEUED', position: 1 });
    expect(statusText({ ...none, waiting: [waits], queue: 3 }, trans)).toBe('GPU: position 1 of 3');
    expect(statusText(none, trans)).toBe('GPU: none held');
  });

  it('says that what is parked wakes by itself, and its place while it waits', () => {
    const parked = { memory_mib: 1, since: 1, wanted_since: null };
    const asleep = lease({ state: 'PARKED', slices: [piece(26008)], parked, position: null });
    expect(statusText({ ...none, held: [asleep] }, trans)).toBe('GPU: asleep, wakes by itself');
    expect(statusText({ ...none, held: [asleep, half], use }, trans)).toBe(
      'GPU 1 × 0.5 · 12.4 of 15.9 GiB'
    );
    const waking = { ...asleep, position: 2 };
    expect(statusText({ ...none, held: [waking, half], queue: 3 }, trans)).toBe(
      'GPU: waking, position 2 of 3'
    );
  });

  it('prefers what concerns the notebook in front', () => {
    const all = { ...none, held: [two, half], use };
    const of = (id: string) => (one: ILease) => one.id === id;
    expect(concerning(all, of('half')).held).toEqual([half]);
    expect(concerning(all, of('another')).held).toEqual([two, half]);
  });

  it('a GPU that tells no memory is a whole one', () => {
    expect(shares([lease({ slices: [piece(0, 0)] })], trans)).toBe('1 × 1');
  });
});

describe('idling', () => {
  const since = (seconds: number | null, one = two) => ({ ...one, idle_since: seconds });

  it('is warned of sooner the more is held', () => {
    const whole = lease({ slices: [piece(32510)] });
    expect(patience(whole, 30)).toBe(1800);
    expect(patience(half, 30)).toBe(3600);
    expect(patience(lease({ slices: [piece(1)] }), 30)).toBe(3600);
    expect(patience(two, 30)).toBe(1125);
    expect(weight(two)).toBeCloseTo(1.6);
    expect(patience(lease({ slices: Array(16).fill(piece(32510)) }), 30)).toBe(450);
  });

  it('is due after that time, and not before', () => {
    expect(isDue(since(1000), 30, 1000 + 1124)).toBe(false);
    expect(isDue(since(1000), 30, 1000 + 1125)).toBe(true);
  });

  it('is never due for what computes, for what does not run yet, and for who wants no warning', () => {
    expect(isDue(since(null), 30, 1e9)).toBe(false);
    expect(isDue(two, 30, 1e9)).toBe(false);
    expect(isDue({ ...since(0), state: 'GRANTED' }, 30, 1e9)).toBe(false);
    expect(isDue(since(0), 0, 1e9)).toBe(false);
  });

  it('each stretch is another', () => {
    expect(stretch(since(1000))).not.toBe(stretch(since(2000)));
    expect(stretch(since(1000))).toBe(stretch({ ...since(1000), asked_back: [] }));
  });
});
