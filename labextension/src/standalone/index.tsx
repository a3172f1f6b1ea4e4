/** The Console as a page that a pool serves: to a hub's users after their login, to users who sign in, or with a token. */

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

interface ISignIn {
  csrf: string;
}

/** Whether the pool refuses for want of a token or a sign-in. */
function isStranger(reason: unknown): boolean {
  return reason instanceof PoolError && reason.status === 401;
}

/** Returns whether the pool knows the user; a pool that does not answer says so later. */
async function isKnown(): Promise<boolean> {
  try {
    await pool.api.whoAmI();
    return true;
  } catch (reason) {
    return !isStranger(reason);
  }
}

/** Takes up the sign-in that this browser has, and returns whether it counts. */
async function resume(): Promise<boolean> {
  try {
    transport.csrf = (await pool.api.other<ISignIn>('session')).csrf;
  } catch {
    return false; // this server has no sign-ins, or this browser has none
  }
  return isKnown();
}

async function admit(token: string): Promise<void> {
  transport.token = token;
  await pool.api.whoAmI();
}

function Page(): JSX.Element {
  const [known, setKnown] = React.useState<boolean | null>(null);
  React.useEffect(() => {
    let over = false;
    void (async () => {
      const found = (await isKnown()) || (await resume());
      if (!over) {
        setKnown(found);
      }
    })();
    return () => {
      over = true;
    };
  }, []);
  React.useEffect(() => {
    if (!known) {
      return;
    }
    const watching = pool.watch();
    const look = async () => {
      if (pool.connection.status === 'lost' && !(await isKnown())) {
        transport.csrf = transport.token = '';
        setKnown(false);
      }
    };
    const onChanged = () => void look();
    pool.changed.connect(onChanged);
    return () => {
      pool.changed.disconnect(onChanged);
      watching.dispose();
    };
  }, [known]);
  const signOut = async (everywhere: boolean) => {
    await pool.api.other(`session${everywhere ? '?everywhere=1' : ''}`, 'DELETE');
    transport.csrf = '';
    setKnown(false);
  };
  if (known === null) {
    return <p role="status">{words.__('Loading the pool…')}</p>;
  }
  return known ? (
    <Body pool={pool} trans={words} signOut={transport.csrf ? signOut : undefined} />
  ) : (
    <Admission
      onToken={async token => {
        await admit(token);
        setKnown(true);
      }}
    />
  );
}

/** Where to sign in; none where the pool has no identity provider, or does not say. */
function useIssuers(): readonly string[] {
  const [issuers, setIssuers] = React.useState<readonly string[]>([]);
  React.useEffect(() => {
    let over = false;
    pool.api.other<{ console: string[] }>('login').then(
      found => over || setIssuers(found.console),
      () => undefined
    );
    return () => {
      over = true;
    };
  }, []);
  return issuers;
}

function Admission({ onToken }: { onToken: (token: string) => Promise<void> }): JSX.Element {
  const [token, setToken] = React.useState('');
  const { acting, trouble, act } = useAct();
  const issuers = useIssuers();
  return (
    <form
      className="jp-GPUPoolConsole-empty"
      onSubmit={event => {
        event.preventDefault();
        void act(() => onToken(token.trim()));
      }}
    >
      <h1>{words.__('GPU Pool Console')}</h1>
      {issuers.map(issuer => (
        <a
          key={issuer}
          className="jp-Button jp-mod-styled jp-mod-accept"
          href={`../sign-in?issuer=${encodeURIComponent(issuer)}`}
        >
          {words.__('Sign in with %1', new URL(issuer).host)}
        </a>
      ))}
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
            autoFocus={issuers.length === 0}
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
