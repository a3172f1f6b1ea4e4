/** What the user holds, whoever asked for it: notebooks, programs, the command line. */

import { TranslationBundle } from '@jupyterlab/translation';
import { Button } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { age, moment, part, placed, share } from '../common/format';
import { IUse, mineOf, split, uses } from '../pool/state';
import { IAskedBack, ILease } from '../pool/apitypes';
import { IRow, WindowedList } from '../common/windowedlist';

const HEIGHT = 102;
const EDITOR_HEIGHT = 32;
const TROUBLE_HEIGHT = 52;
const ASKED_HEIGHT = 64;

export function MyLeasesView(props: IViewProps): JSX.Element {
  const { state, slices, trans } = props;
  const { me } = slices.myLeases;
  const { held } = React.useMemo(() => split(mineOf(state.leases, me)), [state.leases, me]);
  const used = React.useMemo(() => uses(state.gpus), [state.gpus]);
  // Which one is being resized, and what went wrong with which: here, because rows come and go with scrolling.
  const [resizing, resize] = React.useState<string | null>(null);
  const [troubles, setTroubles] = React.useState<Readonly<Record<string, string>>>({});
  const rows = React.useMemo(
    () =>
      held.map((lease): ILeaseRow => ({
        key: lease.id,
        height:
          HEIGHT +
          (resizing === lease.id ? EDITOR_HEIGHT : 0) +
          (troubles[lease.id] ? TROUBLE_HEIGHT : 0) +
          (lease.asked_back?.length ? ASKED_HEIGHT : 0),
        lease
      })),
    [held, resizing, troubles]
  );
  const render = ({ lease }: ILeaseRow) => {
    return (
      <Lease
        {...props}
        lease={lease}
        use={used.get(lease.id)}
        trouble={troubles[lease.id] ?? ''}
        isResizing={resizing === lease.id}
        onResizing={wanted => resize(wanted ? lease.id : null)}
        onTrouble={line => setTroubles(before => ({ ...before, [lease.id]: line }))}
      />
    );
  };
  const lost = state.ended.filter(
    lease =>
      (lease.state === 'LOST' || lease.state === 'EXPIRED') &&
      (me === null || lease.request.owner === me)
  );
  return (
    <section aria-label={trans.__('My leases')}>
      <h3>{trans.__('My leases')}</h3>
      {held.length === 0 ? (
        <p className="jp-GPUPool-note">{trans.__('You hold no GPU slices.')}</p>
      ) : (
        <WindowedList
          rows={rows}
          render={render}
          scroller=".jp-GPUPool"
          label={trans.__('My leases')}
        />
      )}
      {lost.slice(0, 3).map(lease => (
        <p key={lease.id} className="jp-GPUPool-note">
          {trans.__(
            '%1 lost its GPU slices at %2: %3',
            props.slices.actions.nameOf(lease),
            moment(lease.ended_at ?? 0),
            lease.reason
          )}
        </p>
      ))}
    </section>
  );
}

interface ILeaseProps extends IViewProps {
  lease: ILease;
  use: IUse | undefined;
  trouble: string;
  isResizing: boolean;
  onResizing: (wanted: boolean) => void;
  onTrouble: (line: string) => void;
}

function Lease(props: ILeaseProps): JSX.Element {
  const { lease, use, trouble, state, trans, slices, isResizing } = props;
  const { actions, open } = slices;
  const [acting, setActing] = React.useState(false);
  const granted = lease.slices.reduce((sum, piece) => sum + piece.memory_mib, 0);
  const name = actions.nameOf(lease);
  const path = actions.pathOf(lease);
  const used = use?.used_mib ?? 0;

  const act = async (action: Promise<string>): Promise<boolean> => {
    setActing(true);
    const line = await action.catch(String);
    setActing(false);
    props.onTrouble(line);
    return !line;
  };

  return (
    <article aria-label={name}>
      <div className="jp-GPUPool-name">
        {path ? (
          <a
            className="jp-GPUPool-model"
            href="#"
            title={path}
            onClick={event => {
              event.preventDefault();
              open(path);
            }}
          >
            {name}
          </a>
        ) : (
          <span className="jp-GPUPool-model" title={`${lease.request.client}\n${lease.id}`}>
            {name}
          </span>
        )}
        {lease.idle_since && (
          <span
            className="jp-GPUPool-badge"
            title={trans.__('Nothing has run on these GPU slices since then')}
          >
            {trans.__('idle %1', age(state.at - lease.idle_since, trans))}
          </span>
        )}
        {lease.state !== 'ACTIVE' && (
          <span className="jp-GPUPool-badge">{stateOf(lease, trans)}</span>
        )}
      </div>
      <div className="jp-GPUPool-figures">
        <span title={placed(lease.slices, trans)}>{placed(lease.slices, trans)}</span>
      </div>
      <div
        className="jp-GPUPool-bar"
        role="meter"
        aria-label={trans.__('Used memory of %1', name)}
        aria-valuemin={0}
        aria-valuemax={Math.max(1, granted)}
        aria-valuenow={used}
        aria-valuetext={trans.__('%1 used', part(used, granted, trans))}
      >
        <span
          className="jp-GPUPool-used"
          style={{ width: `${granted > 0 ? Math.min(100, (100 * used) / granted) : 0}%` }}
        />
      </div>
      <div className="jp-GPUPool-figures">
        <span>{trans.__('%1 used', part(used, granted, trans))}</span>
        <span>{trans.__('%1 busy', share(use?.busy ?? 0))}</span>
        <span title={moment(lease.granted_at ?? lease.created_at)}>{time(props, trans)}</span>
      </div>
      <div className="jp-GPUPool-buttons">
        <Button
          className="jp-mod-styled"
          small
          aria-label={trans.__('Resize: %1', name)}
          aria-expanded={isResizing}
          disabled={acting || lease.state !== 'ACTIVE'}
          onClick={() => props.onResizing(!isResizing)}
        >
          {trans.__('Resize')}
        </Button>
        {lease.expires_at && (
          <Button
            className="jp-mod-styled"
            small
            aria-label={trans.__('Extend: %1', name)}
            disabled={acting}
            onClick={() => void act(actions.extend(lease))}
          >
            {trans.__('Extend')}
          </Button>
        )}
        <Button
          className="jp-mod-styled"
          small
          aria-label={trans.__('Release: %1', name)}
          disabled={acting}
          onClick={() => void act(actions.release(lease))}
        >
          {trans.__('Release')}
        </Button>
      </div>
      {isResizing && (
        <Editor
          lease={lease}
          trans={trans}
          disabled={acting}
          onApply={async partial => {
            if (await act(actions.resize(lease, partial))) {
              props.onResizing(false);
            }
          }}
        />
      )}
      {lease.asked_back && (
        <Asked
          asked={lease.asked_back}
          trans={trans}
          disabled={acting}
          onKeep={() => void act(actions.keep(lease))}
        />
      )}
      {trouble && (
        <p role="alert" className="jp-GPUPool-trouble" title={trouble}>
          {trouble}
        </p>
      )}
    </article>
  );

  function time({ lease }: ILeaseProps, trans: TranslationBundle): string {
    return lease.expires_at
      ? trans.__('%1 left', age(lease.expires_at - state.at, trans))
      : trans.__('for %1', age(state.at - (lease.granted_at ?? lease.created_at), trans));
  }
}

/** The row of a lease. */
interface ILeaseRow extends IRow {
  lease: ILease;
}

interface IAsked {
  asked: readonly IAskedBack[];
  trans: TranslationBundle;
  disabled: boolean;
  onKeep: () => void;
}

/** Who would like to have it: the last one in words, and how many. */
function Asked({ asked, trans, disabled, onKeep }: IAsked): JSX.Element | null {
  const last = asked[asked.length - 1];
  if (!last) {
    return null;
  }
  const { by, message } = last;
  const others = asked.length - 1;
  const text = message
    ? trans.__('%1 asks you to release it: “%2”', by, message)
    : trans.__('%1 asks you to release it', by);
  return (
    <div
      className="jp-GPUPool-asked"
      title={asked.map(one => `${one.by}: ${one.message}`).join('\n')}
    >
      <p>{others > 0 ? trans._n('%2 (and %1 more)', '%2 (and %1 more)', others, text) : text}</p>
      <Button className="jp-mod-styled" small disabled={disabled} onClick={onKeep}>
        {trans.__('Keep it')}
      </Button>
    </div>
  );
}

interface IEditor {
  lease: ILease;
  trans: TranslationBundle;
  disabled: boolean;
  onApply: (partial: number) => void;
}

/** Another share of the same GPUs. */
function Editor({ lease, trans, disabled, onApply }: IEditor): JSX.Element {
  const [first] = lease.slices;
  const now = first ? Math.round((100 * first.memory_mib) / first.total_mib) / 100 : 0.5;
  const [text, setText] = React.useState(String(now));
  return (
    <form
      className="jp-GPUPool-field"
      noValidate // what is wrong the pool says, in words
      onSubmit={event => {
        event.preventDefault();
        onApply(Number(text));
      }}
    >
      <input
        type="range"
        min={0.05}
        max={1}
        step={0.05}
        value={Number(text)}
        aria-label={trans.__('New share of each GPU')}
        aria-valuetext={share(Number(text))}
        onChange={event => setText(event.target.value)}
      />
      <input
        className="jp-mod-styled"
        type="number"
        min={0.01}
        max={1}
        step={0.01}
        value={text}
        aria-label={trans.__('New share of each GPU, as a number')}
        onChange={event => setText(event.target.value)}
      />
      <Button type="submit" className="jp-mod-styled jp-mod-accept" small disabled={disabled}>
        {trans.__('Apply')}
      </Button>
    </form>
  );
}

function stateOf(lease: ILease, trans: TranslationBundle): string {
  switch (lease.state) {
    case 'GRANTED':
      return trans.__('starting');
    case 'PARKED':
      return lease.position === null
        ? trans.__('asleep, wakes by itself')
        : trans.__('waking: position %1 in the queue', lease.position);
    default:
      return lease.state;
  }
}
