/** Whether new leases are placed on a server. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IServer } from '../wire';
import { Administration } from './administration';
import { Form } from './dialog';

interface IDrain {
  administration: Administration;
  server: IServer;
  /** How many slices are on it. */
  slices: number;
  trans: TranslationBundle;
  onClose: () => void;
}

export function Drain({ administration, server, slices, trans, onClose }: IDrain): JSX.Element {
  const { name, draining } = server;
  return (
    <Form
      title={draining ? trans.__('Use %1 again?', name) : trans.__('Drain %1?', name)}
      accept={draining ? trans.__('Use again') : trans.__('Drain')}
      cancel={trans.__('Cancel')}
      action={() => administration.drain(name, !draining)}
      onClose={onClose}
    >
      <p>
        {draining
          ? trans.__('New leases are placed on it again, those that wait first.')
          : trans.__(
              'No new lease is placed on it, also after a restart, until you say otherwise.'
            )}
      </p>
      {!draining && (
        <p>
          {slices === 0
            ? trans.__('Nothing is on it now.')
            : trans._n(
                '%1 slice is on it; it stays until its holder gives it back.',
                '%1 slices are on it; they stay until their holders give them back.',
                slices
              )}
        </p>
      )}
    </Form>
  );
}
