/** What the panel shows, in its order, and how the connection is. */

import { Button } from '@jupyterlab/ui-components';
import * as React from 'react';

import { Chart } from '../chart/chart';
import { IViewContext, usePool, usePreferences, useSections } from '../common/viewcontext';
import type { ISidebarSection, ISidebarSections } from '../tokens';
import { GPUsView } from './gpusview';
import { OtherHoldersView } from './otherholdersview';
import { MyLeasesView } from './myleasesview';
import { RequestForm } from './requestform';
import { QueueView } from './queueview';
import { SummaryTiles } from './summarytiles';

interface IBodyProps extends IViewContext {
  sections: ISidebarSections;
}

/** The built-in sections below the chart; each has its own heading, and some are empty at times. */
const BUILT_IN: readonly Omit<ISidebarSection, 'title'>[] = [
  { id: 'request', rank: 100, render: props => <RequestForm {...props} /> },
  {
    id: 'gpus',
    rank: 200,
    render: props => props.state.servers.length > 0 && <GPUsView {...props} />
  },
  { id: 'leases', rank: 300, render: props => <MyLeasesView {...props} /> },
  { id: 'queue', rank: 400, render: props => <QueueView {...props} /> },
  { id: 'holders', rank: 500, render: props => <OtherHoldersView {...props} /> }
];

export default function Body({ sections, ...context }: IBodyProps): JSX.Element {
  const { pool, slices, trans } = context;
  const added = useSections(sections);
  const { state, connection } = usePool(pool);
  const { chartRange } = usePreferences(slices.preferences);
  const lost = connection.status === 'lost';
  if (!state) {
    return lost ? (
      <div className="jp-GPUPool-error" role="alert">
        <p>
          {trans.__('Cannot reach the pool: %1', connection.reason || trans.__('no connection'))}
        </p>
        <p>{trans.__('Retrying automatically.')}</p>
        <Button className="jp-mod-styled" onClick={() => pool.retry()}>
          {trans.__('Retry now')}
        </Button>
      </div>
    ) : (
      <p className="jp-GPUPool-note">{trans.__('Loading the pool…')}</p>
    );
  }
  const props = { ...context, state };
  return (
    <>
      <div role="status" className="jp-GPUPool-connection">
        {lost && (
          <p>
            {connection.reason
              ? trans.__(
                  'Connection lost: %1. The data below may be out of date.',
                  connection.reason
                )
              : trans.__('Connection lost. The data below may be out of date.')}{' '}
            <Button className="jp-mod-styled" small onClick={() => pool.retry()}>
              {trans.__('Retry now')}
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
            <SummaryTiles {...props} />
          </>
        )}
        {[...BUILT_IN, ...added.map(withHeading)]
          .sort((a, b) => a.rank - b.rank)
          .map(({ id, render }) => (
            <React.Fragment key={id}>{render(props)}</React.Fragment>
          ))}
      </div>
    </>
  );
}

function withHeading({ id, rank, title, render }: ISidebarSection): Omit<ISidebarSection, 'title'> {
  return {
    id: `added ${id}`,
    rank,
    render: props => (
      <section aria-label={title}>
        <h3>{title}</h3>
        {render(props)}
      </section>
    )
  };
}
