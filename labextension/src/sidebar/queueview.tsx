/** Who waits, and the user's own place. */

import { Notification } from '@jupyterlab/apputils';
import { Button } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { age, exactly, share } from '../common/format';
import { mineOf, split } from '../pool/state';
import { ILease } from '../pool/apitypes';

export function QueueView({ state, slices, trans }: IViewProps): JSX.Element | null {
  const { actions } = slices;
  const { me } = slices.myLeases;
  const { held, waiting } = React.useMemo(
    () => split(mineOf(state.leases, me)),
    [state.leases, me]
  );
  const waking = held.filter(lease => lease.position !== null);
  const others = state.queue.length - waiting.length - waking.length;
  if (state.queue.length === 0) {
    return null;
  }
  const leave = async (lease: ILease) => {
    const trouble = await actions.leave(lease);
    if (trouble) {
      Notification.error(trans.__('Cannot leave the queue: %1', trouble));
    }
  };
  return (
    <section aria-label={trans.__('Queue')}>
      <h3>{trans.__('Queue')}</h3>
      <ul className="jp-GPUPool-list">
        {waiting.map(lease => (
          <li key={lease.id}>
            <div className="jp-GPUPool-name">
              <span className="jp-GPUPool-model" title={lease.id}>
                {actions.nameOf(lease)}
              </span>
              <span className="jp-GPUPool-badge">
                {trans.__('position %1 of %2', lease.position ?? '…', state.queue.length)}
              </span>
            </div>
            <div className="jp-GPUPool-figures">
              <span>
                {trans.__(
                  '%1 × %2',
                  lease.request.num_gpus,
                  lease.request.partial === null
                    ? exactly(lease.request.memory_mib ?? 0, trans)
                    : share(lease.request.partial)
                )}
              </span>
              <span>{trans.__('for %1', age(state.at - lease.created_at, trans))}</span>
            </div>
            <Button
              className="jp-mod-styled"
              small
              aria-label={trans.__('Leave the queue: %1', actions.nameOf(lease))}
              onClick={() => void leave(lease)}
            >
              {trans.__('Leave the queue')}
            </Button>
          </li>
        ))}
      </ul>
      {others > 0 && (
        <p className="jp-GPUPool-note">
          {trans._n(
            '%1 request of another user is queued.',
            '%1 requests of other users are queued.',
            others
          )}
        </p>
      )}
    </section>
  );
}
