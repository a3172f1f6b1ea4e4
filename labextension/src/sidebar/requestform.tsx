/** The form that requests GPUs: how many, how much of each, and whether they are free now. */

import { TranslationBundle } from '@jupyterlab/translation';
import { Button, HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { exactly, share } from '../common/format';
import type { IActiveNotebook } from '../tokens';
import {
  filtersAsText,
  filtersFromText,
  Memory,
  otherFilters,
  requestFromChoice
} from '../leases/gpurequest';
import { IPoolState, shareOf } from '../pool/state';
import { IForecast, IGPU, IGPURequest } from '../pool/apitypes';
import { WANTED_GPUS } from '../pool/openapi';

/** How long a choice has to rest before it is asked about, in milliseconds. */
const REST_MS = 150;

export interface IRequestFormProps extends IViewProps {
  /** The notebook has what it was to have, or waits for it. */
  onDone?: () => void;
}

export function RequestForm(props: IRequestFormProps): JSX.Element {
  useActiveNotebook(props.slices.activeNotebook);
  // Another notebook, another choice: what it remembers, if it does.
  const { name, isReady } = props.slices.activeNotebook;
  return <RequestFields key={`${isReady} ${name ?? ''}`} {...props} />;
}

function RequestFields({ state, pool, slices, trans, onDone }: IRequestFormProps): JSX.Element {
  const { activeNotebook, actions, preferences } = slices;
  const { numGpus, partial: usual } = preferences.choices;
  // What the notebook asks for, as it was when the form was made; what the user does not touch stays as it is there.
  const [kept] = React.useState(() => activeNotebook.wish);
  const [count, setCount] = React.useState(kept?.num_gpus ?? numGpus);
  const [inMib, setInMib] = React.useState(kept?.memory_mib !== undefined);
  const [text, setText] = React.useState(() =>
    String(kept ? (kept.memory_mib ?? kept.partial ?? 1) : usual)
  );
  // Null: the filters that the notebook asks for, and no others.
  const [filters, setFilters] = React.useState<string | null>(null);
  const [model, setModel] = React.useState(kept?.filters?.name ?? '');
  const [spread, setSpread] = React.useState(kept?.spread ?? false);
  const [remember, setRemember] = React.useState(kept !== null);
  const [trouble, setTrouble] = React.useState('');
  const [asking, setAsking] = React.useState(false);
  const id = React.useId();

  const models = React.useMemo(() => modelsOf(state.gpus, kept?.filters?.name), [state.gpus, kept]);
  const most = Math.max(
    1,
    spread
      ? Object.keys(state.gpus).length
      : Math.max(0, ...state.servers.map(server => server.gpus.length))
  );
  const amount = Number(text) || 0; // the pool's forecast says if it makes no sense
  const memory: Memory = inMib ? { memory_mib: amount } : { partial: amount };
  const wish = requestFromChoice({
    numGpus: count,
    memory,
    model,
    filters: filters === null ? otherFilters(kept) : filtersFromText(filters),
    spread,
    neverPark: kept?.never_park ?? false
  });
  const sizes = sizesOf(wish, state);
  const smallest = Math.min(...allowed(wish, state).map(gpu => gpu.memory_mib));
  const mibOf = (part: number) => (Number.isFinite(smallest) ? shareOf(smallest, part) : 0);
  const partial = inMib ? Math.min(1, amount / smallest) : amount;
  const others = filtersAsText(otherFilters(kept));
  const forecast = useForecast({ state, pool, wish });
  const { name, kernel } = activeNotebook;
  const mine = Object.values(state.leases).find(
    lease => kernel !== null && lease.request.client.endsWith(` kernel:${kernel}`)
  );

  const attach = async () => {
    if (kernel === null) {
      return;
    }
    setTrouble('');
    setAsking(true);
    try {
      const line = await actions.attach(kernel, wish);
      setTrouble(line);
      if (remember) {
        activeNotebook.remember(wish);
      } else if (activeNotebook.wish) {
        activeNotebook.forget();
      }
      if (!line) {
        onDone?.();
      }
    } catch (reason) {
      setTrouble(String(reason));
    } finally {
      setAsking(false);
    }
  };

  return (
    <section aria-label={trans.__('Request GPUs')} className="jp-GPUPool-picker">
      <h3>{trans.__('Request GPUs')}</h3>
      <form
        noValidate // what is wrong the pool says, in words
        onSubmit={event => {
          event.preventDefault();
          void attach();
        }}
      >
        <div className="jp-GPUPool-field">
          <label htmlFor={`${id}-count`}>{trans.__('GPUs')}</label>
          <span className="jp-GPUPool-stepper">
            <Button
              type="button"
              className="jp-mod-styled"
              small
              aria-label={trans.__('One GPU fewer')}
              disabled={count <= WANTED_GPUS.num_gpus.minimum}
              onClick={() => setCount(count - 1)}
            >
              −
            </Button>
            <input
              id={`${id}-count`}
              className="jp-mod-styled"
              type="number"
              min={WANTED_GPUS.num_gpus.minimum}
              max={most}
              value={count}
              onChange={event => setCount(whole(event.target.value))}
            />
            <Button
              type="button"
              className="jp-mod-styled"
              small
              aria-label={trans.__('One GPU more')}
              disabled={count >= most}
              onClick={() => setCount(count + 1)}
            >
              +
            </Button>
          </span>
        </div>
        <div className="jp-GPUPool-field jp-GPUPool-memory">
          <label htmlFor={`${id}-share`}>{trans.__('of each')}</label>
          <input
            type="range"
            min={0.05}
            max={1}
            step={0.05}
            value={partial}
            aria-label={trans.__('Share of each GPU')}
            aria-valuetext={inMib ? exactly(amount, trans) : share(partial)}
            onChange={event =>
              setText(inMib ? String(mibOf(Number(event.target.value))) : event.target.value)
            }
          />
          <span className="jp-GPUPool-amount">
            <input
              id={`${id}-share`}
              className="jp-mod-styled"
              type="number"
              min={inMib ? WANTED_GPUS.memory_mib.minimum : 0.01}
              max={inMib ? undefined : WANTED_GPUS.partial.maximum}
              step={inMib ? 1 : 0.01}
              value={text}
              onChange={event => setText(event.target.value)}
            />
            <HTMLSelect
              aria-label={trans.__('Unit of the memory')}
              value={inMib ? 'MiB' : 'fraction'}
              onChange={event => {
                const toMib = event.target.value === 'MiB';
                setText(String(toMib ? mibOf(partial) : Math.round(100 * partial) / 100));
                setInMib(toMib);
              }}
            >
              <option value="fraction">{trans.__('fraction')}</option>
              <option value="MiB">{trans.__('MiB')}</option>
            </HTMLSelect>
          </span>
        </div>
        {models.length > 1 && (
          <div className="jp-GPUPool-field">
            <label htmlFor={`${id}-model`}>{trans.__('model')}</label>
            <HTMLSelect
              id={`${id}-model`}
              value={model}
              onChange={event => setModel(event.target.value)}
            >
              <option value="">{trans.__('any')}</option>
              {models.map(name => (
                <option key={name} value={name}>
                  {name}
                </option>
              ))}
            </HTMLSelect>
          </div>
        )}
        {(state.servers.length > 1 || kept?.spread) && (
          <label className="jp-GPUPool-check">
            <input
              type="checkbox"
              checked={spread}
              onChange={event => setSpread(event.target.checked)}
            />
            {trans.__('Allow GPUs from several servers')}
          </label>
        )}
        <details className="jp-GPUPool-filters" open={others !== '' ? true : undefined}>
          <summary>{trans.__('Filters')}</summary>
          <input
            className="jp-mod-styled"
            type="text"
            aria-label={trans.__('Filters')}
            placeholder="server=gpu-1, emulated=false"
            value={filters ?? others}
            onChange={event => setFilters(event.target.value)}
          />
        </details>
        <p className="jp-GPUPool-figures">{meaning(wish, sizes, trans)}</p>
        {!mine && (
          <p
            role="status"
            className={`jp-GPUPool-forecast jp-mod-${forecast?.outcome ?? 'unknown'}`}
          >
            {forecast ? told(forecast, trans) : trans.__('Checking the pool…')}
          </p>
        )}
        {activeNotebook.remembers && (
          <label className="jp-GPUPool-check">
            <input
              type="checkbox"
              checked={remember}
              onChange={event => setRemember(event.target.checked)}
            />
            {trans.__('Remember in the notebook')}
          </label>
        )}
        <Button
          type="submit"
          className="jp-mod-styled jp-mod-accept"
          disabled={
            kernel === null ||
            asking ||
            mine !== undefined ||
            (forecast !== null && forecast.outcome === 'impossible')
          }
        >
          {name === null
            ? trans.__('Attach')
            : forecast?.outcome === 'queued' && !mine
              ? trans.__('Queue for %1', name)
              : trans.__('Attach to %1', name)}
        </Button>
        <p role="status" className="jp-GPUPool-hint">
          {hint()}
        </p>
        {trouble && (
          <p role="alert" className="jp-GPUPool-trouble">
            {trouble}
          </p>
        )}
      </form>
    </section>
  );

  function hint(): string {
    if (asking) {
      return activeNotebook.isBusy
        ? trans.__('Waiting for the running cell to finish…')
        : trans.__('Attaching…');
    }
    if (name === null) {
      return trans.__('Open a notebook to attach GPUs to it.');
    }
    if (kernel === null) {
      return trans.__('%1 has no running kernel. Start one to attach GPUs to it.', name);
    }
    if (mine) {
      return mine.state === 'QUEUED'
        ? trans.__('%1 already has a request in the queue.', name)
        : trans.__('%1 already has GPU slices. Resize or release them below.', name);
    }
    return '';
  }
}

/** The GPUs whose model a request allows. */
function allowed(wish: IGPURequest, state: IPoolState): IGPU[] {
  const model = wish.filters?.name ?? '';
  return Object.values(state.gpus).filter(
    gpu => gpu.healthy && gpu.memory_mib > 0 && gpu.name.includes(model)
  );
}

/** The MiB of each GPU that a request may come to, by GPU. */
function sizesOf(wish: IGPURequest, state: IPoolState): number[] {
  return allowed(wish, state).map(
    gpu => wish.memory_mib ?? shareOf(gpu.memory_mib, wish.partial ?? 1)
  );
}

/** What a choice means on this pool, in MiB. */
function meaning(wish: IGPURequest, sizes: readonly number[], trans: TranslationBundle): string {
  if (sizes.length === 0) {
    return '';
  }
  const least = Math.min(...sizes);
  const largest = Math.max(...sizes);
  return least === largest
    ? trans.__('%1 × %2', wish.num_gpus, exactly(least, trans))
    : trans.__(
        '%1 × %2 to %3, by GPU',
        wish.num_gpus,
        exactly(least, trans),
        exactly(largest, trans)
      );
}

function told(forecast: IForecast, trans: TranslationBundle): string {
  switch (forecast.outcome) {
    case 'granted':
      return trans.__('Free now');
    case 'queued':
      return trans.__(
        'Not free now: the request would be queued at position %1',
        forecast.position ?? '…'
      );
    default:
      return forecast.reason;
  }
}

interface IAsked extends Pick<IViewProps, 'state' | 'pool'> {
  wish: IGPURequest;
}

/** What the wish would come to now; asked again when the choice or what is free changes. Null while it is not known. */
function useForecast({ state, pool, wish }: IAsked): IForecast | null {
  const [answer, setAnswer] = React.useState<{ key: string; forecast: IForecast } | null>(null);
  const key = JSON.stringify(wish);
  // What it depends on: what is granted, and who waits; not what computes.
  const granted = React.useMemo(
    () => Object.values(state.gpus).reduce((sum, gpu) => `${sum},${gpu.granted_mib}`, ''),
    [state.gpus]
  );
  React.useEffect(() => {
    let over = false;
    const timer = setTimeout(async () => {
      let forecast: IForecast;
      try {
        forecast = await pool.api.forecast(JSON.parse(key) as IGPURequest);
      } catch (reason) {
        forecast = {
          outcome: 'impossible',
          position: null,
          slices: [],
          reason: (reason as Error).message
        };
      }
      if (!over) {
        setAnswer({ key, forecast });
      }
    }, REST_MS);
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [key, granted, state.queue, state.servers, pool]);
  return answer && answer.key === key ? answer.forecast : null;
}

/** Again whenever another notebook is active. */
function useActiveNotebook(activeNotebook: IActiveNotebook): void {
  const [, again] = React.useReducer((seen: number) => seen + 1, 0);
  React.useEffect(() => {
    activeNotebook.changed.connect(again);
    return () => {
      activeNotebook.changed.disconnect(again);
    };
  }, [activeNotebook]);
}

/** The pool's models, and the one that the notebook asks for in its own words. */
function modelsOf(gpus: IPoolState['gpus'], asked: string | undefined): string[] {
  const names = new Set(Object.values(gpus).map(gpu => gpu.name));
  return [...(asked ? names.add(asked) : names)].sort();
}

function whole(text: string): number {
  return Math.max(1, Math.floor(Number(text)) || 1);
}
