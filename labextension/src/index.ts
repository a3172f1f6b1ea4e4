/** The JupyterLab side of jupyter_gpupool: which plugins there are. */

import { panelPlugin } from './plugins/panel';
import { poolPlugin } from './plugins/pool';

export { IGPUPool } from './tokens';
export default [poolPlugin, panelPlugin];
