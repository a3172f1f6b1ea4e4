/** Slices for notebooks, for every plugin that asks for some or gives some back. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { Actions } from '../actions';
import { CommandIDs } from '../commandids';
import { Front } from '../front';
import { Holdings } from '../holdings';
import { Kernels } from '../kernels';
import { Preferences } from '../preferences';
import { IGPUPool, ISlices } from '../tokens';

export const slicesPlugin: JupyterFrontEndPlugin<ISlices> = {
  id: 'jupyter-gpupool:slices',
  description: 'Asks for slices for notebooks, resizes them and gives them back.',
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
  const preferences = new Preferences();
  preferences.changed.connect(() => {
    // The pool speaks each second: a pace of one would skip every other message.
    pool.pace = Math.max(0, preferences.choices.refresh - 0.5);
  });
  registry?.load(SETTINGS).then(
    settings => preferences.follow(settings),
    (reason: Error) =>
      console.error(`jupyter_gpupool: its settings cannot be read: ${reason.message}`)
  );
  const holdings = new Holdings(pool, app.serviceManager.events);
  void app.restored.then(() => holdings.start());
  return {
    front: new Front(app.shell),
    actions: new Actions(pool, new Kernels(app.serviceManager), trans),
    preferences,
    holdings,
    open: (path: string) => void app.commands.execute('docmanager:open', { path }),
    openConsole: () => void app.commands.execute(CommandIDs.console)
  };
}
