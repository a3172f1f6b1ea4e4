/** Requests, resizes and releases GPU slices in a running kernel, without a restart. */

import { Kernel, KernelMessage, ServiceManager, Session } from '@jupyterlab/services';

import { IGPURequest, ILease } from '../pool/apitypes';
import { ENTRY, IAnswer } from './kernelanswer';

/** How often a busy kernel is looked at, and the pause between two looks. */
const LOOKS = 8;
const PAUSE_MS = 250;

/** Whose kernel a lease is for. */
export function kernelOf(lease: ILease): string | null {
  return / kernel:([0-9A-Za-z-]+)$/.exec(lease.request.client)?.[1] ?? null;
}

export class Kernels {
  constructor(private _manager: ServiceManager.IManager) {}

  /** The session of a kernel: its notebook's path and name. */
  session(kernelId: string | null): Session.IModel | null {
    for (const session of this._manager.sessions.running()) {
      if (session.kernel && session.kernel.id === kernelId) {
        return session;
      }
    }
    return null;
  }

  /**
   * Whether a kernel waits for something to do; one that computes answers when its cell has ended. What the panel has
   * asked, such as to attach, keeps a kernel busy for a moment longer than it shows, so this looks more than once.
   */
  async isIdle(kernelId: string): Promise<boolean> {
    for (let looks = 1; ; looks++) {
      await this._manager.kernels.refreshRunning(); // what is known may be seconds old
      const models = [...this._manager.kernels.running()];
      const state = models.find(model => model.id === kernelId)?.execution_state;
      if (state !== 'busy' || looks === LOOKS) {
        return state === 'idle';
      }
      await new Promise(resolve => setTimeout(resolve, PAUSE_MS));
    }
  }

  request(kernelId: string, wish: IGPURequest): Promise<IAnswer> {
    return this._ask(kernelId, 'request', wish);
  }

  resize(kernelId: string, share: { partial: number }): Promise<IAnswer> {
    return this._ask(kernelId, 'resize', share);
  }

  /** `force`: also if something on the slices cannot be moved to the CPU, and is lost. */
  release(kernelId: string, force = false): Promise<IAnswer> {
    return this._ask(kernelId, 'release', force);
  }

  /** Has a call evaluated: nothing is executed, so history, variables and outputs stay as they are. */
  private async _ask(kernelId: string, name: string, argument: unknown): Promise<IAnswer> {
    const kernel = this._manager.kernels.connectTo({
      model: { id: kernelId, name: '' },
      handleComms: false
    });
    try {
      return await evaluated(kernel, name, argument);
    } finally {
      kernel.dispose();
    }
  }
}

async function evaluated(
  kernel: Kernel.IKernelConnection,
  name: string,
  argument: unknown
): Promise<IAnswer> {
  const reply = await kernel.requestExecute({
    code: '',
    silent: true,
    store_history: false,
    stop_on_error: false,
    allow_stdin: false,
    user_expressions: {
      answer: `__import__("jupyter_gpupool").${ENTRY}(${literal(name)}, ${literal(JSON.stringify([argument]))})`
    }
  }).done;
  const content = reply.content as KernelMessage.IReplyOkContent & {
    user_expressions?: Record<string, unknown>;
  };
  const answer = content.user_expressions?.answer as
    | { status: 'ok'; data: Record<string, unknown> }
    | { status: 'error'; ename: string; evalue: string }
    | undefined;
  if (answer?.status === 'ok' && answer.data['application/json']) {
    return answer.data['application/json'] as IAnswer;
  }
  if (answer?.status === 'error') {
    return { error: answer.ename, said: `${answer.ename}: ${answer.evalue}` };
  }
  return { error: 'NoAnswer', said: '' };
}

/** A text as a literal of Python: JSON's are literals of the same text. */
function literal(text: string): string {
  return JSON.stringify(text);
}
