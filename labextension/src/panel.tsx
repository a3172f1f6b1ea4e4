/** The sidebar panel that lists servers, GPUs and leases. */

import { ITranslator, nullTranslator, TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import { ServerConnection } from '@jupyterlab/services';
import { Message } from '@lumino/messaging';
import * as React from 'react';

import { IGPU, IPool, IServer } from './api';
import { gpuIcon } from './icon';
import { holdings, IHolding, PoolModel } from './model';

/** Shows the pool while it is visible. */
export class PoolPanel extends ReactWidget {
  constructor(options: PoolPanel.IOptions) {
    super();
    this._trans = (options.translator ?? nullTranslator).load('jupyter_gpupool');
    this.model = new PoolModel({
      serverSettings: options.serverSettings,
      interval: options.interval ?? 2000,
      wanted: () => this.isVisible
    });
    this.id = 'jp-gpupool-panel';
    this.addClass('jp-GPUPool');
    this.title.icon = gpuIcon;
    this.title.caption = this._trans.__('GPU Pool');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', this._trans.__('GPU Pool'));
  }

  readonly model: PoolModel;

  dispose(): void {
    this.model.dispose();
    super.dispose();
  }

  protected onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this.model.refresh();
  }

  protected render(): JSX.Element {
    const trans = this._trans;
    return (
      <UseSignal signal={this.model.changed}>
        {() => (
          <>
            <header className="jp-GPUPool-header">
              <h2>{trans.__('GPU Pool')}</h2>
            </header>
            <Body model={this.model} trans={trans} />
          </>
        )}
      </UseSignal>
    );
  }

  private _trans: TranslationBundle;
}

export namespace PoolPanel {
  export interface IOptions {
    serverSettings: ServerConnection.ISettings;
    translator?: ITranslator;
    /** Milliseconds between two readings of the pool. */
    interval?: number;
  }
}

interface ITranslated {
  trans: TranslationBundle;
}

function Body({ model, trans }: ITranslated & { model: PoolModel }): JSX.Element {
  if (model.error) {
    return (
      <p className="jp-GPUPool-error" role="alert">
        {trans.__('The pool does not answer: %1', model.error)}
      </p>
    );
  }
  if (!model.pool) {
    return <p className="jp-GPUPool-note">{trans.__('Reading the pool…')}</p>;
  }
  return <Pool pool={model.pool} trans={trans} />;
}

function Pool({ pool, trans }: ITranslated & { pool: IPool }): JSX.Element {
  const leases = holdings(pool);
  const waiting = pool.queue.length;
  return (
    <div className="jp-GPUPool-body">
      {pool.servers.length === 0 && (
        <p className="jp-GPUPool-note">{trans.__('The pool has no GPU server.')}</p>
      )}
      {pool.servers.map(server => (
        <Server key={server.name} server={server} trans={trans} />
      ))}
      <section aria-label={trans.__('Leases')}>
        <h3>{trans.__('Leases')}</h3>
        {leases.length === 0 && <p className="jp-GPUPool-note">{trans.__('No GPU is in use.')}</p>}
        <ul className="jp-GPUPool-leases">
          {leases.map(holding => (
            <Lease key={holding.lease ?? ''} holding={holding} trans={trans} />
          ))}
        </ul>
        {waiting > 0 && (
          <p className="jp-GPUPool-note">
            {trans._n('%1 request is waiting.', '%1 requests are waiting.', waiting)}
          </p>
        )}
      </section>
    </div>
  );
}

function Server({ server, trans }: ITranslated & { server: IServer }): JSX.Element {
  return (
    <section aria-label={trans.__('GPU server %1', server.name)}>
      <h3 title={server.host}>{server.name}</h3>
      <ul className="jp-GPUPool-gpus">
        {server.gpus.map(gpu => (
          <GPU key={gpu.uuid} gpu={gpu} trans={trans} />
        ))}
      </ul>
    </section>
  );
}

function GPU({ gpu, trans }: ITranslated & { gpu: IGPU }): JSX.Element {
  // The badge says it, in the user's language.
  const name = gpu.emulated ? gpu.name.replace(/ *\(emulated\)$/, '') : gpu.name;
  const granted = trans.__('%1 of %2 MiB granted', gpu.granted_mib, gpu.memory_mib);
  return (
    <li className="jp-GPUPool-gpu">
      <div className="jp-GPUPool-name">
        <span className="jp-GPUPool-index">{gpu.index}</span>
        <span title={gpu.uuid}>{name}</span>
        {gpu.emulated && (
          <span
            className="jp-GPUPool-badge"
            title={trans.__('No hardware: its work is done by a CPU')}
          >
            {trans.__('emulated')}
          </span>
        )}
        {!gpu.healthy && (
          <span className="jp-GPUPool-badge jp-mod-warn">{trans.__('unhealthy')}</span>
        )}
      </div>
      <div
        className="jp-GPUPool-bar"
        role="meter"
        aria-label={trans.__('Granted memory of GPU %1', gpu.index)}
        aria-valuemin={0}
        aria-valuemax={gpu.memory_mib}
        aria-valuenow={gpu.granted_mib}
        aria-valuetext={granted}
      >
        <div style={{ width: `${percent(gpu.granted_mib, gpu.memory_mib)}%` }} />
      </div>
      <div className="jp-GPUPool-figures">{granted}</div>
    </li>
  );
}

function Lease({ holding, trans }: ITranslated & { holding: IHolding }): JSX.Element {
  const shares = holding.shares.map(({ gpu, memory_mib }) =>
    trans.__('GPU %1: %2 MiB', gpu.index, memory_mib)
  );
  return (
    <li>
      <span className="jp-GPUPool-owner">{holding.owner ?? trans.__('Other users')}</span>
      {holding.lease !== null && <code title={holding.lease}>{holding.lease.slice(0, 8)}</code>}
      <div className="jp-GPUPool-figures">{shares.join(' · ')}</div>
    </li>
  );
}

/** `part` of `whole` in percent, 0 to 100; 0 of a GPU that reports no memory. */
function percent(part: number, whole: number): number {
  return whole > 0 ? Math.min(100, (100 * part) / whole) : 0;
}
