/** The Console as a tab of the main area. It watches the pool while it is visible. */

import { ReactWidget } from '@jupyterlab/ui-components';
import { IDisposable } from '@lumino/disposable';
import { Message } from '@lumino/messaging';
import * as React from 'react';

import { gpuIcon } from '../common/icon';
import { IConsoleContext } from './context';

// Loaded when the tab is opened.
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

  override dispose(): void {
    this._watching?.dispose();
    super.dispose();
  }

  protected override onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    this._settle();
  }

  protected override onAfterShow(msg: Message): void {
    super.onAfterShow(msg);
    this._settle();
  }

  protected override onAfterHide(msg: Message): void {
    super.onAfterHide(msg);
    this._settle();
  }

  protected override onActivateRequest(msg: Message): void {
    super.onActivateRequest(msg);
    // The keyboard reaches the tabs next.
    this.node.focus();
  }

  protected override render(): JSX.Element {
    const { trans } = this._context;
    return (
      <React.Suspense fallback={<p>{trans.__('Loading the pool…')}</p>}>
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
