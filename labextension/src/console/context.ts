/** The properties of every view of the Console. */

import { TranslationBundle } from '@jupyterlab/translation';

import { IPoolState } from '../pool/state';
import { IGPUPool } from '../tokens';
import { IWhoAmI } from '../pool/apitypes';
import { AdminAPI } from './adminapi';

export interface IConsoleContext {
  pool: IGPUPool;
  trans: TranslationBundle;
  /** Ends this sign-in, or all of the user's; undefined where there is none to end. */
  signOut?: ((everywhere: boolean) => Promise<void>) | undefined;
}

export interface IConsoleProps extends IConsoleContext {
  adminAPI: AdminAPI;
  state: IPoolState;
  /** Null if the pool does not report it. */
  who: IWhoAmI | null;
}
