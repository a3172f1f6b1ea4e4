/** The JupyterLab side of jupyter_gpupool: which plugins there are. */

import { commandsPlugin } from './plugins/commands';
import { consolePlugin } from './plugins/console';
import { launcherPlugin } from './plugins/launcher';
import { panelPlugin } from './plugins/panel';
import { poolPlugin } from './plugins/pool';
import { runningPlugin } from './plugins/running';
import { sectionsPlugin } from './plugins/sections';
import { slicesPlugin } from './plugins/slices';
import { statusPlugin } from './plugins/status';
import { warningsPlugin } from './plugins/warnings';

export { IGPUPool, ISidebarSections, ISlices } from './tokens';
export default [
  poolPlugin,
  slicesPlugin,
  sectionsPlugin,
  panelPlugin,
  commandsPlugin,
  consolePlugin,
  launcherPlugin,
  runningPlugin,
  statusPlugin,
  warningsPlugin
];
