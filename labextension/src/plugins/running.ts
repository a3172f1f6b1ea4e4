/** The user's leases among what runs; to shut one down is to release it. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { Notification } from '@jupyterlab/apputils';
import { IRunningSessionManagers, IRunningSessions } from '@jupyterlab/running';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../common/commandids';
import { exactly } from '../common/format';
import { gpuIcon } from '../common/icon';
import { shares } from '../leases/statustext';
import { ISlices } from '../tokens';
import { ILease } from '../pool/apitypes';

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
  const { actions, myLeases } = slices;
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
    running: () => myLeases.held.map(item),
    // They have been asked whether they are sure.
    shutdownAll: () => void actions.releaseAll(myLeases.held, false).then(tell),
    refreshRunning: () => void myLeases.refresh(),
    runningChanged: myLeases.changed,
    shutdownLabel: trans.__('Release'),
    shutdownAllLabel: trans.__('Release All'),
    shutdownAllConfirmationText: trans.__(
      'Release all of your GPU slices? Data that cannot be moved to the CPU will be lost.'
    )
  });
}
