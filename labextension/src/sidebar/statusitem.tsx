/** The status bar's item: what the notebook in front holds, else everything; it opens the panel. */

import { TextItem } from '@jupyterlab/statusbar';
import { TranslationBundle } from '@jupyterlab/translation';
import { ReactWidget } from '@jupyterlab/ui-components';
import { ISignal, Signal } from '@lumino/signaling';
import * as React from 'react';

import { gpuIcon } from '../common/icon';
import { kernelOf } from '../leases/kernels';
import { concerning, statusText } from '../leases/statustext';
import { ISlices } from '../tokens';

export class StatusItem extends ReactWidget {
  constructor(
    private _slices: ISlices,
    private _trans: TranslationBundle,
    private _open: () => void
  ) {
    super();
    this.addClass('jp-GPUPool-status');
    const { activeNotebook, myLeases, preferences } = _slices;
    myLeases.changed.connect(this._again, this);
    preferences.changed.connect(this._again, this);
    activeNotebook.changed.connect(this.update, this);
    myLeases.used.connect(this.update, this);
  }

  /** Whether it is to be seen. */
  get isWanted(): boolean {
    const { myLeases, preferences } = this._slices;
    const { statusBar } = preferences.choices;
    const some = myLeases.held.length + myLeases.waiting.length > 0;
    return statusBar === 'always' || (statusBar === 'held' && some);
  }

  get wantedChanged(): ISignal<this, void> {
    return this._wantedChanged;
  }

  override dispose(): void {
    Signal.clearData(this);
    super.dispose();
  }

  protected override render(): JSX.Element {
    const { activeNotebook, myLeases, actions } = this._slices;
    const { held, waiting, queue } = myLeases;
    const { kernel } = activeNotebook;
    const use = myLeases.use.bind(myLeases);
    const status = concerning(
      { held, waiting, queue, use },
      lease => kernel !== null && kernelOf(lease) === kernel
    );
    const text = statusText(status, this._trans);
    const whose = [...status.held, ...status.waiting].map(lease => actions.nameOf(lease));
    return (
      <div
        className="jp-GPUPool-statusButton"
        role="button"
        tabIndex={0}
        aria-label={this._trans.__('%1. Open the GPU pool', text)}
        onClick={this._open}
        onKeyDown={event => {
          if (event.key === 'Enter' || event.key === ' ') {
            event.preventDefault();
            this._open();
          }
        }}
      >
        <gpuIcon.react tag="span" elementSize="normal" />
        <TextItem
          source={text}
          title={[...whose, this._trans.__('Open the GPU pool')].join('\n')}
        />
      </div>
    );
  }

  private _again(): void {
    this._wantedChanged.emit();
    this.update();
  }

  private _wantedChanged = new Signal<this, void>(this);
}
