/** The audit log: who requested what, and the outcome. */

import * as React from 'react';

import { IAuditEntry } from './adminapi';
import { useRequest } from './hooks';
import { IConsoleProps } from './context';
import { instant } from './durations';
import { NotOffered } from './notoffered';
import { RequestResult, Empty } from './parts';
import { IColumn, Table } from './table';

const EVERY_MS = 5000;

export function Audit({ adminAPI, trans }: IConsoleProps): JSX.Element {
  const audit = useRequest(() => adminAPI.audit(), EVERY_MS);
  const columns = React.useMemo(
    (): IColumn<IAuditEntry>[] => [
      {
        id: 'at',
        title: trans.__('When'),
        width: '190px',
        value: entry => entry.at,
        render: entry => instant(entry.at)
      },
      {
        id: 'actor',
        title: trans.__('Who'),
        width: 'minmax(90px, 1fr)',
        value: entry => entry.actor || trans.__('the pool')
      },
      {
        id: 'action',
        title: trans.__('What'),
        width: 'minmax(100px, 1fr)',
        value: entry => entry.action
      },
      {
        id: 'subject',
        title: trans.__('To which'),
        width: 'minmax(140px, 1.5fr)',
        value: entry => entry.subject
      },
      {
        id: 'namespace',
        title: trans.__('Namespace'),
        width: 'minmax(90px, 1fr)',
        value: entry => entry.namespace
      },
      {
        id: 'outcome',
        title: trans.__('Outcome'),
        width: 'minmax(140px, 2.5fr)',
        value: entry => entry.outcome
      }
    ],
    [trans]
  );
  if (audit.status === 404 || audit.status === 403) {
    const { status, trouble } = audit;
    return <NotOffered status={status} reason={trouble} what="audit" trans={trans} />;
  }
  return (
    <RequestResult asked={audit} wait={trans.__('Loading the audit log…')}>
      {entries => (
        <Table
          label={trans.__('Audit')}
          trans={trans}
          rows={entries}
          columns={columns}
          keyOf={entry => `${entry.at} ${entry.action} ${entry.subject}`}
          sortedBy="at"
          descending
          empty={
            <Empty title={trans.__('No requests have been recorded yet.')}>
              <p>{trans.__('Each request to the pool and its outcome appear here.')}</p>
            </Empty>
          }
        />
      )}
    </RequestResult>
  );
}
