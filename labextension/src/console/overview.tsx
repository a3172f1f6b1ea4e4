/** The pool at a glance: figures, use over time, servers and health. */

import * as React from 'react';

import type { Range } from '../chart/data';
import { exactly, share, size } from '../common/format';
import { freeOf } from '../pool/state';

import { SummaryTiles } from '../sidebar/summarytiles';
import { IGPU, ILease, IServer } from '../pool/apitypes';
import { ICheck, IHealth } from './adminapi';
import { IRequestResult, useRequest } from './hooks';
import { IConsoleProps } from './context';
import { Drain } from './drain';
import { RequestResult, Badge, Button, Empty, Tone } from './parts';
import { IColumn, Table } from './table';

/** How often health is requested while it is visible, in milliseconds. */
const EVERY_MS = 10000;

const Chart = React.lazy(() => import('../chart/chart').then(({ Chart }) => ({ default: Chart })));

const NAMES = {
  actions: {
    nameOf: ({ id, request }: ILease) =>
      request.label ? `${request.owner}: ${request.label}` : `${request.owner}: ${id.slice(0, 8)}`
  }
};

interface IRow {
  server: IServer;
  gpus: IGPU[];
  memory: number;
  granted: number;
  used: number;
  free: number;
  busy: number;
  leases: number;
  sick: number;
}

export function Overview(props: IConsoleProps): JSX.Element {
  const { adminAPI, state, trans, who } = props;
  const [draining, drain] = React.useState<IRow | null>(null);
  const [range, setRange] = React.useState<Range>('1h');
  const health = useRequest(() => adminAPI.health(), EVERY_MS);
  const rows = React.useMemo(
    () => state.servers.map(server => rowOf(server, state.gpus)),
    [state.servers, state.gpus]
  );
  const columns = React.useMemo((): IColumn<IRow>[] => {
    return [
      {
        id: 'name',
        title: trans.__('Server'),
        width: 'minmax(90px, 1fr)',
        value: row => row.server.name,
        render: row => (
          <>
            {row.server.name}{' '}
            {row.server.draining && <Badge tone="wait">{trans.__('draining')}</Badge>}
          </>
        )
      },
      {
        id: 'host',
        title: trans.__('Host'),
        width: 'minmax(90px, 1fr)',
        value: row => row.server.host
      },
      {
        id: 'gpus',
        title: trans.__('GPUs'),
        width: 'minmax(270px, 2fr)',
        value: row => row.gpus.length,
        render: row => (
          <>
            {kinds(row.gpus)}{' '}
            {row.gpus.some(gpu => gpu.emulated) && (
              <span className="jp-GPUPool-badge">{trans.__('emulated')}</span>
            )}{' '}
            {row.sick > 0 && (
              <Badge tone="bad">{trans._n('%1 unhealthy', '%1 unhealthy', row.sick)}</Badge>
            )}
          </>
        )
      },
      {
        id: 'granted',
        title: trans.__('Memory granted'),
        width: 'minmax(150px, 2fr)',
        value: row => (row.memory > 0 ? row.granted / row.memory : null),
        render: row => (
          <span className="jp-GPUPoolConsole-meter">
            <span
              className="jp-GPUPool-bar"
              role="meter"
              aria-label={trans.__('Granted memory of %1', row.server.name)}
              aria-valuemin={0}
              aria-valuemax={Math.max(1, row.memory)}
              aria-valuenow={row.granted}
              aria-valuetext={trans.__(
                '%1 of %2',
                size(row.granted, trans),
                exactly(row.memory, trans)
              )}
            >
              <span
                className="jp-GPUPool-used"
                style={{ width: `${row.memory > 0 ? (100 * row.granted) / row.memory : 0}%` }}
              />
            </span>
            <span>{share(row.memory > 0 ? row.granted / row.memory : 0)}</span>
          </span>
        )
      },
      {
        id: 'free',
        title: trans.__('Free'),
        width: '90px',
        isFigure: true,
        value: row => row.free,
        render: row => size(row.free, trans)
      },
      {
        id: 'used',
        title: trans.__('Used'),
        width: '90px',
        isFigure: true,
        value: row => row.used,
        render: row => size(row.used, trans)
      },
      {
        id: 'busy',
        title: trans.__('Busy'),
        width: '70px',
        isFigure: true,
        value: row => row.busy,
        render: row => share(row.busy)
      },
      {
        id: 'leases',
        title: trans.__('Slices'),
        width: '70px',
        isFigure: true,
        value: row => row.leases
      }
    ];
  }, [trans]);
  return (
    <div className="jp-GPUPoolConsole-overview">
      <SummaryTiles state={state} trans={trans} />
      <section className="jp-GPUPoolConsole-card" aria-label={trans.__('The pool over time')}>
        <React.Suspense fallback={<p>{trans.__('Reading the history…')}</p>}>
          <Chart {...props} slices={NAMES} height={240} range={range} onRange={setRange} />
        </React.Suspense>
      </section>
      <section aria-label={trans.__('GPU servers')} className="jp-GPUPoolConsole-card">
        <h2>{trans.__('GPU servers')}</h2>
        <Table
          label={trans.__('GPU servers')}
          trans={trans}
          rows={rows}
          columns={columns}
          keyOf={row => row.server.name}
          sortedBy="name"
          actionsWidth="100px"
          actions={
            who?.administers
              ? row => (
                  <Button
                    className="jp-mod-small"
                    aria-label={
                      row.server.draining
                        ? trans.__('Use again: %1', row.server.name)
                        : trans.__('Drain: %1', row.server.name)
                    }
                    onClick={() => drain(row)}
                  >
                    {row.server.draining ? trans.__('Use again…') : trans.__('Drain…')}
                  </Button>
                )
              : undefined
          }
          empty={
            <Empty title={trans.__('The pool has no GPU server.')}>
              <p>
                {trans.__(
                  'It is there as soon as one starts; without NVIDIA hardware, gpupool server --emulate offers emulated GPUs.'
                )}
              </p>
            </Empty>
          }
        />
      </section>
      <Health {...props} health={health} />
      {draining && (
        <Drain
          adminAPI={adminAPI}
          server={draining.server}
          slices={draining.leases}
          trans={trans}
          onClose={() => drain(null)}
        />
      )}
    </div>
  );
}

function Health({
  health,
  trans
}: IConsoleProps & { health: IRequestResult<IHealth> }): JSX.Element {
  return (
    <section aria-label={trans.__('Health')} className="jp-GPUPoolConsole-card">
      <div className="jp-GPUPoolConsole-cardHead">
        <h2>{trans.__('Health')}</h2>
        {health.answer && (
          <Badge tone={toneOf(health.answer.status)}>{wordOf(health.answer.status)}</Badge>
        )}
        <Button className="jp-mod-small" onClick={health.again}>
          {trans.__('Check now')}
        </Button>
      </div>
      <RequestResult asked={health} wait={trans.__('Checking the pool…')}>
        {({ checks }) => (
          <ul className="jp-GPUPoolConsole-checks">
            {[...checks]
              .sort((a, b) => rank(b) - rank(a))
              .map((check, n) => (
                <Check key={`${check.name} ${check.server} ${check.gpu} ${n}`} check={check} />
              ))}
          </ul>
        )}
      </RequestResult>
    </section>
  );

  function wordOf(status: string): string {
    switch (status) {
      case 'ok':
        return trans.__('ok');
      case 'warning':
        return trans.__('warning');
      case 'failing':
        return trans.__('failing');
      default:
        return trans.__('unknown');
    }
  }

  function Check({ check }: { check: ICheck }): JSX.Element {
    const status = statusOf(check);
    const figure = (value: number) =>
      `${value.toLocaleString(undefined, { maximumFractionDigits: 2 })} ${check.unit ?? ''}`.trim();
    return (
      <li>
        <Badge tone={toneOf(status)}>{wordOf(status)}</Badge>
        <span className="jp-GPUPoolConsole-checkName">
          {[check.name, check.server].filter(Boolean).join(' · ')}
        </span>
        <span>
          {check.detail}
          {typeof check.value === 'number' && typeof check.threshold === 'number' && (
            <span className="jp-GPUPoolConsole-figures">
              {' '}
              {check.bound === 'at least'
                ? trans.__('(%1; at least %2)', figure(check.value), figure(check.threshold))
                : trans.__('(%1; at most %2)', figure(check.value), figure(check.threshold))}
            </span>
          )}
          {check.advice && status !== 'ok' && (
            <span className="jp-GPUPoolConsole-advice">{check.advice}</span>
          )}
        </span>
      </li>
    );
  }
}

const RANKS = ['ok', 'unknown', 'warning', 'failing'];

function rank(check: ICheck): number {
  return RANKS.indexOf(statusOf(check));
}

function statusOf(check: ICheck): string {
  return check.status ?? (check.ok ? 'ok' : 'failing');
}

function toneOf(status: string): Tone {
  switch (status) {
    case 'ok':
      return 'good';
    case 'warning':
      return 'wait';
    case 'failing':
      return 'bad';
    default:
      return 'plain';
  }
}

function rowOf(server: IServer, all: Readonly<Record<string, IGPU>>): IRow {
  const gpus = server.gpus.map(uuid => all[uuid]).filter(gpu => gpu !== undefined);
  const sum = (of: (gpu: IGPU) => number) => gpus.reduce((total, gpu) => total + of(gpu), 0);
  return {
    server,
    gpus,
    memory: sum(gpu => gpu.memory_mib),
    granted: sum(gpu => gpu.granted_mib),
    used: sum(gpu => gpu.used_mib),
    free: sum(freeOf),
    busy: gpus.length > 0 ? sum(gpu => gpu.busy) / gpus.length : 0,
    leases: sum(gpu => gpu.slices.length),
    sick: sum(gpu => (gpu.healthy ? 0 : 1))
  };
}

/** `2 × Tesla V100` */
function kinds(gpus: readonly IGPU[]): string {
  const counts = new Map<string, number>();
  for (const gpu of gpus) {
    const name = gpu.name.replace(/ *\(emulated\)$/, '');
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  return [...counts].map(([name, count]) => `${count} × ${name}`).join(', ');
}
