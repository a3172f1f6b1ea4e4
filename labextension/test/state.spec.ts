import {
  apply,
  freeOf,
  holdersOf,
  IPoolState,
  mineOf,
  shareOf,
  split,
  totals,
  uses
} from '../src/pool/state';
import { ISlice, Message } from '../src/pool/apitypes';
import { delta, gpu, lease, whole } from './pool';

function play(...messages: Message[]): IPoolState {
  let state: IPoolState | null = null;
  for (const message of messages) {
    state = apply(state, message);
  }
  if (!state) {
    throw new Error('the feed broke off');
  }
  return state;
}

function slice(fields: Partial<ISlice>): ISlice {
  const nobody = { lease: null, owner: null, label: '', busy: 0, used_mib: 0, memory_mib: 0 };
  return { ...nobody, state: 'ACTIVE', ...fields };
}

describe('a feed', () => {
  it('changes the fields of a GPU that it names, and leaves the others the same objects', () => {
    const before = play(whole());
    const after = apply(before, delta(1, { gpus: { a: { busy: 0.5 } } }))!;
    expect(after.gpus.a).toEqual({ ...before.gpus.a, busy: 0.5 });
    expect(after.gpus.b).toBe(before.gpus.b);
    expect(before.gpus.a?.busy).toBe(0);
    expect(after.at).toBe(101);
  });

  it('without changes keeps every part', () => {
    const before = play(whole({ leases: { x: lease({ id: 'x' }) } }));
    const after = apply(before, delta(1))!;
    expect(after.gpus).toBe(before.gpus);
    expect(after.leases).toBe(before.leases);
    expect(after.servers).toBe(before.servers);
  });

  it('adds and takes away GPUs, leases and servers', () => {
    const after = play(
      whole({ leases: { x: lease({ id: 'x' }) } }),
      delta(1, {
        servers: [{ name: 'one', host: 'one', draining: false, gpus: ['a'] }],
        gpus: { b: null },
        leases: { x: null, y: lease({ id: 'y' }) },
        queue: ['y'],
        healthy: false
      })
    );
    expect(Object.keys(after.gpus)).toEqual(['a']);
    expect(Object.keys(after.leases)).toEqual(['y']);
    expect(after.servers[0]?.gpus).toEqual(['a']);
    expect(after.queue).toEqual(['y']);
    expect(after.healthy).toBe(false);
  });

  it('remembers how leases ended, the last ones', () => {
    const messages: Message[] = [whole()];
    for (let seq = 1; seq <= 30; seq++) {
      const id = `lease-${seq}`;
      const over = lease({ id, state: 'LOST', ended_at: 5, reason: 'its worker died' });
      messages.push(delta(seq, { leases: { [id]: over } }));
    }
    const state = play(...messages);
    expect(state.leases).toEqual({});
    expect(state.ended).toHaveLength(20);
    expect(state.ended[0]?.id).toBe('lease-30');
  });

  it('that skipped a message has to start again', () => {
    expect(apply(play(whole()), delta(2))).toBeNull();
    expect(apply(play(whole(), delta(1)), delta(1))).toBeNull();
    expect(apply(null, delta(1))).toBeNull();
  });

  it('goes on where it was, and only there', () => {
    const state = play(whole(), delta(1));
    const resumed = { type: 'resumed' as const, at: 1 };
    expect(apply(state, { ...resumed, feed: 'f', seq: 1 })).toBe(state);
    expect(apply(state, { ...resumed, feed: 'f', seq: 0 })).toBeNull();
    expect(apply(state, { ...resumed, feed: 'another', seq: 1 })).toBeNull();
  });

  it('may say what this version does not know', () => {
    const state = play(whole());
    expect(apply(state, { type: 'weather' } as unknown as Message)).toBe(state);
  });
});

describe('the figures', () => {
  it('count GPUs as free, partly and fully used, and unhealthy ones apart', () => {
    const sum = totals(
      play(
        whole({
          gpus: {
            a: gpu({ granted_mib: 0, busy: 0 }),
            b: gpu({ granted_mib: 32510, busy: 1 }),
            c: gpu({ granted_mib: 30000, busy: 0.5 }),
            d: gpu({ healthy: false, emulated: true, busy: 0.1 })
          },
          queue: [null, 'x']
        })
      )
    );
    expect(sum).toMatchObject({ gpus: 4, free: 1, full: 1, partly: 1, unhealthy: 1, emulated: 1 });
    expect(sum.free_mib).toBe(32510 + 2510);
    expect(sum.largest_mib).toBe(32510);
    expect(sum.waiting).toBe(2);
    expect(sum.busy).toBeCloseTo(0.4);
  });

  it('are zero of a pool without GPUs, and of a GPU that reports no memory', () => {
    expect(totals(play(whole({ servers: [], gpus: {} })))).toMatchObject({ gpus: 0, busy: 0 });
    expect(freeOf(gpu({ memory_mib: 0, granted_mib: 10 }))).toBe(0);
    const untold = totals(play(whole({ gpus: { a: gpu({ memory_mib: 0 }), b: gpu() } })));
    expect(untold).toMatchObject({ gpus: 2, free: 1, partly: 0, full: 0 });
  });

  it('tell the use of leases that may be seen', () => {
    const state = play(
      whole({
        gpus: {
          a: gpu({ slices: [slice({ lease: 'x', memory_mib: 100, used_mib: 10, busy: 1 })] }),
          b: gpu({
            slices: [
              slice({ lease: 'x', memory_mib: 200, used_mib: 30, busy: 0 }),
              slice({ lease: null, memory_mib: 5 })
            ]
          })
        }
      })
    );
    expect([...uses(state.gpus).keys()]).toEqual(['x']);
    expect(uses(state.gpus).get('x')).toMatchObject({ granted_mib: 300, used_mib: 40, busy: 0.5 });
  });

  it('reckon a share as the pool does', () => {
    expect(shareOf(32510, 0.8)).toBe(26008);
    expect(shareOf(100, 0.29)).toBe(29);
    expect(shareOf(32510, 1)).toBe(32510);
  });
});

it('leases that hold and leases that wait, in order of arrival', () => {
  const state = play(
    whole({
      leases: {
        c: lease({ id: 'c', created_at: 3, state: 'QUEUED' }),
        b: lease({ id: 'b', created_at: 2 }),
        a: lease({ id: 'a', created_at: 1, state: 'GRANTED' })
      }
    })
  );
  const { held, waiting } = split(Object.values(state.leases));
  expect(held.map(l => l.id)).toEqual(['a', 'b']);
  expect(waiting.map(l => l.id)).toEqual(['c']);
});

it('others whose names may be known are told by name, each lease once', () => {
  const slice = (fields: object) => ({
    lease: '1',
    owner: 'ada',
    label: 'train',
    memory_mib: 10,
    used_mib: 0,
    busy: 0,
    state: 'ACTIVE' as const,
    ...fields
  });
  const gpus = {
    a: gpu({
      slices: [slice({}), slice({ lease: '2', owner: 'bob' }), slice({ lease: null, owner: null })]
    }),
    b: gpu({ uuid: 'b', index: 1, slices: [slice({ lease: '2', owner: 'bob' })] })
  };
  expect(holdersOf(gpus, 'ada')).toEqual([
    { lease: '2', owner: 'bob', label: 'train', where: new Map([['one', [0, 1]]]), memory_mib: 20 }
  ]);
  expect(holdersOf(gpus, null)).toEqual([]);
});

it('leases of others that one administers are not one’s own', () => {
  const leases = { x: lease({ id: 'x' }), y: lease({ id: 'y' }) };
  leases.y.request.owner = 'bob';
  expect(mineOf(leases, 'ada')).toEqual([leases.x]);
  expect(mineOf(leases, null)).toHaveLength(2);
});
