/** The picker in a dialog: the notebook's toolbar and the command open it. */

import { Dialog } from '@jupyterlab/apputils';
import { ReactWidget } from '@jupyterlab/ui-components';
import * as React from 'react';

import { IViewContext, usePool } from '../common/viewcontext';
import { RequestForm } from './requestform';

/** Request GPUs for the active notebook. Resolves when the dialog closes. */
export async function request(context: IViewContext): Promise<void> {
  const { trans } = context;
  const title = trans.__('GPUs for this notebook');
  const dialog = new RequestDialog({
    title,
    body: ReactWidget.create(<Asking {...context} onDone={() => dialog.resolve(0)} />),
    buttons: [Dialog.cancelButton({ label: trans.__('Close') })],
    focusNodeSelector: 'input',
    hasClose: true
  });
  // JupyterLab names a dialog by a body of text alone.
  dialog.node.setAttribute('aria-label', title);
  dialog.addClass('jp-GPUPool-dialog');
  await dialog.launch();
}

class RequestDialog extends Dialog<void> {
  /** Enter in the form is the form's: it asks, and closes when that went well. */
  protected override _evtKeydown(event: KeyboardEvent): void {
    const body = this.node.querySelector('.jp-Dialog-body');
    if (event.key !== 'Enter' || !body?.contains(event.target as Node)) {
      super._evtKeydown(event);
    }
  }
}

function Asking(props: IViewContext & { onDone: () => void }): JSX.Element {
  const { pool, trans } = props;
  const { state, connection } = usePool(pool);
  React.useEffect(() => {
    const watching = pool.watch();
    return () => watching.dispose();
  }, [pool]);
  if (state) {
    return <RequestForm {...props} state={state} />;
  }
  return (
    <p role="status">
      {connection.status === 'lost'
        ? trans.__('Cannot reach the pool: %1', connection.reason || trans.__('no connection'))
        : trans.__('Loading the pool…')}
    </p>
  );
}
