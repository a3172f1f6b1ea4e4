/** A card in the launcher: a new notebook, and GPUs for it. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../common/commandids';
import { gpuIcon } from '../common/icon';

export const launcherPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:launcher',
  description: 'Creates a notebook and requests GPUs for it, from the launcher.',
  autoStart: true,
  optional: [ICommandPalette, ILauncher, ITranslator],
  activate
};

/** JupyterLab's own command for a notebook; a frontend without notebooks has no such. */
const CREATE = 'notebook:create-new';

function activate(
  app: JupyterFrontEnd,
  palette: ICommandPalette | null,
  launcher: ILauncher | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const { commands, serviceManager } = app;
  commands.addCommand(CommandIDs.newNotebook, {
    label: args =>
      args.isLauncher ? trans.__('Notebook with GPUs') : trans.__('New Notebook with GPUs'),
    caption: trans.__('Create a notebook and request GPUs for it'),
    icon: gpuIcon,
    isEnabled: () => commands.hasCommand(CREATE),
    describedBy: {
      args: {
        type: 'object',
        properties: { cwd: { type: 'string' }, isLauncher: { type: 'boolean' } }
      }
    },
    execute: async args => {
      const kernelName = serviceManager.kernelspecs.specs?.default;
      const widget: unknown = await commands.execute(CREATE, { cwd: args.cwd, kernelName });
      // Not waited for: the launcher gives its place to the notebook at once.
      void commands.execute(CommandIDs.request);
      return widget;
    }
  });
  palette?.addItem({ command: CommandIDs.newNotebook, category: trans.__('GPU Pool') });
  launcher?.add({
    command: CommandIDs.newNotebook,
    args: { isLauncher: true },
    category: trans.__('Notebook'),
    rank: 100
  });
}
