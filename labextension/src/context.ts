/** What every view of the panel is given. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IChoices, Preferences } from './preferences';
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

/** What the user prefers, again whenever that changes. */
export function usePreferences(preferences: Preferences): IChoices {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    preferences.changed.connect(again);
    return () => {
      preferences.changed.disconnect(again);
    };
  }, [preferences]);
  return preferences.choices;
}
