/** The Console as a tab of the main area: it watches the pool while it can be seen. */

import { ReactWidget } from '@jupyterlab/ui-components';
import { IDisposable } from '@lumino/disposable';
import { Message } from '@lumino/messaging';
import * as React from 'react';

import { gpuIcon } from '../icon';
import { IConsoleContext } from './context';

// Loaded when somebody opens it.
const Body = React.lazy(() => import('./body'));

export class Console extends ReactWidget {
  constructor(private _context: IConsoleContext) {
    super();
    const { trans } = _context;
    this.id = 'jp-gpupool-console';
    this.addClass('jp-GPUPoolConsole');
    this.title.icon = gpuIcon;
    this.title.label = trans.__('GPU Pool Console');
    this.title.closable = true;
    this.node.tabIndex = -1;
  }

  dispose(): void {
    this._watching?.dispose();
    super.dispose();
  }

  protected onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this._settle();
  }

  protected onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._settle();
  }

  protected onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._settle();
  }

  protected onActivateRequest(msg: Message): void {
    super.onActivateRequest(msg);
    // The tabs follow, by the keyboard.
    this.node.focus();
  }

  protected render(): JSX.Element {
    const { trans } = this._context;
    return (
      <React.Suspense fallback={<p>{trans.__('Reading the pool…')}</p>}>
        {this._seen && <Body {...this._context} />}
      </React.Suspense>
    );
  }

  private _settle(): void {
    if (this.isVisible) {
      this._watching ??= this._context.pool.watch();
      this._seen = true;
      this.update();
    } else {
      this._watching?.dispose();
      this._watching = null;
    }
  }

  private _seen = false;
  private _watching: IDisposable | null = null;
}
