/** Slices for notebooks, for every plugin that asks for some or gives some back. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { Actions } from '../actions';
import { Front } from '../front';
import { Kernels } from '../kernels';
import { IGPUPool, ISlices } from '../tokens';

export const slicesPlugin: JupyterFrontEndPlugin<ISlices> = {
  id: 'jupyter-gpupool:slices',
  description: 'Asks for slices for notebooks, resizes them and gives them back.',
  provides: ISlices,
  requires: [IGPUPool],
  optional: [ITranslator],
  activate: (app: JupyterFrontEnd, pool: IGPUPool, translator: ITranslator | null) => ({
    front: new Front(app.shell),
    actions: new Actions(
      pool,
      new Kernels(app.serviceManager),
      (translator ?? nullTranslator).load('jupyter_gpupool')
    ),
    open: (path: string) => void app.commands.execute('docmanager:open', { path })
  })
};
