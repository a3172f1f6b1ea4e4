/** What every view of the panel is given. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IPoolState } from './state';
import { IGPUPool, ISlices } from './tokens';

/** The parts of a page that a view needs beside the state. */
export interface IViewContext {
  pool: IGPUPool;
  slices: ISlices;
  trans: TranslationBundle;
}

/** What a view is given. `state` is as last told; whether it is as of now is for the panel to say. */
export interface IViewProps extends IViewContext {
  state: IPoolState;
}

/** The pool's state and connection, again whenever they change. */
export function usePool(pool: IGPUPool): Pick<IGPUPool, 'state' | 'connection'> {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    pool.changed.connect(again);
    again();
    return () => {
      pool.changed.disconnect(again);
    };
  }, [pool]);
  return { state: pool.state, connection: pool.connection };
}
