/** What a kernel answers to a request, and the line that a user reads when it failed. Pure. */

import { TranslationBundle } from '@jupyterlab/translation';

/** What a kernel answered; see jupyter_gpupool/notebook/frontend_calls.py. */
export interface IAnswer {
  /** One line for people. */
  said: string;
  /** The class of the error; empty if there was none. */
  error: string;
  lease?: string;
  state?: string;
  position?: number | null;
}

/** The function of the package that a frontend has a kernel evaluate. */
export const ENTRY = '_jupyter_gpupool_call';

/** One line about what went wrong, and what to do; empty if nothing did. */
export function errorLine(answer: IAnswer, trans: TranslationBundle): string {
  const { error, said } = answer;
  if (!error) {
    return '';
  }
  if (error === 'ModuleNotFoundError') {
    return trans.__(
      "jupyter_gpupool is not installed where this notebook's kernel runs: %pip install jupyter_gpupool, then try again."
    );
  }
  if (error === 'AttributeError' && said.includes(ENTRY)) {
    return trans.__(
      "This notebook's kernel runs an older version of jupyter_gpupool: restart the kernel and try again. If that does not help, %pip install -U jupyter_gpupool."
    );
  }
  return (
    said || trans.__("This notebook's kernel did not answer. GPU slices need a Python kernel.")
  );
}
