/** Whether new leases are placed on a server. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IServer } from '../pool/apitypes';
import { AdminAPI } from './adminapi';
import { Form } from './dialog';

interface IDrain {
  adminAPI: AdminAPI;
  server: IServer;
  /** The number of slices on it. */
  slices: number;
  trans: TranslationBundle;
  onClose: () => void;
}

export function Drain({ adminAPI, server, slices, trans, onClose }: IDrain): JSX.Element {
  const { name, draining } = server;
  return (
    <Form
      title={draining ? trans.__('Use %1 again?', name) : trans.__('Drain %1?', name)}
      accept={draining ? trans.__('Use again') : trans.__('Drain')}
      cancel={trans.__('Cancel')}
      action={() => adminAPI.drain(name, !draining)}
      onClose={onClose}
    >
      <p>
        {draining
          ? trans.__('The pool places new leases on it again, queued requests first.')
          : trans.__(
              'The pool places no new leases on it until you select “Use again”, even after a restart.'
            )}
      </p>
      {!draining && (
        <p>
          {slices === 0
            ? trans.__('It holds no GPU slices now.')
            : trans._n(
                'It holds %1 GPU slice, which stays until its holder releases it.',
                'It holds %1 GPU slices, which stay until their holders release them.',
                slices
              )}
        </p>
      )}
    </Form>
  );
}
