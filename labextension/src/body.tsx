/** What the panel shows, in its order, and how the connection is. */

import { Button } from '@jupyterlab/ui-components';
import * as React from 'react';

import { Chart } from './chart/chart';
import { IViewContext, usePool, usePreferences } from './context';
import { GPUs } from './gpus';
import { Holders } from './holders';
import { Leases } from './leases';
import { Picker } from './picker';
import { Queue } from './queue';
import { Tiles } from './tiles';

export default function Body(context: IViewContext): JSX.Element {
  const { pool, slices, trans } = context;
  const { state, connection } = usePool(pool);
  const { chartRange } = usePreferences(slices.preferences);
  const lost = connection.status === 'lost';
  if (!state) {
    return lost ? (
      <div className="jp-GPUPool-error" role="alert">
        <p>
          {trans.__('The pool does not answer: %1', connection.reason || trans.__('no connection'))}
        </p>
        <p>{trans.__('It is tried again by itself.')}</p>
        <Button className="jp-mod-styled" onClick={() => pool.retry()}>
          {trans.__('Try now')}
        </Button>
      </div>
    ) : (
      <p className="jp-GPUPool-note">{trans.__('Reading the pool…')}</p>
    );
  }
  const props = { ...context, state };
  return (
    <>
      <div role="status" className="jp-GPUPool-connection">
        {lost && (
          <p>
            {connection.reason
              ? trans.__('Connection lost: %1. What is shown is old.', connection.reason)
              : trans.__('Connection lost. What is shown is old.')}{' '}
            <Button className="jp-mod-styled" small onClick={() => pool.retry()}>
              {trans.__('Try now')}
            </Button>
          </p>
        )}
      </div>
      <div className={lost ? 'jp-GPUPool-body jp-mod-old' : 'jp-GPUPool-body'}>
        {Object.keys(state.gpus).length === 0 ? (
          <p className="jp-GPUPool-note">
            {trans.__(
              'The pool has no GPU. Start Jupyter on a machine with GPUs, or to try it on emulated ones, with'
            )}{' '}
            <code className="jp-GPUPool-option">--LocalEngine.emulate=always</code>
          </p>
        ) : (
          <>
            <Chart
              {...props}
              range={chartRange}
              onRange={range => void slices.preferences.prefer('chartRange', range)}
            />
            <Tiles {...props} />
          </>
        )}
        <Picker {...props} />
        {state.servers.length > 0 && <GPUs {...props} />}
        <Leases {...props} />
        <Queue {...props} />
        <Holders {...props} />
      </div>
    </>
  );
}
