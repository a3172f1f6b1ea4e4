/** The JupyterLab side of jupyter_gpupool. */

import { ILayoutRestorer, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { gpuIcon } from './icon';
import { PoolPanel } from './panel';

namespace CommandIDs {
  export const open = 'gpupool:open';
}

const plugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:plugin',
  description: "Shows the pool's GPUs, and who holds them, in the left sidebar.",
  autoStart: true,
  optional: [ICommandPalette, ILayoutRestorer, ISettingRegistry, ITranslator],
  activate
};

function activate(
  app: JupyterFrontEnd,
  palette: ICommandPalette | null,
  restorer: ILayoutRestorer | null,
  settings: ISettingRegistry | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const panel = new PoolPanel({
    serverSettings: app.serviceManager.serverSettings,
    translator: translator ?? nullTranslator
  });
  // 501 to 899 is where the sidebar expects extensions.
  app.shell.add(panel, 'left', { rank: 600, type: 'GPU Pool' });
  restorer?.add(panel, panel.id);

  app.commands.addCommand(CommandIDs.open, {
    label: trans.__('Open GPU Pool'),
    caption: trans.__("Show the pool's GPUs and who holds them"),
    icon: gpuIcon,
    execute: () => app.shell.activateById(panel.id),
    describedBy: { args: { type: 'object', properties: {} } }
  });
  palette?.addItem({ command: CommandIDs.open, category: trans.__('GPU Pool') });

  if (settings) {
    void follow(settings, panel);
  }
}

/** Apply the user's settings to the panel, now and whenever they change. */
async function follow(registry: ISettingRegistry, panel: PoolPanel): Promise<void> {
  try {
    const settings = await registry.load(plugin.id);
    const apply = () => {
      panel.model.interval = (settings.get('refreshInterval').composite as number) * 1000;
    };
    settings.changed.connect(apply);
    apply();
  } catch (reason) {
    console.error(`${plugin.id}: its settings cannot be loaded`, reason);
  }
}

export default plugin;
