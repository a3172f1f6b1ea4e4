/** What the user holds, whoever asked for it: notebooks, programs, the command line. */

import { Button } from '@jupyterlab/ui-components';
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IViewProps } from './context';
import { age, exactly, share, size } from './format';
import { IUse, split, uses } from './state';
import { ILease } from './wire';
import { IRow, Windowed } from './windowed';

const HEIGHT = 92;

export function Leases({ state, pool, trans }: IViewProps): JSX.Element {
  const { leases, gpus } = state;
  const { held } = React.useMemo(() => split(leases), [leases]);
  const used = React.useMemo(() => uses(gpus), [gpus]);
  const rows = held.map((lease): IRow => ({
    key: lease.id,
    height: HEIGHT,
    render: () => (
      <Lease
        lease={lease}
        use={used.get(lease.id)}
        now={state.at}
        trans={trans}
        onRelease={() => void pool.api.release(lease.id)}
      />
    )
  }));
  return (
    <section aria-label={trans.__('My leases')}>
      <h3>{trans.__('My leases')}</h3>
      {held.length === 0 ? (
        <p className="jp-GPUPool-note">{trans.__('You hold no GPU.')}</p>
      ) : (
        <Windowed rows={rows} scroller=".jp-GPUPool" label={trans.__('My leases')} />
      )}
    </section>
  );
}

interface ILeaseProps {
  lease: ILease;
  use: IUse | undefined;
  now: number;
  trans: TranslationBundle;
  onRelease: () => void;
}

function Lease({ lease, use, now, trans, onRelease }: ILeaseProps): JSX.Element {
  const granted = lease.slices.reduce((sum, piece) => sum + piece.memory_mib, 0);
  return (
    <article aria-label={lease.request.label || lease.id}>
      <div className="jp-GPUPool-name">
        <span className="jp-GPUPool-model" title={lease.id}>
          {lease.request.label || lease.id.slice(0, 8)}
        </span>
      </div>
      <div className="jp-GPUPool-figures">
        <span>{where(lease, trans)}</span>
      </div>
      <div className="jp-GPUPool-figures">
        <span>
          {trans.__('%1 of %2 used', size(use?.used_mib ?? 0, trans), size(granted, trans))}
        </span>
        <span>{trans.__('%1 busy', share(use?.busy ?? 0))}</span>
        <span>{age(now - (lease.granted_at ?? lease.created_at), trans)}</span>
      </div>
      <Button className="jp-mod-styled" small onClick={onRelease}>
        {trans.__('Release')}
      </Button>
    </article>
  );
}

/** `GPU 0: 26,008 MiB · GPU 1: 26,008 MiB` */
export function where(lease: ILease, trans: TranslationBundle): string {
  return lease.slices
    .map(piece => trans.__('GPU %1: %2', piece.index, exactly(piece.memory_mib, trans)))
    .join(' · ');
}
