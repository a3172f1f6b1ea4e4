/** What the user holds, in the status bar. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../common/commandids';
import { StatusItem } from '../sidebar/statusitem';
import { ISlices } from '../tokens';

export const statusPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:status',
  description: 'Shows the GPUs that the user holds in the status bar.',
  autoStart: true,
  requires: [ISlices],
  optional: [IStatusBar, ITranslator],
  activate
};

function activate(
  app: JupyterFrontEnd,
  slices: ISlices,
  statusBar: IStatusBar | null,
  translator: ITranslator | null
): void {
  if (!statusBar) {
    return;
  }
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const item = new StatusItem(slices, trans, () => void app.commands.execute(CommandIDs.open));
  statusBar.registerStatusItem(statusPlugin.id, {
    item,
    align: 'left',
    rank: 10,
    isActive: () => item.isWanted,
    activeStateChanged: item.wantedChanged
  });
}
