/** The user's leases among what runs; to shut one down is to release it. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { IRunningSessionManagers, IRunningSessions } from '@jupyterlab/running';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../commandids';
import { exactly } from '../format';
import { gpuIcon } from '../icon';
import { shares } from '../status';
import { ISlices } from '../tokens';
import { ILease } from '../wire';

export const runningPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:running',
  description: "The user's leases in the panel of running sessions.",
  autoStart: true,
  requires: [ISlices],
  optional: [IRunningSessionManagers, ITranslator],
  activate
};

function activate(
  app: JupyterFrontEnd,
  slices: ISlices,
  managers: IRunningSessionManagers | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const { actions, holdings } = slices;
  const tell = (trouble: string) => {
    if (trouble) {
      Notification.error(trouble);
    }
  };

  const item = (lease: ILease): IRunningSessions.IRunningItem => ({
    icon: () => gpuIcon,
    label: () => actions.nameOf(lease),
    labelTitle: () =>
      lease.slices
        .map(piece =>
          trans.__('GPU %1 of %2: %3', piece.index, piece.server, exactly(piece.memory_mib, trans))
        )
        .join('\n'),
    detail: () => shares([lease], trans),
    open: () => {
      const path = actions.pathOf(lease);
      if (path) {
        slices.open(path);
      } else {
        void app.commands.execute(CommandIDs.open);
      }
    },
    shutdown: () => void actions.release(lease).then(tell)
  });

  managers?.add({
    name: trans.__('GPU Leases'),
    running: () => holdings.held.map(item),
    // They have been asked whether they are sure.
    shutdownAll: () => void actions.releaseAll(holdings.held, false).then(tell),
    refreshRunning: () => void holdings.refresh(),
    runningChanged: holdings.changed,
    shutdownLabel: trans.__('Release'),
    shutdownAllLabel: trans.__('Release All'),
    shutdownAllConfirmationText: trans.__(
      'Release all of your GPUs? What is on them is lost where it cannot be moved.'
    )
  });
}
