/** What every view of the Console is given. */

import { TranslationBundle } from '@jupyterlab/translation';

import { IPoolState } from '../state';
import { IGPUPool } from '../tokens';
import { Administration, IWho } from './administration';

export interface IConsoleContext {
  pool: IGPUPool;
  trans: TranslationBundle;
}

export interface IConsoleProps extends IConsoleContext {
  administration: Administration;
  state: IPoolState;
  /** Null where the pool does not say. */
  who: IWho | null;
}
