/** GPU-hours: how many were granted, and in how many of them something computed. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IUsageRow, UsageBy } from './adminapi';
import { IConsoleProps } from './context';
import { instant } from './durations';
import { useRequest } from './hooks';
import { Empty, RequestResult } from './parts';
import { IColumn, Table } from './table';
import { asCSV, figure, HOURS } from './usagerows';

const EVERY_MS = 300000;
const DAYS = ['1', '7', '30'] as const;

export function Usage(props: IConsoleProps): JSX.Element {
  const [by, setBy] = React.useState<UsageBy>('user');
  const [days, setDays] = React.useState<string>('30');
  const { trans } = props;
  const tools = (
    <>
      <select
        className="jp-mod-styled"
        aria-label={trans.__('Rows')}
        value={by}
        onChange={event => setBy(event.target.value as UsageBy)}
      >
        <option value="user">{trans.__('by user')}</option>
        <option value="namespace">{trans.__('by namespace')}</option>
        <option value="gpu">{trans.__('by GPU')}</option>
      </select>
      <select
        className="jp-mod-styled"
        aria-label={trans.__('Time')}
        value={days}
        onChange={event => setDays(event.target.value)}
      >
        {DAYS.map(count => (
          <option key={count} value={count}>
            {count === '1' ? trans.__('the last day') : trans.__('the last %1 days', count)}
          </option>
        ))}
      </select>
    </>
  );
  // Another report, another request.
  return <Report key={`${by} ${days}`} {...props} by={by} days={Number(days)} tools={tools} />;
}

interface IReport extends IConsoleProps {
  by: UsageBy;
  days: number;
  tools: JSX.Element;
}

function Report({ adminAPI, trans, by, days, tools }: IReport): JSX.Element {
  const usage = useRequest(() => adminAPI.usage(by, Date.now() / 1000 - days * 86400), EVERY_MS);
  const columns = React.useMemo((): IColumn<IUsageRow>[] => {
    const hours = {
      granted_h: trans.__('Granted'),
      computing_h: trans.__('Computing'),
      idle_h: trans.__('Idle'),
      unknown_h: trans.__('Unknown'),
      parked_h: trans.__('Parked')
    };
    return [
      {
        id: 'name',
        title: titlesOf(trans)[by],
        width: 'minmax(140px, 2fr)',
        value: row => row.gpu || row.name
      },
      {
        id: 'leases',
        title: trans.__('Leases'),
        width: 'minmax(70px, 1fr)',
        value: row => row.leases,
        isFigure: true
      },
      ...HOURS.map(field => ({
        id: field,
        title: hours[field],
        width: 'minmax(90px, 1fr)',
        value: (row: IUsageRow) => row[field],
        render: (row: IUsageRow) => figure(row[field]),
        isFigure: true
      }))
    ];
  }, [trans, by]);
  return (
    <RequestResult asked={usage} wait={trans.__('Loading GPU-hours…')}>
      {({ rows, since, measured_since }) => (
        <>
          <p>
            {trans.__('GPU-hours since %1.', instant(since))}{' '}
            {measured_since === null
              ? trans.__('Nothing was measured in that time, so it is unknown what computed.')
              : trans.__('Unknown: before %1, and while no pool ran.', instant(measured_since))}
          </p>
          <Table
            label={trans.__('Usage')}
            trans={trans}
            rows={rows}
            columns={columns}
            keyOf={row => row.name}
            sortedBy="granted_h"
            descending
            tools={
              <>
                {tools}
                <a
                  download={`gpu-hours-by-${by}.csv`}
                  href={`data:text/csv;charset=utf-8,${encodeURIComponent(asCSV(by, rows))}`}
                >
                  {trans.__('Download as CSV')}
                </a>
              </>
            }
            empty={<Empty title={trans.__('Nothing was granted in that time.')} />}
          />
        </>
      )}
    </RequestResult>
  );
}

function titlesOf(trans: TranslationBundle): Record<UsageBy, string> {
  return { user: trans.__('User'), namespace: trans.__('Namespace'), gpu: trans.__('GPU') };
}
