/** The notebook or console that the user worked in last. GPU slices are requested for it. */

import { JupyterFrontEnd } from '@jupyterlab/application';
import { ISessionContext } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { DocumentRegistry } from '@jupyterlab/docregistry';
import { ISignal, Signal } from '@lumino/signaling';
import { Widget } from '@lumino/widgets';

import { IGPURequest } from '../pool/apitypes';
import type { IActiveNotebook } from '../tokens';
import { metadataWith, requestFromMetadata } from './gpurequest';

/** The metadata key of a notebook's request, which the kernel's provisioner reads, too. */
const KEY = 'gpupool';

interface INotebookModel extends DocumentRegistry.IModel {
  getMetadata(key: string): unknown;
  setMetadata(key: string, value: unknown): void;
  deleteMetadata(key: string): void;
}

/** What has a kernel of its own. */
interface IWithSession extends Widget {
  sessionContext?: ISessionContext;
  context?: DocumentRegistry.IContext<DocumentRegistry.IModel>;
}

export class ActiveNotebook implements IActiveNotebook {
  constructor(private _shell: JupyterFrontEnd.IShell) {
    _shell.currentChanged?.connect(this._update, this);
    this._update();
  }

  /** Another one is in front, or its kernel changed. */
  get changed(): ISignal<this, void> {
    return this._changed;
  }

  /** `notebook.ipynb`; null where there is none. */
  get name(): string | null {
    const session = this._session;
    return session ? PathExt.basename(session.path) || session.name : null;
  }

  /** The running kernel's id; null where none runs. */
  get kernel(): string | null {
    return this._session?.session?.kernel?.id ?? null;
  }

  get isBusy(): boolean {
    return this._session?.session?.kernel?.status === 'busy';
  }

  /** Whether what it says has been read; a notebook that is being opened has said nothing yet. */
  get isReady(): boolean {
    const widget = this._widget as IWithSession | null;
    return widget?.context?.isReady ?? true;
  }

  /** Whether a wish can be kept with it. */
  get remembers(): boolean {
    return this._model !== null;
  }

  /** What the notebook is to be given, if it says so. */
  get wish(): IGPURequest | null {
    return requestFromMetadata(this._model?.getMetadata(KEY));
  }

  /** Write it into the notebook, which is saved when the user saves it. */
  remember(wish: IGPURequest): void {
    this._model?.setMetadata(KEY, metadataWith(this._model.getMetadata(KEY), wish));
  }

  /** It asks for nothing by itself any more. */
  forget(): void {
    this._model?.deleteMetadata(KEY);
  }

  private get _session(): ISessionContext | null {
    const widget = this._widget as IWithSession | null;
    if (!widget || widget.isDisposed) {
      return null;
    }
    return widget.sessionContext ?? widget.context?.sessionContext ?? null;
  }

  private get _model(): INotebookModel | null {
    const widget = this._widget as IWithSession | null;
    const model = widget && !widget.isDisposed ? widget.context?.model : undefined;
    return model && 'setMetadata' in model ? (model as INotebookModel) : null;
  }

  private _update(): void {
    const widget = this._shell.currentWidget as IWithSession | null;
    const context = widget?.context;
    const session = widget?.sessionContext ?? context?.sessionContext;
    // A text file has a session context too, for a console that it may get.
    const counts = session && (!context || 'setMetadata' in context.model);
    if (widget && counts && widget !== this._widget) {
      this._disconnect();
      this._widget = widget;
      session.kernelChanged.connect(this._notify, this);
      session.statusChanged.connect(this._notify, this);
      session.propertyChanged.connect(this._notify, this);
      widget.disposed.connect(this._notify, this);
      void context?.ready.then(() => this._notify());
      this._notify();
    }
  }

  private _disconnect(): void {
    const session = this._session;
    session?.kernelChanged.disconnect(this._notify, this);
    session?.statusChanged.disconnect(this._notify, this);
    session?.propertyChanged.disconnect(this._notify, this);
    this._widget?.disposed.disconnect(this._notify, this);
  }

  private _notify(): void {
    this._changed.emit();
  }

  private _changed = new Signal<this, void>(this);
  private _widget: Widget | null = null;
}
