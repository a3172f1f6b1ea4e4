/** The leases that the user may see, and their release. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { age, exactly, placed, share, size } from '../common/format';
import { IPoolState, IUse, uses } from '../pool/state';
import { ILease } from '../pool/apitypes';
import { IConsoleProps } from './context';
import { Form } from './dialog';
import { ExtendLease } from './extendlease';
import { instant } from './durations';
import { Badge, Button, Empty, Tone } from './parts';
import { IColumn, Table } from './table';

interface IRow {
  lease: ILease;
  granted: number;
  use: IUse | undefined;
  held: number;
  /** Seconds; null if the lease has no end. */
  left: number | null;
}

export function Leases({ adminAPI, state, trans }: IConsoleProps): JSX.Element {
  const [releasing, release] = React.useState<ILease | null>(null);
  const [extending, extend] = React.useState<ILease | null>(null);
  const rows = React.useMemo(() => rowsOf(state), [state]);
  const columns = React.useMemo(() => columnsOf(trans), [trans]);
  return (
    <>
      <Table
        label={trans.__('All leases')}
        trans={trans}
        rows={rows}
        columns={columns}
        keyOf={row => row.lease.id}
        sortedBy="held"
        descending
        actionsWidth="180px"
        actions={({ lease }) => (
          <>
            {lease.expires_at && (
              <Button
                className="jp-mod-small"
                aria-label={trans.__('Extend: %1', called(lease))}
                onClick={() => extend(lease)}
              >
                {trans.__('Extend…')}
              </Button>
            )}
            <Button
              className="jp-mod-small"
              aria-label={trans.__('Release: %1', called(lease))}
              onClick={() => release(lease)}
            >
              {lease.state === 'QUEUED' ? trans.__('Cancel…') : trans.__('Release…')}
            </Button>
          </>
        )}
        empty={
          <Empty title={trans.__('No leases and no queued requests.')}>
            <p>{trans.__('Leases appear here when a user requests GPUs.')}</p>
          </Empty>
        }
      />
      {extending && (
        <ExtendLease
          adminAPI={adminAPI}
          lease={extending}
          called={called(extending)}
          at={state.at}
          trans={trans}
          onClose={() => extend(null)}
        />
      )}
      {releasing && (
        <Form
          title={trans.__('Release the GPU slices of %1?', called(releasing))}
          kind="warn"
          accept={trans.__('Release and lose data')}
          cancel={trans.__('Keep')}
          action={() => adminAPI.release(releasing.id)}
          onClose={() => release(null)}
        >
          <p>
            {releasing.state === 'QUEUED'
              ? trans.__('The request of %1 leaves the queue.', releasing.request.owner)
              : trans.__(
                  'The program of %1 that uses them will fail, and its data on the GPU slices will be lost.',
                  releasing.request.owner
                )}
          </p>
          <p className="jp-GPUPoolConsole-id">{releasing.id}</p>
        </Form>
      )}
    </>
  );
}

function called(lease: ILease): string {
  return lease.request.label || lease.id.slice(0, 8);
}

function rowsOf(state: IPoolState): IRow[] {
  const used = uses(state.gpus);
  return Object.values(state.leases).map(lease => ({
    lease,
    granted: lease.slices.reduce((sum, piece) => sum + piece.memory_mib, 0),
    use: used.get(lease.id),
    held: state.at - (lease.granted_at ?? lease.created_at),
    left: lease.expires_at ? Math.max(0, lease.expires_at - state.at) : null
  }));
}

function columnsOf(trans: TranslationBundle): IColumn<IRow>[] {
  return [
    {
      id: 'state',
      title: trans.__('State'),
      width: '165px',
      value: ({ lease }) => stateOf(lease, trans)[1],
      render: ({ lease }) => {
        const [tone, word] = stateOf(lease, trans);
        return <Badge tone={tone}>{word}</Badge>;
      }
    },
    {
      id: 'owner',
      title: trans.__('Owner'),
      width: 'minmax(90px, 1.2fr)',
      value: ({ lease }) => lease.request.owner
    },
    {
      id: 'label',
      title: trans.__('For'),
      width: 'minmax(110px, 1.6fr)',
      value: ({ lease }) => called(lease)
    },
    {
      id: 'namespace',
      title: trans.__('Namespace'),
      width: 'minmax(80px, 1fr)',
      value: ({ lease }) => lease.request.namespace
    },
    {
      id: 'where',
      title: trans.__('GPUs'),
      width: 'minmax(130px, 2fr)',
      value: ({ lease }) => where(lease, trans)
    },
    {
      id: 'granted',
      title: trans.__('Memory'),
      width: '90px',
      isFigure: true,
      value: row => row.granted,
      render: row => <span title={exactly(row.granted, trans)}>{size(row.granted, trans)}</span>
    },
    {
      id: 'used',
      title: trans.__('Used'),
      width: '90px',
      isFigure: true,
      value: row => row.use?.used_mib ?? null,
      render: row => (row.use ? size(row.use.used_mib, trans) : '–')
    },
    {
      id: 'busy',
      title: trans.__('Busy'),
      width: '64px',
      isFigure: true,
      value: row => row.use?.busy ?? null,
      render: row => (row.use ? share(row.use.busy) : '–')
    },
    {
      id: 'held',
      title: trans.__('Held for'),
      width: '108px',
      isFigure: true,
      value: row => Math.round(row.held),
      render: row => (
        <span title={instant(row.lease.granted_at ?? row.lease.created_at)}>
          {age(row.held, trans)}
        </span>
      )
    },
    {
      id: 'left',
      title: trans.__('Time left'),
      width: '90px',
      isFigure: true,
      value: row => (row.left === null ? null : Math.round(row.left)),
      render: row =>
        row.left === null ? (
          '–'
        ) : (
          <span title={instant(row.lease.expires_at ?? 0)}>{age(row.left, trans)}</span>
        )
    }
  ];
}

function stateOf(lease: ILease, trans: TranslationBundle): [Tone, string] {
  switch (lease.state) {
    case 'ACTIVE':
      return ['good', trans.__('active')];
    case 'GRANTED':
      return ['wait', trans.__('starting')];
    case 'QUEUED':
      return [
        'wait',
        lease.position === null ? trans.__('queued') : trans.__('position %1', lease.position)
      ];
    case 'PARKED':
      return lease.position === null
        ? ['plain', trans.__('asleep, wakes by itself')]
        : ['wait', trans.__('waking, position %1', lease.position)];
    default:
      return ['plain', lease.state.toLowerCase()];
  }
}

/** `2 × 26,008 MiB: GPU 0, 1 of vm`, or the request of a queued lease. */
function where(lease: ILease, trans: TranslationBundle): string {
  if (lease.slices.length === 0) {
    const { num_gpus, partial, memory_mib } = lease.request;
    const each = partial === null ? exactly(memory_mib ?? 0, trans) : share(partial);
    return trans.__('%1 × %2 wanted', num_gpus, each);
  }
  return placed(lease.slices, trans);
}
