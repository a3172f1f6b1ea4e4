/** The panel in the left sidebar: it watches the pool while it is visible. */

import { ReactWidget } from '@jupyterlab/ui-components';
import { IDisposable } from '@lumino/disposable';
import { Message } from '@lumino/messaging';
import * as React from 'react';

import { IViewContext } from './context';
import { gpuIcon } from './icon';

// What it shows is loaded when somebody looks, and costs nothing at JupyterLab's start.
const Body = React.lazy(() => import('./body'));

export class PoolPanel extends ReactWidget {
  constructor(private _context: IViewContext) {
    super();
    const { trans } = _context;
    this.id = 'jp-gpupool-panel';
    this.addClass('jp-GPUPool');
    this.title.icon = gpuIcon;
    this.title.caption = trans.__('GPU Pool');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', trans.__('GPU Pool'));
  }

  dispose(): void {
    this._watching?.dispose();
    super.dispose();
  }

  protected onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._watching ??= this._context.pool.watch();
    this._seen = true;
    this.update();
  }

  protected onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._watching?.dispose();
    this._watching = null;
  }

  protected render(): JSX.Element {
    const { trans } = this._context;
    const wait = <p className="jp-GPUPool-note">{trans.__('Reading the pool…')}</p>;
    return (
      <>
        <header className="jp-GPUPool-header">
          <h2>{trans.__('GPU Pool')}</h2>
          <button
            type="button"
            className="jp-GPUPool-link"
            title={trans.__('Servers, leases of everybody, tokens and namespaces of the pool')}
            onClick={this._context.slices.openConsole}
          >
            {trans.__('Console')}
          </button>
        </header>
        <React.Suspense fallback={wait}>{this._seen && <Body {...this._context} />}</React.Suspense>
      </>
    );
  }

  private _seen = false;
  private _watching: IDisposable | null = null;
}
