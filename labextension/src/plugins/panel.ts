/** The panel in the left sidebar, and the command that opens it. */

import { ILayoutRestorer, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../common/commandids';
import { gpuIcon } from '../common/icon';
import { PoolPanel } from '../sidebar/panel';
import { IGPUPool, ISidebarSections, ISlices } from '../tokens';

export const panelPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:plugin',
  description: 'The panel in the left sidebar that shows the pool and requests GPUs.',
  autoStart: true,
  requires: [IGPUPool, ISlices, ISidebarSections],
  optional: [ICommandPalette, ILayoutRestorer, ITranslator],
  activate
};

function activate(
  app: JupyterFrontEnd,
  pool: IGPUPool,
  slices: ISlices,
  sections: ISidebarSections,
  palette: ICommandPalette | null,
  restorer: ILayoutRestorer | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const panel = new PoolPanel({ pool, slices, trans }, sections);
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
}
