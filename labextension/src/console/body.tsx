/** The Console: its views, one at a time, and the state of the connection. */

import * as React from 'react';

import { usePool } from '../common/viewcontext';
import { AdminAPI } from './adminapi';
import { useAct, useRequest } from './hooks';
import { API } from './api';
import { Audit } from './audit';
import { IConsoleContext, IConsoleProps } from './context';
import { Leases } from './leases';
import { Namespaces } from './namespaces';
import { Overview } from './overview';
import { Button, Trouble } from './parts';
import { Tokens } from './tokens';
import { Usage } from './usage';

/** A view: its id, title and component. */
type View = [string, string, (props: IConsoleProps) => JSX.Element];

export default function Body(context: IConsoleContext): JSX.Element {
  const { pool, trans } = context;
  const { state, connection } = usePool(pool);
  const adminAPI = React.useMemo(() => new AdminAPI(pool.api), [pool]);
  const who = useRequest(() => adminAPI.whoAmI());
  const [view, setView] = React.useState('overview');
  const lost = connection.status === 'lost';
  if (!state) {
    return (
      <div className="jp-GPUPoolConsole-empty" role={lost ? 'alert' : 'status'}>
        <p>
          {lost
            ? trans.__('Cannot reach the pool: %1', connection.reason || trans.__('no connection'))
            : trans.__('Loading the pool…')}
        </p>
        {lost && <Button onClick={() => pool.retry()}>{trans.__('Retry now')}</Button>}
      </div>
    );
  }
  const overview: View = ['overview', trans.__('Servers and health'), Overview];
  const views: View[] = [
    overview,
    ['leases', trans.__('Leases'), Leases],
    ['tokens', trans.__('Tokens'), Tokens],
    ['namespaces', trans.__('Namespaces'), Namespaces],
    ['usage', trans.__('Usage'), Usage],
    ['audit', trans.__('Audit'), Audit],
    ['api', trans.__('API'), API]
  ];
  const props = { ...context, adminAPI, state, who: who.answer };
  const [, , Shown] = views.find(([id]) => id === view) ?? overview;
  return (
    <>
      <header className="jp-GPUPoolConsole-header">
        <h1>{trans.__('GPU Pool Console')}</h1>
        {who.answer && (
          <span>
            {who.answer.administers
              ? trans.__('%1 · administers the pool', who.answer.owner)
              : trans.__('%1 · namespace %2', who.answer.owner, who.answer.namespace)}
          </span>
        )}
        <span
          role="status"
          className={`jp-GPUPoolConsole-live ${lost ? 'jp-mod-lost' : ''}`}
          title={connection.reason}
        >
          {lost
            ? trans.__('Connection lost. The data below may be out of date.')
            : trans.__('live')}
        </span>
        {lost && <Button onClick={() => pool.retry()}>{trans.__('Retry now')}</Button>}
        {context.signOut && <SignOut trans={trans} signOut={context.signOut} />}
      </header>
      <Tabs
        label={trans.__('Views of the Console')}
        views={views}
        view={view}
        onView={setView}
        panelId="jp-gpupool-console-view"
      />
      <div
        key={view} // another view begins at its top
        id="jp-gpupool-console-view"
        className={`jp-GPUPoolConsole-view jp-mod-${view}`}
        role="tabpanel"
        aria-labelledby={`jp-gpupool-console-tab-${view}`}
      >
        <Shown {...props} />
      </div>
    </>
  );
}

interface ISignOut {
  trans: IConsoleContext['trans'];
  signOut: NonNullable<IConsoleContext['signOut']>;
}

function SignOut({ trans, signOut }: ISignOut): JSX.Element {
  const { acting, trouble, act } = useAct();
  return (
    <>
      <Button disabled={acting} onClick={() => void act(() => signOut(false))}>
        {trans.__('Sign out')}
      </Button>
      <Button
        disabled={acting}
        title={trans.__('In all browsers where you are signed in')}
        onClick={() => void act(() => signOut(true))}
      >
        {trans.__('Sign out everywhere')}
      </Button>
      <Trouble>{trouble}</Trouble>
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

/** Tabs with one tab stop: the arrow keys, Home and End move between them. */
function Tabs({ label, views, view, onView, panelId }: ITabs): JSX.Element {
  const list = React.useRef<HTMLDivElement>(null);
  const now = views.findIndex(([id]) => id === view);
  const go = (n: number) => {
    const to = (n + views.length) % views.length;
    const next = views[to];
    if (next) {
      onView(next[0]);
    }
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
