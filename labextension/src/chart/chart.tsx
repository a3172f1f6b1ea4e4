/** The pool over time: granted memory, used memory and busy GPUs. */

import { HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';

import { Actions } from '../leases/actions';
import { IViewProps } from '../common/viewcontext';
import { age, exactly, moment, share, size } from '../common/format';
import { ISample, ISeries } from './series';
import { ILease } from '../pool/apitypes';
import { drawn, holders, latest, Range, RANGES, rows, sampleAt, sampleOf } from './data';
import type { ChartCanvas } from './canvas';
import { usePast, useSeries } from './history';

export interface IChartProps extends Omit<IViewProps, 'slices'> {
  /** Returns the name of a lease. */
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
  // The slot that was pointed at may have left the chart.
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
            {trans.__('Retry now')}
          </button>
        </p>
      ) : (
        <Canvas
          {...props}
          height={height}
          series={series}
          n={n}
          pointed={found >= 0}
          onPoint={index => point(index === null ? null : (series?.times[index] ?? null))}
          gpu={chosen}
          past={past}
        />
      )}
      <Legend
        sample={series && found >= 0 ? sampleAt(series, found) : sampleOf(state, chosen)}
        step={found >= 0 ? RANGES[range].step : null}
        trans={trans}
      />
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
  /** The slot that is described; -1 for none. */
  n: number;
  pointed: boolean;
  onPoint: (n: number | null) => void;
  gpu: string | null;
  past: readonly ILease[];
}

/** The drawing, which is a slider over time for keyboards and screen readers. */
function Canvas(props: ICanvas): JSX.Element {
  const { series, n, pointed, onPoint, trans, height, range, state } = props;
  const node = React.useRef<HTMLDivElement>(null);
  const [drawing, setDrawing] = React.useState<ChartCanvas | null>(null);
  const report = React.useRef(onPoint);
  React.useEffect(() => {
    report.current = onPoint;
  });
  const { span, step } = RANGES[range];

  React.useEffect(() => {
    let made: ChartCanvas | null = null;
    let over = false;
    void import('./canvas').then(({ ChartCanvas }) => {
      if (node.current && !over) {
        made = new ChartCanvas(node.current, {
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
    if (drawing) {
      // Before there is any history the axis is that of now, not of 1970.
      const end = Math.max(state.at, series?.times[series.times.length - 1] ?? 0);
      drawing.show(series ? drawn(series) : [[], [], [], []], end - span, end);
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
    const to = goal === undefined ? undefined : measured[Math.max(0, Math.min(last, goal))];
    if (event.key === 'Escape' && pointed) {
      onPoint(null);
      drawing?.point(null);
    } else if (to !== undefined) {
      onPoint(to);
      drawing?.point(to);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  };

  const at = series?.times[n];
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
          series && at !== undefined
            ? [moment(at), ...figures(series, n, trans), ...told].join('; ')
            : trans.__('nothing measured')
        }
        onKeyDown={move}
        onBlur={() => {
          onPoint(null);
          drawing?.point(null);
        }}
      />
      {empty && <p className="jp-GPUPool-none">{trans.__('Nothing was measured in this time.')}</p>}
      {at !== undefined && pointed && drawing && (
        <div className="jp-GPUPool-tip" style={drawing.beside(n)}>
          <strong>{step < 60 ? moment(at) : tick(at, span, true)}</strong>
          {told.map((line, m) => (
            <div key={m}>{line}</div>
          ))}
        </div>
      )}
    </div>
  );
}

/** One line for each holder in a slot, as many as fit. */
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
    lines.push(trans.__('unknown holder: %1', size(Math.round(untold), trans)));
  }
  return lines.length > 0 ? lines : [trans.__('nothing held')];
}

type Trans = IViewProps['trans'];

/** `granted 80 %, 50.8 GiB`, `used …`, `busy …` */
function figures(series: ISeries, n: number, trans: Trans): string[] {
  const of = (column: (number | null)[]) =>
    amount(column[n] ?? null, series.memory_mib[n] ?? 0, trans);
  return [
    trans.__('granted %1', of(series.granted_mib)),
    trans.__('used %1', of(series.used_mib)),
    trans.__('busy %1', series.busy[n] === null ? '–' : share(series.busy[n] ?? 0))
  ];
}

/** A share of the memory, and its size. GPUs whose memory is unknown have no share. */
function amount(value: number | null, whole: number, trans: Trans): string {
  if (value === null) {
    return '–';
  }
  const told = size(Math.round(value), trans);
  return whole > 0 ? trans.__('%1 · %2', share(value / whole), told) : told;
}

interface ILegend {
  /** The values shown; null if nothing was measured. */
  sample: ISample | null;
  /** The length in seconds of the slot whose mean is shown; null for the present values. */
  step: number | null;
  trans: Trans;
}

/** The legend with values: the mean of the slot that is pointed at, else the present values. */
function Legend({ sample, step, trans }: ILegend): JSX.Element {
  const of = (value?: number | null) => amount(value ?? null, sample?.memory_mib ?? 0, trans);
  return (
    <dl className="jp-GPUPool-legend">
      <div>
        <dt>{step === null ? trans.__('Now') : trans.__('At %1', moment(sample?.at ?? 0))}</dt>
        <dd>{step !== null && trans.__('mean of %1', age(step, trans))}</dd>
      </div>
      <Mark name="granted" label={trans.__('granted')} value={of(sample?.granted_mib)} />
      <Mark name="used" label={trans.__('used')} value={of(sample?.used_mib)} />
      <Mark name="busy" label={trans.__('busy')} value={sample ? share(sample.busy) : '–'} />
      <Mark
        label={trans.__('capacity')}
        value={
          sample?.memory_mib ? size(Math.round(sample.memory_mib), trans) : trans.__('unknown')
        }
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

/** The chart's values as a table. */
function Table({ series, trans }: { series: ISeries; trans: Trans }): JSX.Element {
  const memory = (value: number | null = null) =>
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
            <th scope="row">{moment(series.times[n] ?? 0)}</th>
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

/** The choice between the whole pool and one GPU. */
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
              .map(uuid => state.gpus[uuid])
              .filter(gpu => gpu !== undefined)
              .map(({ uuid, index }) => (
                <option key={uuid} value={uuid}>
                  {trans.__('GPU %1', index)}
                </option>
              ))}
          </optgroup>
        ))}
      </HTMLSelect>
    );
  },
  (a, b) => a.state.servers === b.state.servers && a.chosen === b.chosen && a.trans === b.trans
);

/** A short label of a time: the time of day within a day, else the day; both if `whole`. */
function tick(at: number, span: number, whole = false): string {
  const date = new Date(at * 1000);
  if (whole) {
    return date.toLocaleString(undefined, { dateStyle: 'short', timeStyle: 'short' });
  }
  return span > 86400
    ? date.toLocaleDateString(undefined, { day: 'numeric', month: 'numeric' })
    : date.toLocaleTimeString(undefined, { hour: '2-digit', minute: '2-digit' });
}
