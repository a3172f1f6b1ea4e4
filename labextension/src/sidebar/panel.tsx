/** The panel in the left sidebar: it watches the pool while it is visible. */

import { ReactWidget } from '@jupyterlab/ui-components';
import { IDisposable } from '@lumino/disposable';
import { Message } from '@lumino/messaging';
import * as React from 'react';

import { IViewContext } from '../common/viewcontext';
import type { ISidebarSections } from '../tokens';
import { gpuIcon } from '../common/icon';

// What it shows is loaded when somebody looks, and costs nothing at JupyterLab's start.
const Body = React.lazy(() => import('./body'));

export class PoolPanel extends ReactWidget {
  constructor(
    private _context: IViewContext,
    private _sections: ISidebarSections
  ) {
    super();
    const { trans } = _context;
    this.id = 'jp-gpupool-panel';
    this.addClass('jp-GPUPool');
    this.title.icon = gpuIcon;
    this.title.caption = trans.__('GPU Pool');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', trans.__('GPU Pool'));
  }

  override dispose(): void {
    this._watching?.dispose();
    super.dispose();
  }

  protected override onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._watching ??= this._context.pool.watch();
    this._seen = true;
    this.update();
  }

  protected override onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._watching?.dispose();
    this._watching = null;
  }

  protected override render(): JSX.Element {
    const { trans } = this._context;
    const wait = <p className="jp-GPUPool-note">{trans.__('Loading the pool…')}</p>;
    return (
      <>
        <header className="jp-GPUPool-header">
          <h2>{trans.__('GPU Pool')}</h2>
          <button
            type="button"
            className="jp-GPUPool-link"
            title={trans.__("The pool's servers, leases, tokens and namespaces")}
            onClick={this._context.slices.openConsole}
          >
            {trans.__('Console')}
          </button>
        </header>
        <React.Suspense fallback={wait}>
          {this._seen && <Body {...this._context} sections={this._sections} />}
        </React.Suspense>
      </>
    );
  }

  private _seen = false;
  private _watching: IDisposable | null = null;
}
