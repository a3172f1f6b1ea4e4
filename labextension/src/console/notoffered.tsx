/** The view for what this pool does not offer, or not to this user, and how to get it. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { Commands, Empty } from './parts';

interface INotOffered {
  /** 403: not for this user; 404: the pool does not offer it. */
  status: number;
  /** The pool's message. */
  reason: string;
  what: 'tokens' | 'namespaces' | 'audit';
  trans: TranslationBundle;
}

export function NotOffered({ status, reason, what, trans }: INotOffered): JSX.Element {
  if (status !== 404) {
    return (
      <Empty title={trans.__('This is for administrators of the pool.')}>
        <p>{reason}</p>
        <p>
          {trans.__(
            "Ask whoever gave you your bundle, or start Jupyter with an administrator's: GPUPOOL_CONFIG_DIR=<its folder>."
          )}
        </p>
      </Empty>
    );
  }
  const title = {
    tokens: trans.__('This pool is yours alone: it has no tokens.'),
    namespaces: trans.__('This pool is yours alone: it has no namespaces.'),
    audit: trans.__('This pool is yours alone: it keeps no record of who did what.')
  }[what];
  return (
    <Empty title={title}>
      <p>
        {trans.__(
          'A server for many has them: others are admitted with a token each, within the limits of their namespaces. On the machine with the GPUs:'
        )}
      </p>
      <Commands lines={['gpupool server init', 'gpupool server']} />
      <p>
        {trans.__(
          "Then start Jupyter with the administrator's bundle, which the first command made, and this page administers it:"
        )}
      </p>
      <Commands lines={['GPUPOOL_CONFIG_DIR=~/.gpupool/server/admin jupyter lab']} />
    </Empty>
  );
}
