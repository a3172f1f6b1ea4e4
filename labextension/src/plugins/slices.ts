/** Slices for notebooks, for every plugin that asks for some or gives some back. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { Actions } from '../leases/actions';
import { CommandIDs } from '../common/commandids';
import { ActiveNotebook } from '../leases/activenotebook';
import { MyLeases } from '../leases/myleases';
import { Kernels } from '../leases/kernels';
import { Settings } from '../leases/settings';
import { IGPUPool, ISlices } from '../tokens';

export const slicesPlugin: JupyterFrontEndPlugin<ISlices> = {
  id: 'jupyter-gpupool:slices',
  description: 'Requests GPU slices for notebooks, resizes and releases them.',
  provides: ISlices,
  requires: [IGPUPool],
  optional: [ISettingRegistry, ITranslator],
  activate
};

/** The plugin whose schema the settings have. */
const SETTINGS = 'jupyter-gpupool:plugin';

function activate(
  app: JupyterFrontEnd,
  pool: IGPUPool,
  registry: ISettingRegistry | null,
  translator: ITranslator | null
): ISlices {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const preferences = new Settings();
  preferences.changed.connect(() => {
    // The pool speaks each second: a pace of one would skip every other message.
    pool.pace = Math.max(0, preferences.choices.refresh - 0.5);
  });
  registry?.load(SETTINGS).then(
    settings => preferences.follow(settings),
    (reason: Error) =>
      console.error(`jupyter_gpupool: its settings cannot be read: ${reason.message}`)
  );
  const myLeases = new MyLeases(pool, app.serviceManager.events);
  void app.restored.then(() => myLeases.start());
  return {
    activeNotebook: new ActiveNotebook(app.shell),
    actions: new Actions(pool, new Kernels(app.serviceManager), trans),
    preferences,
    myLeases,
    open: (path: string) => void app.commands.execute('docmanager:open', { path }),
    openConsole: () => void app.commands.execute(CommandIDs.console)
  };
}
