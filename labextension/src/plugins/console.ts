/** The Console: opened by a command, from the launcher, the palette and the panel, and found again after a reload. */

import { ILayoutRestorer, JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette, WidgetTracker } from '@jupyterlab/apputils';
import { ILauncher } from '@jupyterlab/launcher';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { CommandIDs } from '../common/commandids';
import { Console } from '../console/widget';
import { gpuIcon } from '../common/icon';
import { IGPUPool } from '../tokens';

export const consolePlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:console',
  description: "The pool's Console: servers, leases, tokens and namespaces.",
  autoStart: true,
  requires: [IGPUPool],
  optional: [ICommandPalette, ILauncher, ILayoutRestorer, ITranslator],
  activate
};

function activate(
  app: JupyterFrontEnd,
  pool: IGPUPool,
  palette: ICommandPalette | null,
  launcher: ILauncher | null,
  restorer: ILayoutRestorer | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const tracker = new WidgetTracker<Console>({ namespace: 'gpupool-console' });
  app.commands.addCommand(CommandIDs.console, {
    label: trans.__('GPU Pool Console'),
    caption: trans.__("The pool's servers, leases, tokens and namespaces"),
    icon: gpuIcon,
    execute: async () => {
      let widget = tracker.currentWidget;
      if (!widget || widget.isDisposed) {
        widget = new Console({ pool, trans });
        app.shell.add(widget, 'main', { type: 'GPU Pool Console' });
        await tracker.add(widget);
      }
      app.shell.activateById(widget.id);
    },
    describedBy: { args: { type: 'object', properties: {} } }
  });
  void restorer?.restore(tracker, { command: CommandIDs.console, name: () => 'console' });
  palette?.addItem({ command: CommandIDs.console, category: trans.__('GPU Pool') });
  launcher?.add({ command: CommandIDs.console, category: trans.__('GPU Pool'), rank: 2 });
}
