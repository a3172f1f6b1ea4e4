/** The JupyterLab side of jupyter_gpupool: which plugins there are. */

import { panelPlugin } from './plugins/panel';
import { poolPlugin } from './plugins/pool';
import { slicesPlugin } from './plugins/slices';

export { IGPUPool, ISlices } from './tokens';
export default [poolPlugin, slicesPlugin, panelPlugin];
