/** The pool in figures. */

import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { exactly, size } from '../common/format';
import { totals } from '../pool/state';

export function SummaryTiles({ state, trans }: Pick<IViewProps, 'state' | 'trans'>): JSX.Element {
  const sum = React.useMemo(() => totals(state), [state]);
  return (
    <dl className="jp-GPUPool-tiles" aria-label={trans.__('The pool in figures')}>
      <Tile label={trans.__('GPUs free')} value={trans.__('%1 of %2', sum.free, sum.gpus)} />
      <Tile label={trans.__('partly used')} value={`${sum.partly}`} />
      <Tile label={trans.__('fully used')} value={`${sum.full}`} />
      <Tile
        label={trans.__('memory free')}
        value={size(sum.free_mib, trans)}
        title={exactly(sum.free_mib, trans)}
      />
      <Tile
        label={trans.__('largest slice now')}
        value={size(sum.largest_mib, trans)}
        title={exactly(sum.largest_mib, trans)}
      />
      <Tile label={trans.__('queued')} value={`${sum.waiting}`} />
      {sum.unhealthy > 0 && (
        <Tile label={trans.__('unhealthy GPUs')} value={`${sum.unhealthy}`} warn={true} />
      )}
    </dl>
  );
}

interface ITile {
  label: string;
  value: string;
  title?: string;
  warn?: boolean;
}

const Tile = React.memo(function Tile({ label, value, title, warn }: ITile): JSX.Element {
  return (
    <div className={warn ? 'jp-GPUPool-tile jp-mod-warn' : 'jp-GPUPool-tile'} title={title}>
      <dt>{label}</dt>
      <dd>{value}</dd>
    </div>
  );
});
