/** Who else holds GPUs, by name where the user may know; and a way to ask for them. */

import { TranslationBundle } from '@jupyterlab/translation';
import { Button } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { size } from '../common/format';
import { holdersOf, IHolder } from '../pool/state';
import { IRow, WindowedList } from '../common/windowedlist';

const HEIGHT = 64;
const TROUBLE_HEIGHT = 52;

export function OtherHoldersView({ state, slices, trans }: IViewProps): JSX.Element | null {
  const { myLeases, actions } = slices;
  const { me } = myLeases;
  const holders = React.useMemo(() => holdersOf(state.gpus, me), [state.gpus, me]);
  const [troubles, setTroubles] = React.useState<Readonly<Record<string, string>>>({});
  const rows = React.useMemo(
    () =>
      holders.map((holder): IHolderRow => ({
        key: holder.lease,
        height: HEIGHT + (troubles[holder.lease] ? TROUBLE_HEIGHT : 0),
        holder
      })),
    [holders, troubles]
  );
  if (holders.length === 0) {
    return null;
  }
  const ask = async (holder: IHolder) => {
    const line = await actions.askBack(holder.lease, holder.owner);
    setTroubles(before => ({ ...before, [holder.lease]: line }));
  };
  const render = ({ holder }: IHolderRow) => {
    return (
      <Holder
        holder={holder}
        trouble={troubles[holder.lease] ?? ''}
        trans={trans}
        onAsk={() => void ask(holder)}
      />
    );
  };
  return (
    <section aria-label={trans.__('Held by others')}>
      <h3>{trans.__('Held by others')}</h3>
      <WindowedList
        rows={rows}
        render={render}
        scroller=".jp-GPUPool"
        label={trans.__('Held by others')}
      />
    </section>
  );
}

/** The row of what somebody else holds. */
interface IHolderRow extends IRow {
  holder: IHolder;
}

interface IHolderProps {
  holder: IHolder;
  trouble: string;
  trans: TranslationBundle;
  onAsk: () => void;
}

function Holder({ holder, trouble, trans, onAsk }: IHolderProps): JSX.Element {
  const { owner, label, memory_mib } = holder;
  const title = label ? trans.__('%1 · %2', owner, label) : owner;
  const where = [...holder.where]
    .map(([server, indices]) => trans.__('GPU %1 of %2', indices.join(', '), server))
    .join(' · ');
  return (
    <article aria-label={title}>
      <div className="jp-GPUPool-name">
        <span className="jp-GPUPool-model" title={label}>
          {title}
        </span>
      </div>
      <div className="jp-GPUPool-figures">
        <span title={where}>{where}</span>
        <span>{size(memory_mib, trans)}</span>
      </div>
      <Button
        className="jp-mod-styled"
        small
        aria-label={trans.__('Ask %1 to release', owner)}
        onClick={onAsk}
      >
        {trans.__('Ask to release')}
      </Button>
      {trouble && (
        <p role="alert" className="jp-GPUPool-trouble" title={trouble}>
          {trouble}
        </p>
      )}
    </article>
  );
}
