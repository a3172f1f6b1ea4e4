/** A question or a form in the browser's own modal dialog, which keeps the focus. */

import * as React from 'react';

import { useAct } from './hooks';
import { Button, Trouble } from './parts';

interface IModal {
  title: string;
  onClose: () => void;
}

export function Modal({ title, onClose, children }: React.PropsWithChildren<IModal>): JSX.Element {
  const node = React.useRef<HTMLDialogElement>(null);
  const id = React.useId();
  React.useLayoutEffect(() => {
    const dialog = node.current;
    dialog?.showModal();
    return () => dialog?.close(); // which gives the focus back
  }, []);
  return (
    <dialog
      ref={node}
      className="jp-GPUPoolConsole-dialog"
      aria-labelledby={id}
      onCancel={event => {
        event.preventDefault();
        onClose();
      }}
      // Keys typed here must not trigger the page's shortcuts.
      onKeyDown={event => event.stopPropagation()}
    >
      <h2 id={id}>{title}</h2>
      {children}
    </dialog>
  );
}

interface IForm extends IModal {
  accept: string;
  cancel: string;
  kind?: 'accept' | 'warn';
  /** Resolves when the action is done; the dialog shows the reason of a rejection. */
  action: () => Promise<unknown>;
  /** Called after a success instead of `onClose`. */
  onDone?: () => void;
}

/** The dialog's content, and a button that runs its action. */
export function Form(props: React.PropsWithChildren<IForm>): JSX.Element {
  const { title, accept, cancel, kind = 'accept', action, onClose, onDone, children } = props;
  const { acting, trouble, act } = useAct();
  const submit = async () => {
    if (await act(action)) {
      (onDone ?? onClose)();
    }
  };
  return (
    <Modal title={title} onClose={onClose}>
      <form
        noValidate // what is wrong the pool says, in words
        onSubmit={event => {
          event.preventDefault();
          void submit();
        }}
      >
        <div className="jp-GPUPoolConsole-dialogBody">
          {children}
          <Trouble>{trouble}</Trouble>
        </div>
        <div className="jp-GPUPoolConsole-dialogButtons">
          <Button onClick={onClose}>{cancel}</Button>
          <Button type="submit" kind={kind} disabled={acting}>
            {accept}
          </Button>
        </div>
      </form>
    </Modal>
  );
}
