/** Notifications about what the user holds. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { IGPUPool, ISlices } from '../tokens';
import { Warnings } from '../leases/warnings';

export const warningsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:warnings',
  description: 'Warns about idle GPU slices and shows who asks for them.',
  autoStart: true,
  requires: [IGPUPool, ISlices],
  optional: [ITranslator],
  activate: (
    app: JupyterFrontEnd,
    pool: IGPUPool,
    slices: ISlices,
    translator: ITranslator | null
  ) => {
    new Warnings(pool, slices, (translator ?? nullTranslator).load('jupyter_gpupool'));
  }
};
