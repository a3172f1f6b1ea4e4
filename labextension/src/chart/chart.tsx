/** The pool over time: what is granted, used and computing of its capacity. */

import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';

import { Actions } from '../actions';
import { IViewProps } from '../context';
import { exactly, moment, share, size } from '../format';
import { ISeries } from '../series';
import { ILease } from '../wire';
import { drawn, holders, latest, Range, RANGES, rows } from './columns';
import type { Drawing } from './draw';
import { usePast, useSeries } from './load';

export interface IChartProps extends Omit<IViewProps, 'slices'> {
  /** What names a lease. */
  slices: { actions: Pick<Actions, 'nameOf'> };
  /** In pixels. */
  height?: number;
  range: Range;
  onRange: (range: Range) => void;
}

const TABLE_ROWS = 24;

export function Chart(props: IChartProps): JSX.Element {
  const { pool, state, trans, range, onRange, height = 132 } = props;
  const [gpu, setGPU] = React.useState<string | null>(null);
  const chosen = gpu !== null && state.gpus[gpu] ? gpu : null;
  const { series, trouble, again } = useSeries(pool, state, range, chosen);
  const [at, point] = React.useState<number | null>(null);
  const [tableOpen, openTable] = React.useState(false);
  const now = series ? latest(series) : -1;
  // What is pointed at may have left the chart meanwhile.
  const found = series && at !== null ? series.times.indexOf(at) : -1;
  const n = found >= 0 ? found : now;
  const past = usePast(pool, at !== null);
  const ranges: [Range, string][] = [
    ['5m', trans.__('5 min')],
    ['1h', trans.__('1 h')],
    ['24h', trans.__('24 h')],
    ['7d', trans.__('7 d')]
  ];
  return (
    <section aria-label={trans.__('Use over time')} className="jp-GPUPool-chart">
      <div className="jp-GPUPool-chartHead">
        <div role="group" aria-label={trans.__('How far back')} className="jp-GPUPool-ranges">
          {ranges.map(([value, label]) => (
            <button
              key={value}
              type="button"
              aria-pressed={value === range}
              onClick={() => onRange(value)}
            >
              {label}
            </button>
          ))}
        </div>
        <GPUChoice {...props} chosen={chosen} onChoose={setGPU} />
      </div>
      {trouble ? (
        <p role="alert" className="jp-GPUPool-trouble">
          {trans.__('The history cannot be read: %1', trouble)}{' '}
          <button type="button" className="jp-GPUPool-link" onClick={again}>
            {trans.__('Try now')}
          </button>
        </p>
      ) : (
        <Canvas
          {...props}
          height={height}
          series={series}
          n={n}
          pointed={found >= 0}
          onPoint={index => point(index === null || !series ? null : series.times[index])}
          gpu={chosen}
          past={past}
        />
      )}
      <Legend series={series} n={n} pointed={found >= 0} trans={trans} />
      <details className="jp-GPUPool-table" onToggle={event => openTable(event.currentTarget.open)}>
        <summary>{trans.__('As a table')}</summary>
        {tableOpen && series && <Table series={series} trans={trans} />}
      </details>
    </section>
  );
}

interface ICanvas extends IChartProps {
  height: number;
  series: ISeries | null;
  /** The slot that is told of; -1 for none. */
  n: number;
  pointed: boolean;
  onPoint: (n: number | null) => void;
  gpu: string | null;
  past: readonly ILease[];
}

/** The drawing: a slider over time for the keyboard and for screen readers. */
function Canvas(props: ICanvas): JSX.Element {
  const { series, n, pointed, onPoint, trans, height, range, state } = props;
  const node = React.useRef<HTMLDivElement>(null);
  const [drawing, setDrawing] = React.useState<Drawing | null>(null);
  const report = React.useRef(onPoint);
  React.useEffect(() => {
    report.current = onPoint;
  });
  const { span, step } = RANGES[range];

  React.useEffect(() => {
    let made: Drawing | null = null;
    let over = false;
    void import('./draw').then(({ Drawing }) => {
      if (node.current && !over) {
        made = new Drawing(node.current, {
          height,
          time: at => tick(at, span),
          percent: value => share(value / 100),
          onPoint: index => report.current(index)
        });
        setDrawing(made);
      }
    });
    return () => {
      over = true;
      made?.dispose();
      setDrawing(null);
    };
  }, [height, span]);

  React.useEffect(() => {
    if (drawing && series) {
      const end = Math.max(state.at, series.times[series.times.length - 1] ?? 0);
      drawing.show(drawn(series), end - span, end);
    }
  }, [drawing, series, span, state.at]);

  const measured = series ? series.times.map((_, m) => m).filter(m => series.busy[m] !== null) : [];
  const move = (event: React.KeyboardEvent) => {
    const place = measured.indexOf(n);
    const last = measured.length - 1;
    const goal = {
      ArrowLeft: place - 1,
      ArrowRight: place + 1,
      PageUp: place - 10,
      PageDown: place + 10,
      Home: 0,
      End: last
    }[event.key];
    if (event.key === 'Escape' && pointed) {
      onPoint(null);
      drawing?.point(null);
    } else if (goal !== undefined && last >= 0) {
      const to = measured[Math.min(last, Math.max(0, goal))];
      onPoint(to);
      drawing?.point(to);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  };

  const told = series && n >= 0 ? story(props, series, n) : [];
  const empty = series !== null && measured.length === 0;
  return (
    <div className="jp-GPUPool-canvas" style={{ height }}>
      <div
        ref={node}
        className="jp-GPUPool-plot"
        role="slider"
        tabIndex={0}
        aria-label={trans.__('Use of the pool over time; the arrow keys move through it')}
        aria-orientation="horizontal"
        aria-valuemin={0}
        aria-valuemax={Math.max(0, measured.length - 1)}
        aria-valuenow={Math.max(0, measured.indexOf(n))}
        aria-valuetext={
          series && n >= 0
            ? [moment(series.times[n]), ...figures(series, n, trans), ...told].join('; ')
            : trans.__('nothing measured')
        }
        onKeyDown={move}
        onBlur={() => {
          onPoint(null);
          drawing?.point(null);
        }}
      />
      {empty && <p className="jp-GPUPool-none">{trans.__('Nothing was measured in this time.')}</p>}
      {series && pointed && drawing && (
        <div className="jp-GPUPool-tip" style={drawing.beside(n)}>
          <strong>{step < 60 ? moment(series.times[n]) : tick(series.times[n], span, true)}</strong>
          {told.map((line, m) => (
            <div key={m}>{line}</div>
          ))}
        </div>
      )}
    </div>
  );
}

/** Who held what in a slot, a line each; no more than fit. */
function story(props: ICanvas, series: ISeries, n: number): string[] {
  const { state, past, slices, trans, gpu } = props;
  const leases = new Map(past.map(lease => [lease.id, lease]));
  Object.values(state.leases).forEach(lease => leases.set(lease.id, lease));
  state.ended.forEach(lease => leases.set(lease.id, lease));
  const { held, untold } = holders(series, n, leases.values(), gpu);
  const lines = held
    .slice(0, 3)
    .map(({ lease, mib }) =>
      trans.__(
        '%1 · %2: %3',
        lease.request.owner,
        slices.actions.nameOf(lease),
        size(Math.round(mib), trans)
      )
    );
  if (held.length > 3) {
    lines.push(trans._n('and %1 more', 'and %1 more', held.length - 3));
  }
  if (untold > 0) {
    lines.push(trans.__('holder not told: %1', size(Math.round(untold), trans)));
  }
  return lines.length > 0 ? lines : [trans.__('nothing held')];
}

type Trans = IViewProps['trans'];

/** `granted 80 %, 50.8 GiB`, `used …`, `busy …` */
function figures(series: ISeries, n: number, trans: Trans): string[] {
  const of = (column: (number | null)[]) => amount(series, column, n, trans);
  return [
    trans.__('granted %1', of(series.granted_mib)),
    trans.__('used %1', of(series.used_mib)),
    trans.__('busy %1', series.busy[n] === null ? '–' : share(series.busy[n] ?? 0))
  ];
}

/** A share of the memory and what it comes to; GPUs that do not tell their memory have no share. */
function amount(series: ISeries, column: (number | null)[], n: number, trans: Trans): string {
  const value = column[n] ?? null;
  const whole = series.memory_mib[n] ?? 0;
  if (value === null) {
    return '–';
  }
  const told = size(Math.round(value), trans);
  return whole > 0 ? trans.__('%1 · %2', share(value / whole), told) : told;
}

interface ILegend {
  series: ISeries | null;
  n: number;
  pointed: boolean;
  trans: Trans;
}

/** What the colours mean, and their values: at what is pointed at, else now. */
function Legend({ series, n, trans }: ILegend): JSX.Element {
  const of = (column?: (number | null)[]) =>
    series && column && n >= 0 ? amount(series, column, n, trans) : '–';
  const busy = series && n >= 0 ? series.busy[n] : null;
  const capacity = series && n >= 0 ? series.memory_mib[n] : null;
  return (
    <dl className="jp-GPUPool-legend">
      <Mark name="granted" label={trans.__('granted')} value={of(series?.granted_mib)} />
      <Mark name="used" label={trans.__('used')} value={of(series?.used_mib)} />
      <Mark
        name="busy"
        label={trans.__('busy')}
        value={busy === null || busy === undefined ? '–' : share(busy)}
      />
      <Mark
        label={trans.__('capacity')}
        value={capacity ? size(Math.round(capacity), trans) : trans.__('not told')}
      />
    </dl>
  );
}

function Mark({ name, label, value }: { name?: string; label: string; value: string }) {
  return (
    <div>
      <dt>
        <span aria-hidden="true" className={`jp-GPUPool-mark jp-mod-${name ?? 'none'}`} />
        {label}
      </dt>
      <dd>{value}</dd>
    </div>
  );
}

/** The same in figures. */
function Table({ series, trans }: { series: ISeries; trans: Trans }): JSX.Element {
  const memory = (value: number | null) =>
    value === null ? '–' : exactly(Math.round(value), trans);
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">{trans.__('from')}</th>
          <th scope="col">{trans.__('granted')}</th>
          <th scope="col">{trans.__('used')}</th>
          <th scope="col">{trans.__('busy')}</th>
        </tr>
      </thead>
      <tbody>
        {rows(series, TABLE_ROWS).map(n => (
          <tr key={series.times[n]}>
            <th scope="row">{moment(series.times[n])}</th>
            <td>{memory(series.granted_mib[n])}</td>
            <td>{memory(series.used_mib[n])}</td>
            <td>{share(series.busy[n] ?? 0)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

interface IGPUChoice extends IChartProps {
  chosen: string | null;
  onChoose: (gpu: string | null) => void;
}

/** The whole pool, or one GPU. */
const GPUChoice = React.memo(
  function GPUChoice({ state, trans, chosen, onChoose }: IGPUChoice): JSX.Element {
    return (
      <HTMLSelect
        aria-label={trans.__('Which GPU')}
        value={chosen ?? ''}
        onChange={event => onChoose(event.target.value || null)}
      >
        <option value="">{trans.__('whole pool')}</option>
        {state.servers.map(server => (
          <optgroup key={server.name} label={server.name}>
            {server.gpus
              .filter(uuid => state.gpus[uuid])
              .map(uuid => (
                <option key={uuid} value={uuid}>
                  {trans.__('GPU %1', state.gpus[uuid].index)}
                </option>
              ))}
          </optgroup>
        ))}
      </HTMLSelect>
    );
  },
  (a, b) => a.state.servers === b.state.servers && a.chosen === b.chosen && a.trans === b.trans
);

/** A moment as an axis has room for it: the hour within a day, else the day; both where `whole`. */
function tick(at: number, span: number, whole = false): string {
  const date = new Date(at * 1000);
  if (whole) {
    return date.toLocaleString(undefined, { dateStyle: 'short', timeStyle: 'short' });
  }
  return span > 86400
    ? date.toLocaleDateString(undefined, { day: 'numeric', month: 'numeric' })
    : date.toLocaleTimeString(undefined, { hour: '2-digit', minute: '2-digit' });
}
