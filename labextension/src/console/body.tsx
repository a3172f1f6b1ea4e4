/** The Console: its views, one at a time, and how the connection is. */

import * as React from 'react';

import { usePool } from '../context';
import { Administration } from './administration';
import { useAsked } from './asked';
import { Audit } from './audit';
import { IConsoleContext, IConsoleProps } from './context';
import { Leases } from './leases';
import { Namespaces } from './namespaces';
import { Overview } from './overview';
import { Button } from './parts';
import { Tokens } from './tokens';

export default function Body(context: IConsoleContext): JSX.Element {
  const { pool, trans } = context;
  const { state, connection } = usePool(pool);
  const administration = React.useMemo(() => new Administration(pool.api), [pool]);
  const who = useAsked(() => administration.whoAmI());
  const [view, setView] = React.useState('overview');
  const lost = connection.status === 'lost';
  if (!state) {
    return (
      <div className="jp-GPUPoolConsole-empty" role={lost ? 'alert' : 'status'}>
        <p>
          {lost
            ? trans.__(
                'The pool does not answer: %1',
                connection.reason || trans.__('no connection')
              )
            : trans.__('Reading the pool…')}
        </p>
        {lost && <Button onClick={() => pool.retry()}>{trans.__('Try now')}</Button>}
      </div>
    );
  }
  const views: [string, string, (props: IConsoleProps) => JSX.Element][] = [
    ['overview', trans.__('Servers and health'), Overview],
    ['leases', trans.__('Leases'), Leases],
    ['tokens', trans.__('Tokens'), Tokens],
    ['namespaces', trans.__('Namespaces'), Namespaces],
    ['audit', trans.__('Audit'), Audit]
  ];
  const props = { ...context, administration, state, who: who.answer };
  const [, , View] = views.find(([id]) => id === view) ?? views[0];
  return (
    <>
      <header className="jp-GPUPoolConsole-header">
        <h1>{trans.__('GPU Pool Console')}</h1>
        {who.answer && (
          <span>
            {who.answer.administers
              ? trans.__('%1, administrator', who.answer.owner)
              : trans.__('%1, namespace %2', who.answer.owner, who.answer.namespace)}
          </span>
        )}
        <span
          role="status"
          className={`jp-GPUPoolConsole-live ${lost ? 'jp-mod-lost' : ''}`}
          title={connection.reason}
        >
          {lost ? trans.__('Connection lost. What is shown is old.') : trans.__('live')}
        </span>
        {lost && <Button onClick={() => pool.retry()}>{trans.__('Try now')}</Button>}
      </header>
      <Tabs
        label={trans.__('Views of the Console')}
        views={views}
        view={view}
        onView={setView}
        panelId="jp-gpupool-console-view"
      />
      <div
        id="jp-gpupool-console-view"
        className={`jp-GPUPoolConsole-view jp-mod-${view}`}
        role="tabpanel"
        aria-labelledby={`jp-gpupool-console-tab-${view}`}
      >
        <View {...props} />
      </div>
    </>
  );
}

interface ITabs {
  label: string;
  views: readonly (readonly [string, string, unknown])[];
  view: string;
  onView: (id: string) => void;
  panelId: string;
}

/** Tabs with one stop for the keyboard: arrows, Home and End go from one to the next. */
function Tabs({ label, views, view, onView, panelId }: ITabs): JSX.Element {
  const list = React.useRef<HTMLDivElement>(null);
  const now = views.findIndex(([id]) => id === view);
  const go = (n: number) => {
    const to = (n + views.length) % views.length;
    onView(views[to][0]);
    list.current?.querySelectorAll<HTMLElement>('[role="tab"]')[to]?.focus();
  };
  const keys: Record<string, () => void> = {
    ArrowRight: () => go(now + 1),
    ArrowLeft: () => go(now - 1),
    Home: () => go(0),
    End: () => go(views.length - 1)
  };
  return (
    <div
      ref={list}
      role="tablist"
      aria-label={label}
      className="jp-GPUPoolConsole-tabs"
      onKeyDown={event => {
        const act = keys[event.key];
        if (act) {
          event.preventDefault();
          event.stopPropagation();
          act();
        }
      }}
    >
      {views.map(([id, title]) => (
        <button
          key={id}
          id={`jp-gpupool-console-tab-${id}`}
          type="button"
          role="tab"
          aria-selected={id === view}
          aria-controls={panelId}
          tabIndex={id === view ? 0 : -1}
          onClick={() => onView(id)}
        >
          {title}
        </button>
      ))}
    </div>
  );
}
