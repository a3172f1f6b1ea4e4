/** The pool's tokens: create one with its bundle, extend it, revoke it. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IToken } from './adminapi';
import { useRequest } from './hooks';
import { IConsoleProps } from './context';
import { Form } from './dialog';
import { Life } from './fields';
import { day, instant, lifeOf, USUAL_LIFE } from './durations';
import { NewToken } from './newtoken';
import { NotOffered } from './notoffered';
import { RequestResult, Badge, Button, Empty, Tone } from './parts';
import { IColumn, Table } from './table';

/** Another administrator may change them. */
const EVERY_MS = 15000;

type Open = ['new'] | ['extend' | 'revoke', IToken] | null;

export function Tokens({ adminAPI, trans, who }: IConsoleProps): JSX.Element {
  const tokens = useRequest(() => adminAPI.tokens(), EVERY_MS);
  const [open, setOpen] = React.useState<Open>(null);
  const [past, setPast] = React.useState(false);
  const columns = React.useMemo(() => columnsOf(trans), [trans]);
  const close = () => {
    setOpen(null);
    tokens.again();
  };
  if (tokens.status === 404 || tokens.status === 403) {
    return (
      <NotOffered status={tokens.status} reason={tokens.trouble} what="tokens" trans={trans} />
    );
  }
  return (
    <RequestResult asked={tokens} wait={trans.__('Loading the tokens…')}>
      {all => (
        <>
          <Table
            label={trans.__('Tokens')}
            trans={trans}
            rows={past ? all : all.filter(token => token.state !== 'revoked')}
            columns={columns}
            keyOf={token => token.id}
            sortedBy="description"
            actionsWidth="190px"
            actions={token =>
              token.state !== 'revoked' && (
                <>
                  <Button
                    className="jp-mod-small"
                    aria-label={trans.__('Extend: %1', token.description)}
                    onClick={() => setOpen(['extend', token])}
                  >
                    {trans.__('Extend…')}
                  </Button>
                  <Button
                    className="jp-mod-small"
                    aria-label={trans.__('Revoke: %1', token.description)}
                    onClick={() => setOpen(['revoke', token])}
                  >
                    {trans.__('Revoke…')}
                  </Button>
                </>
              )
            }
            tools={
              <>
                <label className="jp-GPUPool-check">
                  <input
                    type="checkbox"
                    checked={past}
                    onChange={event => setPast(event.target.checked)}
                  />
                  {trans.__('Show revoked tokens')}
                </label>
                <Button kind="accept" onClick={() => setOpen(['new'])}>
                  {trans.__('New token…')}
                </Button>
              </>
            }
            empty={
              <Empty title={trans.__('There are no tokens yet.')}>
                <p>
                  {trans.__(
                    'A token gives a user access. Send them its bundle; they need nothing else.'
                  )}
                </p>
              </Empty>
            }
          />
          {open?.[0] === 'new' && (
            <NewToken adminAPI={adminAPI} who={who} trans={trans} onClose={close} />
          )}
          {open?.[0] === 'extend' && (
            <Extend
              token={open[1]}
              trans={trans}
              onExtend={life => adminAPI.extendToken(open[1].id, life)}
              onClose={close}
            />
          )}
          {open?.[0] === 'revoke' && (
            <Revoke
              token={open[1]}
              trans={trans}
              onRevoke={endLeases => adminAPI.revokeToken(open[1].id, endLeases)}
              onClose={close}
            />
          )}
        </>
      )}
    </RequestResult>
  );
}

interface IQuestion {
  token: IToken;
  trans: TranslationBundle;
  onClose: () => void;
}

function Extend(props: IQuestion & { onExtend: (life: number | null) => Promise<unknown> }) {
  const { token, trans, onExtend, onClose } = props;
  const [chosen, choose] = React.useState(USUAL_LIFE);
  return (
    <Form
      title={trans.__('Extend the token “%1”', token.description)}
      accept={trans.__('Extend')}
      cancel={trans.__('Cancel')}
      action={() => onExtend(lifeOf(chosen, trans))}
      onClose={onClose}
    >
      <Life
        label={trans.__('Valid from now on')}
        hint={trans.__('The existing bundle stays valid.')}
        value={chosen}
        trans={trans}
        onChange={choose}
      />
    </Form>
  );
}

function Revoke(props: IQuestion & { onRevoke: (endLeases: boolean) => Promise<unknown> }) {
  const { token, trans, onRevoke, onClose } = props;
  const [ends, setEnds] = React.useState(false);
  return (
    <Form
      title={trans.__('Revoke the token “%1”?', token.description)}
      kind="warn"
      accept={trans.__('Revoke')}
      cancel={trans.__('Keep')}
      action={() => onRevoke(ends)}
      onClose={onClose}
    >
      <p>
        {trans.__(
          '%1 loses access with this token immediately. This cannot be undone.',
          token.owner
        )}
      </p>
      <label className="jp-GPUPool-check">
        <input type="checkbox" checked={ends} onChange={event => setEnds(event.target.checked)} />
        {trans.__('Also end its leases; data on their GPU slices will be lost')}
      </label>
    </Form>
  );
}

function columnsOf(trans: TranslationBundle): IColumn<IToken>[] {
  return [
    {
      id: 'state',
      title: trans.__('State'),
      width: '96px',
      value: token => stateOf(token, trans)[1],
      render: token => {
        const [tone, word] = stateOf(token, trans);
        return <Badge tone={tone}>{word}</Badge>;
      }
    },
    {
      id: 'description',
      title: trans.__('Description'),
      width: 'minmax(140px, 2fr)',
      value: token => token.description
    },
    {
      id: 'owner',
      title: trans.__('Owner'),
      width: 'minmax(120px, 1.5fr)',
      value: token => token.owner,
      render: token =>
        token.administers ? trans.__('%1 (administrator)', token.owner) : token.owner
    },
    {
      id: 'namespace',
      title: trans.__('Namespace'),
      width: 'minmax(80px, 1fr)',
      value: token => token.namespace
    },
    {
      id: 'scope',
      title: trans.__('Scope'),
      width: '88px',
      value: token => token.scope,
      render: token => <span title={scopeOf(token, trans)}>{token.scope}</span>
    },
    {
      id: 'expires',
      title: trans.__('Expires'),
      width: '100px',
      value: token => token.expires_at,
      render: token =>
        token.expires_at === null ? (
          trans.__('never')
        ) : (
          <span title={instant(token.expires_at)}>{day(token.expires_at)}</span>
        )
    },
    {
      id: 'used',
      title: trans.__('Last used'),
      width: '100px',
      value: token => token.last_used_at,
      render: token =>
        token.last_used_at === null ? (
          '–'
        ) : (
          <span title={instant(token.last_used_at)}>{day(token.last_used_at)}</span>
        )
    },
    {
      id: 'id',
      title: trans.__('Id'),
      width: '116px',
      value: token => token.id,
      render: token => <code>{token.id}</code>
    }
  ];
}

/** What the token may do; pools of the version before know no scopes. */
function scopeOf(token: IToken, trans: TranslationBundle): string {
  const what = {
    read: trans.__('It only reads'),
    lease: trans.__('It reads, and requests and releases GPUs'),
    administer: trans.__('It may do whatever its owner may')
  }[token.scope ?? 'administer'];
  return token.one_namespace
    ? trans.__('%1; it changes nothing outside of %2', what, token.namespace)
    : what;
}

function stateOf(token: IToken, trans: TranslationBundle): [Tone, string] {
  switch (token.state) {
    case 'valid':
      return ['good', trans.__('valid')];
    case 'expired':
      return ['wait', trans.__('expired')];
    default:
      return ['plain', trans.__('revoked')];
  }
}
