/** Commands for everything that a user does with slices, in the palette too. */

import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ICommandPalette, InputDialog, Notification } from '@jupyterlab/apputils';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { ReadonlyPartialJSONObject } from '@lumino/coreutils';

import { Range, RANGES } from '../chart/data';
import { CommandIDs } from '../common/commandids';
import { gpuIcon } from '../common/icon';
import { kernelOf } from '../leases/kernels';
import { IGPUPool, ISlices } from '../tokens';
import { ILease } from '../pool/apitypes';

export const commandsPlugin: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-gpupool:commands',
  description: 'Commands that request, resize, extend and release GPU slices.',
  autoStart: true,
  requires: [IGPUPool, ISlices],
  optional: [ICommandPalette, ITranslator],
  activate
};

/** Of a command about one lease: which one; without it the user chooses, where there are several. */
const LEASE = { type: 'object', properties: { lease: { type: 'string' } } };
const NOTHING = { type: 'object', properties: {} };

function activate(
  app: JupyterFrontEnd,
  pool: IGPUPool,
  slices: ISlices,
  palette: ICommandPalette | null,
  translator: ITranslator | null
): void {
  const trans = (translator ?? nullTranslator).load('jupyter_gpupool');
  const { actions, activeNotebook, myLeases, preferences } = slices;
  const { commands } = app;
  const category = trans.__('GPU Pool');

  const add = (id: string, options: Parameters<typeof commands.addCommand>[1]) => {
    commands.addCommand(id, options);
    palette?.addItem({ command: id, category });
  };

  /** The lease that a command is about: the named one, the front notebook's, the only one, or what the user chooses. */
  const one = async (
    args: ReadonlyPartialJSONObject,
    among: readonly ILease[],
    title: string
  ): Promise<ILease | null> => {
    if (typeof args.lease === 'string') {
      return among.find(lease => lease.id === args.lease) ?? null;
    }
    const { kernel } = activeNotebook;
    const mine = among.find(lease => kernel !== null && kernelOf(lease) === kernel);
    if (mine || among.length <= 1) {
      return mine ?? among[0] ?? null;
    }
    const names = among.map((lease, n) => `${n + 1}. ${actions.nameOf(lease)}`);
    const { value } = await InputDialog.getItem({ title, items: names });
    return value === null ? null : (among[names.indexOf(value)] ?? null);
  };

  const tell = (trouble: string) => {
    if (trouble) {
      Notification.error(trouble);
    }
  };

  add(CommandIDs.request, {
    label: trans.__('Request GPUs…'),
    caption: trans.__('Request GPUs for this notebook'),
    icon: gpuIcon,
    describedBy: { args: NOTHING },
    execute: async () => {
      const { request } = await import('../sidebar/requestdialog');
      await request({ pool, slices, trans });
    }
  });

  add(CommandIDs.resize, {
    label: trans.__('Resize GPU Slices…'),
    describedBy: { args: LEASE },
    isEnabled: () => myLeases.held.length > 0,
    execute: async args => {
      const lease = await one(args, myLeases.held, trans.__('Resize the GPU slices of'));
      const [piece] = lease?.slices ?? [];
      if (!lease || !piece) {
        return;
      }
      const { value } = await InputDialog.getNumber({
        title: trans.__('Resize the GPU slices of %1', actions.nameOf(lease)),
        label: trans.__('New share of each GPU, above 0 and at most 1'),
        value: Math.round((100 * piece.memory_mib) / Math.max(1, piece.total_mib)) / 100,
        okLabel: trans.__('Resize')
      });
      if (value !== null) {
        tell(await actions.resize(lease, value));
      }
    }
  });

  add(CommandIDs.extend, {
    label: trans.__('Extend GPU Lease…'),
    describedBy: { args: LEASE },
    isEnabled: () => myLeases.held.some(isLimited),
    execute: async args => {
      const lease = await one(
        args,
        myLeases.held.filter(isLimited),
        trans.__('Extend the lease of')
      );
      if (lease) {
        tell(await actions.extend(lease));
      }
    }
  });

  add(CommandIDs.release, {
    label: trans.__('Release GPUs…'),
    describedBy: { args: LEASE },
    isEnabled: () => myLeases.held.length > 0,
    execute: async args => {
      const lease = await one(args, myLeases.held, trans.__('Release the GPU slices of'));
      if (lease) {
        tell(await actions.release(lease));
      }
    }
  });

  add(CommandIDs.releaseAll, {
    label: trans.__('Release All My GPUs…'),
    describedBy: { args: NOTHING },
    isEnabled: () => myLeases.held.length > 0,
    execute: async () => tell(await actions.releaseAll(myLeases.held))
  });

  add(CommandIDs.leaveQueue, {
    label: trans.__('Leave the GPU Queue'),
    describedBy: { args: LEASE },
    isEnabled: () => myLeases.waiting.length > 0,
    execute: async args => {
      const lease = await one(args, myLeases.waiting, trans.__('Leave the queue for'));
      if (lease) {
        tell(await actions.leave(lease));
      }
    }
  });

  const ranges: Record<Range, string> = {
    '5m': trans.__('5 Minutes'),
    '1h': trans.__('1 Hour'),
    '24h': trans.__('24 Hours'),
    '7d': trans.__('7 Days')
  };
  commands.addCommand(CommandIDs.chart, {
    label: args => trans.__('Show GPU Use of the Last %1', ranges[rangeOf(args)]),
    describedBy: {
      args: {
        type: 'object',
        properties: { range: { type: 'string', enum: Object.keys(RANGES) } }
      }
    },
    execute: async args => {
      await preferences.prefer('chartRange', rangeOf(args));
      await commands.execute(CommandIDs.open);
    }
  });
  for (const range of Object.keys(RANGES)) {
    palette?.addItem({ command: CommandIDs.chart, args: { range }, category });
  }

  myLeases.changed.connect(() => commands.notifyCommandChanged());
}

function isLimited(lease: ILease): boolean {
  return typeof lease.expires_at === 'number';
}

function rangeOf(args: ReadonlyPartialJSONObject): Range {
  return typeof args.range === 'string' && args.range in RANGES ? (args.range as Range) : '5m';
}
