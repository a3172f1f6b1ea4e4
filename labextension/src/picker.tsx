/** Where slices are asked for: how many GPUs, how much of each, and what that would come to now. */

import { TranslationBundle } from '@jupyterlab/translation';
import { Button, HTMLSelect } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IForecast, IWish } from './api';
import { IViewProps } from './context';
import { exactly, share } from './format';
import { Front } from './front';
import { IPoolState, shareOf } from './state';

/** How long a choice has to rest before it is asked about, in milliseconds. */
const REST_MS = 150;

export interface IPickerProps extends IViewProps {
  /** The notebook has what it was to have, or waits for it. */
  onDone?: () => void;
}

export function Picker(props: IPickerProps): JSX.Element {
  useFront(props.slices.front);
  // Another notebook, another choice: what it remembers, if it does.
  const { name, isReady } = props.slices.front;
  return <Choice key={`${isReady} ${name ?? ''}`} {...props} />;
}

function Choice({ state, pool, slices, trans, onDone }: IPickerProps): JSX.Element {
  const { front, actions, preferences } = slices;
  const { numGpus, partial: usual } = preferences.choices;
  const [count, setCount] = React.useState(() => front.wish?.num_gpus ?? numGpus);
  const [text, setText] = React.useState(() => String(front.wish?.partial ?? usual));
  const [model, setModel] = React.useState(() => front.wish?.filters?.name ?? '');
  const [remember, setRemember] = React.useState(() => front.wish !== null);
  const [trouble, setTrouble] = React.useState('');
  const [asking, setAsking] = React.useState(false);
  const id = React.useId();

  const models = React.useMemo(() => modelsOf(state.gpus), [state.gpus]);
  const most = Math.max(1, ...state.servers.map(server => server.gpus.length));
  const partial = Number(text) || 0; // what makes no sense, the pool says
  const wish: IWish = { num_gpus: count, partial };
  if (model) {
    wish.filters = { name: model };
  }
  const forecast = useForecast({ state, pool, wish });
  const { name, kernel } = front;
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
        front.remember(wish);
      } else if (front.wish) {
        front.forget();
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
    <section aria-label={trans.__('Ask for GPUs')} className="jp-GPUPool-picker">
      <h3>{trans.__('Ask for GPUs')}</h3>
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
              aria-label={trans.__('One GPU less')}
              disabled={count <= 1}
              onClick={() => setCount(count - 1)}
            >
              −
            </Button>
            <input
              id={`${id}-count`}
              className="jp-mod-styled"
              type="number"
              min={1}
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
        <div className="jp-GPUPool-field">
          <label htmlFor={`${id}-share`}>{trans.__('of each')}</label>
          <input
            type="range"
            min={0.05}
            max={1}
            step={0.05}
            value={partial}
            aria-label={trans.__('Share of each GPU')}
            aria-valuetext={share(partial)}
            onChange={event => setText(event.target.value)}
          />
          <input
            id={`${id}-share`}
            className="jp-mod-styled"
            type="number"
            min={0.01}
            max={1}
            step={0.01}
            value={text}
            onChange={event => setText(event.target.value)}
          />
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
        <p className="jp-GPUPool-figures">{meaning(wish, state, trans)}</p>
        {!mine && (
          <p
            role="status"
            className={`jp-GPUPool-forecast jp-mod-${forecast?.outcome ?? 'unknown'}`}
          >
            {forecast ? told(forecast, trans) : trans.__('Asking the pool…')}
          </p>
        )}
        {front.remembers && (
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
      return front.isBusy
        ? trans.__('Waiting for the running cell to end…')
        : trans.__('Attaching…');
    }
    if (name === null) {
      return trans.__('Open a notebook to attach GPUs to it.');
    }
    if (kernel === null) {
      return trans.__('%1 has no running kernel; start one to attach GPUs to it.', name);
    }
    if (mine) {
      return mine.state === 'QUEUED'
        ? trans.__('%1 waits in the queue already.', name)
        : trans.__('%1 has GPUs already: resize or release them below.', name);
    }
    return '';
  }
}

/** What a choice means on this pool, in MiB. */
function meaning(wish: IWish, state: IPoolState, trans: TranslationBundle): string {
  const wanted = wish.filters?.name ?? '';
  const sizes = Object.values(state.gpus)
    .filter(gpu => gpu.healthy && gpu.memory_mib > 0 && gpu.name.includes(wanted))
    .map(gpu => shareOf(gpu.memory_mib, wish.partial ?? 1));
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
      return trans.__('Not free now: it would wait at place %1', forecast.position ?? '…');
    default:
      return forecast.reason;
  }
}

interface IAsked extends Pick<IViewProps, 'state' | 'pool'> {
  wish: IWish;
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
        forecast = await pool.api.forecast(JSON.parse(key) as IWish);
      } catch (reason) {
        forecast = { outcome: 'impossible', position: null, reason: (reason as Error).message };
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

/** Again whenever another notebook is in front. */
function useFront(front: Front): void {
  const [, again] = React.useReducer((seen: number) => seen + 1, 0);
  React.useEffect(() => {
    front.changed.connect(again);
    return () => {
      front.changed.disconnect(again);
    };
  }, [front]);
}

function modelsOf(gpus: IPoolState['gpus']): string[] {
  return [...new Set(Object.values(gpus).map(gpu => gpu.name))].sort();
}

function whole(text: string): number {
  return Math.max(1, Math.floor(Number(text)) || 1);
}
