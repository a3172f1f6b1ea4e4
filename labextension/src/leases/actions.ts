/** What a user does with GPU slices: request, resize, release. Asks first where work would be lost. */

import { Dialog, InputDialog, Notification, showDialog } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import { TranslationBundle } from '@jupyterlab/translation';

import { errorLine, IAnswer } from './kernelanswer';
import { kernelOf, Kernels } from './kernels';
import type { IActions, IGPUPool } from '../tokens';
import { IGPURequest, ILease } from '../pool/apitypes';

export class Actions implements IActions {
  constructor(
    private _pool: IGPUPool,
    private _kernels: Kernels,
    private _trans: TranslationBundle
  ) {}

  /** The notebook that a lease is for, or what its holder calls it. */
  nameOf(lease: ILease): string {
    const session = this._kernels.session(kernelOf(lease));
    return (session && PathExt.basename(session.path)) || lease.request.label || lease.id;
  }

  /** The path of that notebook; null where it is none. */
  pathOf(lease: ILease): string | null {
    return this._kernels.session(kernelOf(lease))?.path ?? null;
  }

  /** Ask for slices for a running kernel. A line about what went wrong; empty if nothing did. */
  async attach(kernelId: string, wish: IGPURequest): Promise<string> {
    return this._line(await this._kernels.request(kernelId, wish));
  }

  /** Another share of the same GPUs. A line about what went wrong; empty if nothing did. */
  async resize(lease: ILease, partial: number): Promise<string> {
    const kernel = this._living(lease);
    if (kernel && (await this._kernels.isIdle(kernel))) {
      // It knows at once what its slices are, and what is in use of them.
      return this._line(await this._kernels.resize(kernel, { partial }));
    }
    return this._of(this._pool.api.resize(lease.id, { partial }));
  }

  /** Give the slices back, after a question. A line about what went wrong; empty if nothing did. */
  async release(lease: ILease): Promise<string> {
    const trans = this._trans;
    const name = this.nameOf(lease);
    const kernel = this._living(lease);
    if (kernel && (await this._kernels.isIdle(kernel))) {
      if (
        !(await this._sure(
          trans.__('Release the GPU slices of %1?', name),
          trans.__("The notebook's tensors are moved to the CPU of its own machine."),
          trans.__('Release')
        ))
      ) {
        return '';
      }
      const answer = await this._kernels.release(kernel);
      if (!answer.error) {
        if (answer.said) {
          Notification.info(trans.__('%1: %2', name, answer.said), { autoClose: 5000 });
        }
        return '';
      }
      if (answer.error !== 'SliceInUse') {
        return this._line(answer);
      }
      return (await this._sure(
        trans.__('Release and lose the data on them?'),
        answer.said,
        trans.__('Release and lose data')
      ))
        ? this._line(await this._kernels.release(kernel, true))
        : '';
    }
    const what = kernel
      ? trans.__(
          "A cell is running. It will fail, and the notebook's data on the GPU slices will be lost."
        )
      : trans.__(
          'The program that uses them will fail, and its data on the GPU slices will be lost.'
        );
    return (await this._sure(
      trans.__('Release the GPU slices of %1?', name),
      what,
      trans.__('Release and lose data')
    ))
      ? this._of(this._pool.api.release(lease.id))
      : '';
  }

  /** Give everything back, after one question. A line about what went wrong; empty if nothing did. */
  async releaseAll(leases: readonly ILease[], asks = true): Promise<string> {
    const trans = this._trans;
    const names = leases.map(lease => this.nameOf(lease));
    if (
      asks &&
      !(await this._sure(
        trans._n('Release %1 lease?', 'Release %1 leases?', leases.length),
        trans.__('%1. Data that cannot be moved to the CPU will be lost.', names.join(', ')),
        trans.__('Release all')
      ))
    ) {
      return '';
    }
    const troubles = await Promise.all(leases.map(lease => this._give(lease)));
    return troubles.find(Boolean) ?? '';
  }

  /**
   * More time, for a lease whose time is limited: the user says how much. A line about what went wrong; empty if
   * nothing did.
   */
  async extend(lease: ILease): Promise<string> {
    const trans = this._trans;
    const most = await this._moreMinutes(lease);
    const { value } = await InputDialog.getNumber({
      title: trans.__('Extend the lease of %1', this.nameOf(lease)),
      label: most === null ? trans.__('Minutes') : trans.__('Minutes; now at most %1', most),
      value: Math.max(1, Math.min(60, most ?? 60)),
      okLabel: trans.__('Extend')
    });
    return value === null ? '' : this._of(this._pool.api.extend(lease.id, 60 * value));
  }

  /** How many more minutes the namespace allows a lease now; null where there is no limit or it is not told. */
  private async _moreMinutes(lease: ILease): Promise<number | null> {
    try {
      const longest = await this._pool.api.longest(lease.request.namespace);
      const at = this._pool.state?.at ?? Date.now() / 1000;
      return longest === null || !lease.expires_at
        ? null
        : Math.max(0, Math.floor((at + longest - lease.expires_at) / 60));
    } catch {
      return null; // the pool says in words if it is too much
    }
  }

  /** Tell the holder that one would like to have it, in words. A line about what went wrong; empty if nothing did. */
  async askBack(lease: string, holder: string): Promise<string> {
    const trans = this._trans;
    const { button, value } = await InputDialog.getText({
      title: trans.__('Ask %1 to release these GPU slices?', holder),
      label: trans.__('Message to %1, who decides whether to release them.', holder),
      placeholder: trans.__('why you need them, and until when'),
      okLabel: trans.__('Ask')
    });
    if (!button.accept) {
      return '';
    }
    const trouble = await this._of(this._pool.api.ask(lease, value ?? ''));
    if (!trouble) {
      Notification.success(trans.__('Your message was sent to %1.', holder), { autoClose: 5000 });
    }
    return trouble;
  }

  /** It is wanted still. A line about what went wrong; empty if nothing did. */
  keep(lease: ILease): Promise<string> {
    return this._of(this._pool.api.keep(lease.id));
  }

  /** Whether a cell of the notebook that a lease is for runs now. */
  async isComputing(lease: ILease): Promise<boolean> {
    const kernel = this._living(lease);
    return kernel !== null && !(await this._kernels.isIdle(kernel));
  }

  /** Take a request out of the queue; nothing is lost but the place. */
  async leave(lease: ILease): Promise<string> {
    return this._of(this._pool.api.release(lease.id));
  }

  /** The kernel that a lease is for, if it runs. */
  private _living(lease: ILease): string | null {
    const kernel = kernelOf(lease);
    return kernel && this._kernels.session(kernel) ? kernel : null;
  }

  /** Give it back without a question: by its kernel, which keeps what can be kept, if that is idle. */
  private async _give(lease: ILease): Promise<string> {
    const kernel = this._living(lease);
    if (kernel && lease.state !== 'QUEUED' && (await this._kernels.isIdle(kernel))) {
      return this._line(await this._kernels.release(kernel, true));
    }
    return this._of(this._pool.api.release(lease.id));
  }

  private async _sure(title: string, body: string, accept: string): Promise<boolean> {
    const result = await showDialog({
      title,
      body,
      buttons: [
        Dialog.cancelButton({ label: this._trans.__('Cancel') }),
        Dialog.warnButton({ label: accept })
      ],
      defaultButton: 0
    });
    return result.button.accept;
  }

  private _line(answer: IAnswer): string {
    return errorLine(answer, this._trans);
  }

  private async _of(call: Promise<unknown>): Promise<string> {
    try {
      await call;
      return '';
    } catch (reason) {
      return reason instanceof Error ? reason.message : String(reason);
    }
  }
}
