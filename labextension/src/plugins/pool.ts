/** The pool itself, for every plugin that shows it or asks something of it. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';

import { PoolAPI } from '../pool/api';
import { PoolModel } from '../pool/model';
import { ServerTransport } from '../pool/servertransport';
import { IGPUPool } from '../tokens';

export const poolPlugin: JupyterFrontEndPlugin<IGPUPool> = {
  id: 'jupyter-gpupool:pool',
  description: 'The pool of GPUs that this Jupyter server offers.',
  provides: IGPUPool,
  activate: (app: JupyterFrontEnd) =>
    new PoolModel(new PoolAPI(new ServerTransport(app.serviceManager.serverSettings)))
};
