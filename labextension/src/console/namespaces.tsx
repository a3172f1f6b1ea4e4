/** Namespaces: their limits, members and roles. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { age, plain, share } from '../common/format';
import { INamespace } from './adminapi';
import { useRequest } from './hooks';
import { IConsoleProps } from './context';
import { Form } from './dialog';
import { NamespaceForm } from './namespaceform';
import { NotOffered } from './notoffered';
import { RequestResult, Button, Empty } from './parts';
import { IColumn, Table } from './table';

const EVERY_MS = 15000;

interface IRow {
  namespace: INamespace;
  granted: number;
  leases: number;
}

type Open = ['new'] | ['edit' | 'remove', INamespace] | null;

export function Namespaces({ adminAPI, state, trans, who }: IConsoleProps): JSX.Element {
  const namespaces = useRequest(() => adminAPI.namespaces(), EVERY_MS);
  const [open, setOpen] = React.useState<Open>(null);
  const columns = React.useMemo(() => columnsOf(trans), [trans]);
  const held = React.useMemo(() => {
    const sums = new Map<string, { granted: number; leases: number }>();
    for (const lease of Object.values(state.leases)) {
      const sum = sums.get(lease.request.namespace) ?? { granted: 0, leases: 0 };
      sum.leases += lease.slices.length > 0 ? 1 : 0;
      sum.granted += lease.slices.reduce((mib, piece) => mib + piece.memory_mib, 0);
      sums.set(lease.request.namespace, sum);
    }
    return sums;
  }, [state.leases]);
  const close = () => {
    setOpen(null);
    namespaces.again();
  };
  if (namespaces.status === 404 || namespaces.status === 403) {
    const { status, trouble } = namespaces;
    return <NotOffered status={status} reason={trouble} what="namespaces" trans={trans} />;
  }
  return (
    <RequestResult asked={namespaces} wait={trans.__('Loading the namespaces…')}>
      {all => (
        <>
          <Table
            label={trans.__('Namespaces')}
            trans={trans}
            rows={all.map((namespace): IRow => {
              const sum = held.get(namespace.name);
              return { namespace, granted: sum?.granted ?? 0, leases: sum?.leases ?? 0 };
            })}
            columns={columns}
            keyOf={row => row.namespace.name}
            sortedBy="name"
            actionsWidth="190px"
            actions={({ namespace }) => (
              <>
                <Button
                  className="jp-mod-small"
                  aria-label={trans.__('Change: %1', namespace.name)}
                  onClick={() => setOpen(['edit', namespace])}
                >
                  {trans.__('Change…')}
                </Button>
                {namespace.name !== 'default' && who?.administers !== false && (
                  <Button
                    className="jp-mod-small"
                    aria-label={trans.__('Remove: %1', namespace.name)}
                    onClick={() => setOpen(['remove', namespace])}
                  >
                    {trans.__('Remove…')}
                  </Button>
                )}
              </>
            )}
            tools={
              who?.administers !== false && (
                <Button kind="accept" onClick={() => setOpen(['new'])}>
                  {trans.__('New namespace…')}
                </Button>
              )
            }
            empty={
              <Empty title={trans.__('There are no namespaces.')}>
                <p>{trans.__('Until you create one, all users share the pool without limits.')}</p>
              </Empty>
            }
          />
          {(open?.[0] === 'new' || open?.[0] === 'edit') && (
            <NamespaceForm
              adminAPI={adminAPI}
              before={open[1] ?? null}
              trans={trans}
              onClose={close}
            />
          )}
          {open?.[0] === 'remove' && (
            <Form
              title={trans.__('Remove the namespace “%1”?', open[1].name)}
              kind="warn"
              accept={trans.__('Remove')}
              cancel={trans.__('Keep')}
              action={() => adminAPI.removeNamespace(open[1].name)}
              onClose={close}
            >
              <p>{trans.__('Its members can no longer request GPUs in it.')}</p>
            </Form>
          )}
        </>
      )}
    </RequestResult>
  );
}

function columnsOf(trans: TranslationBundle): IColumn<IRow>[] {
  const limit = (value: number | null | undefined) => value ?? null;
  const orNone = (value: number | null | undefined, shown: (value: number) => string) =>
    value === null || value === undefined ? '–' : shown(value);
  return [
    {
      id: 'name',
      title: trans.__('Namespace'),
      width: 'minmax(100px, 1.2fr)',
      value: ({ namespace }) => namespace.name
    },
    {
      id: 'description',
      title: trans.__('Description'),
      width: 'minmax(90px, 1.5fr)',
      value: ({ namespace }) => namespace.description
    },
    {
      id: 'granted',
      title: trans.__('Memory in MiB'),
      width: 'minmax(150px, 1fr)',
      isFigure: true,
      value: row => row.granted,
      render: ({ granted, namespace }) =>
        trans.__('%1 of %2', plain(granted), orNone(namespace.limits.memory_mib, plain))
    },
    {
      id: 'leases',
      title: trans.__('Leases'),
      width: '96px',
      isFigure: true,
      value: row => row.leases,
      render: ({ leases, namespace }) =>
        trans.__('%1 of %2', plain(leases), orNone(namespace.limits.leases, plain))
    },
    {
      id: 'gpus',
      title: trans.__('Most GPUs'),
      width: '92px',
      isFigure: true,
      value: ({ namespace }) => limit(namespace.limits.gpus),
      render: ({ namespace }) => orNone(namespace.limits.gpus, value => value.toLocaleString())
    },
    {
      id: 'user',
      title: trans.__('One user'),
      width: '84px',
      isFigure: true,
      value: ({ namespace }) => limit(namespace.limits.user_share),
      render: ({ namespace }) => orNone(namespace.limits.user_share, share)
    },
    {
      id: 'lease_s',
      title: trans.__('Longest'),
      width: '80px',
      isFigure: true,
      value: ({ namespace }) => limit(namespace.limits.lease_s),
      render: ({ namespace }) => orNone(namespace.limits.lease_s, value => age(value, trans))
    },
    {
      id: 'idle_s',
      title: trans.__('Idle'),
      width: '72px',
      isFigure: true,
      value: ({ namespace }) => limit(namespace.limits.idle_s),
      render: ({ namespace }) => orNone(namespace.limits.idle_s, value => age(value, trans))
    },
    {
      id: 'weight',
      title: trans.__('Weight'),
      width: '76px',
      isFigure: true,
      value: ({ namespace }) => namespace.weight
    },
    {
      id: 'members',
      title: trans.__('Members'),
      width: '90px',
      isFigure: true,
      value: ({ namespace }) => Object.keys(namespace.members ?? {}).length
    }
  ];
}
