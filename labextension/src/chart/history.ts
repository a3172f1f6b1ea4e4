/** The columns of a chart: read from the history, then extended by the feed. */

import * as React from 'react';

import { extend, ISeries } from './series';
import { IPoolState } from '../pool/state';
import { IGPUPool } from '../tokens';
import { ILease } from '../pool/apitypes';
import { Range, RANGES, sampleOf, seriesOf } from './data';

/** A series, and the key of the choice that it belongs to. */
interface ILoaded {
  key: string;
  series: ISeries;
}

export interface ICharted {
  /** Null while the history is loading. */
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

  // Also after a lost connection: the history contains what was missed.
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
      // eslint-disable-next-line react-hooks/set-state-in-effect -- each message of the feed adds one sample
      setLoaded(before =>
        before?.key === key ? { key, series: extend(before.series, sample, span) } : before
      );
    }
    // Only a message of the feed is a sample; a change of the choice is not.
    // eslint-disable-next-line react-hooks/exhaustive-deps
  }, [state.seq, state.feed]);

  return { series: loaded?.key === key ? loaded.series : null, trouble, again };
}

/** The leases that have ended, loaded once the user points at the chart; live leases are in the state. */
export function usePast(pool: IGPUPool, wanted: boolean): readonly ILease[] {
  const [past, setPast] = React.useState<readonly ILease[]>([]);
  React.useEffect(() => {
    if (wanted) {
      pool.api.pastLeases().then(setPast, () => {
        // Without them the chart shows the figures, but not all holders.
      });
    }
  }, [pool, wanted]);
  return past;
}
