/** The columns of a chart: read from the history, then measured from what the feed tells. */

import * as React from 'react';

import { extend, ISeries } from '../series';
import { IPoolState } from '../state';
import { IGPUPool } from '../tokens';
import { ILease } from '../wire';
import { Range, RANGES, sampleOf, seriesOf } from './columns';

/** A series, and which choice it is of. */
interface ILoaded {
  key: string;
  series: ISeries;
}

export interface ICharted {
  /** Null while it is being read. */
  series: ISeries | null;
  /** Why the history cannot be read; empty if it can. */
  trouble: string;
  /** Read it again. */
  again: () => void;
}

export function useSeries(
  pool: IGPUPool,
  state: IPoolState,
  range: Range,
  gpu: string | null
): ICharted {
  const { span, step } = RANGES[range];
  const isLive = pool.connection.status === 'live';
  const [tries, again] = React.useReducer((count: number) => count + 1, 0);
  const [loaded, setLoaded] = React.useState<ILoaded | null>(null);
  const [trouble, setTrouble] = React.useState('');
  const key = `${range} ${gpu ?? ''}`;

  // After a lost connection too: what was missed is in the history.
  React.useEffect(() => {
    if (!isLive) {
      return;
    }
    let over = false;
    void pool.api.history(Date.now() / 1000 - span, step, gpu === null ? [] : [gpu]).then(
      history => {
        if (!over) {
          setTrouble('');
          setLoaded({ key, series: seriesOf(history, gpu) });
        }
      },
      (reason: Error) => {
        if (!over) {
          setTrouble(reason.message);
        }
      }
    );
    return () => {
      over = true;
    };
  }, [pool, isLive, span, step, gpu, key, tries]);

  React.useEffect(() => {
    const sample = isLive ? sampleOf(state, gpu) : null;
    if (sample) {
      // eslint-disable-next-line react-hooks/set-state-in-effect -- each message of the feed is one sample more
      setLoaded(before =>
        before?.key === key ? { key, series: extend(before.series, sample, span) } : before
      );
    }
    // Only what the feed tells is a sample; another choice is not.
    // eslint-disable-next-line react-hooks/exhaustive-deps
  }, [state.seq, state.feed]);

  return { series: loaded?.key === key ? loaded.series : null, trouble, again };
}

/** Leases that have ended, read once for who points at the chart; those that live are in the state. */
export function usePast(pool: IGPUPool, wanted: boolean): readonly ILease[] {
  const [past, setPast] = React.useState<readonly ILease[]>([]);
  React.useEffect(() => {
    if (wanted) {
      pool.api.pastLeases().then(setPast, () => {
        // Who held what is then not told; the figures are.
      });
    }
  }, [pool, wanted]);
  return past;
}
