/** The dialog that extends a lease whose time is limited. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { age } from '../common/format';
import { ILease } from '../pool/apitypes';
import { AdminAPI } from './adminapi';
import { useRequest } from './hooks';
import { Form } from './dialog';
import { Figure } from './fields';

interface IExtendLease {
  adminAPI: AdminAPI;
  lease: ILease;
  called: string;
  /** The pool's time. */
  at: number;
  trans: TranslationBundle;
  onClose: () => void;
}

export function ExtendLease(props: IExtendLease): JSX.Element {
  const { adminAPI, lease, called, at, trans, onClose } = props;
  const [minutes, setMinutes] = React.useState('60');
  const longest = useRequest(() => adminAPI.longest(lease.request.namespace));
  const left = (lease.expires_at ?? at) - at;
  // Counted from now; the time left is a part of it.
  const most =
    longest.answer === null ? null : Math.max(0, Math.floor((longest.answer - left) / 60));
  return (
    <Form
      title={trans.__('Extend the lease of %1', called)}
      accept={trans.__('Extend')}
      cancel={trans.__('Cancel')}
      action={() => adminAPI.extend(lease.id, 60 * Number(minutes))}
      onClose={onClose}
    >
      <p>{trans.__('%1 has %2 left.', lease.request.owner, age(left, trans))}</p>
      <Figure
        label={trans.__('Minutes more')}
        hint={
          most === null
            ? undefined
            : trans.__('Its namespace, %1, allows %2 now.', lease.request.namespace, most)
        }
        autoFocus
        value={minutes}
        onChange={setMinutes}
      />
    </Form>
  );
}
