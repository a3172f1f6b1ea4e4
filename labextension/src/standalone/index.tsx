/** The Console as a page that a pool serves: to a hub's users after their login, or to users with a token. */

import * as React from 'react';
import { createRoot } from 'react-dom/client';

import { PoolAPI, PoolError } from '../pool/api';
import { useAct } from '../console/hooks';
import Body from '../console/body';
import { Button, Field, Trouble } from '../console/parts';
import { PoolModel } from '../pool/model';
import { PageTransport } from './transport';
import { words } from './translation';

const transport = new PageTransport();
const pool = new PoolModel(new PoolAPI(transport));

async function admit(token: string): Promise<void> {
  transport.token = token;
  await pool.api.other('whoami');
}

function Page(): JSX.Element {
  const [known, setKnown] = React.useState<boolean | null>(null);
  React.useEffect(() => {
    let over = false;
    pool.api.other('whoami').then(
      () => over || setKnown(true),
      reason => over || setKnown(!(reason instanceof PoolError && reason.status === 401))
    );
    return () => {
      over = true;
    };
  }, []);
  React.useEffect(() => {
    const watching = known ? pool.watch() : null;
    return () => watching?.dispose();
  }, [known]);
  if (known === null) {
    return <p role="status">{words.__('Loading the pool…')}</p>;
  }
  return known ? (
    <Body pool={pool} trans={words} />
  ) : (
    <Admission
      onToken={async token => {
        await admit(token);
        setKnown(true);
      }}
    />
  );
}

function Admission({ onToken }: { onToken: (token: string) => Promise<void> }): JSX.Element {
  const [token, setToken] = React.useState('');
  const { acting, trouble, act } = useAct();
  return (
    <form
      className="jp-GPUPoolConsole-empty"
      onSubmit={event => {
        event.preventDefault();
        void act(() => onToken(token.trim()));
      }}
    >
      <h1>{words.__('GPU Pool Console')}</h1>
      <Field
        label={words.__('Token')}
        hint={words.__(
          'The one in client.yaml of your bundle. This page forgets it when it is closed.'
        )}
      >
        {(id, hint) => (
          <input
            id={id}
            className="jp-mod-styled"
            aria-describedby={hint}
            type="password"
            autoComplete="off"
            autoFocus
            value={token}
            onChange={event => setToken(event.target.value)}
          />
        )}
      </Field>
      <Trouble>{trouble}</Trouble>
      <Button type="submit" kind="accept" disabled={acting || !token.trim()}>
        {words.__('Go on')}
      </Button>
    </form>
  );
}

createRoot(document.getElementById('console') as HTMLElement).render(<Page />);
