/** Small components that the Console's views share. They do not need JupyterLab's shell. */

import * as React from 'react';

import { IRequestResult } from './hooks';

type ButtonProps = React.ButtonHTMLAttributes<HTMLButtonElement> & {
  kind?: 'accept' | 'warn' | 'plain';
};

/** A button in JupyterLab's style. */
export function Button({ kind = 'plain', className, ...others }: ButtonProps): JSX.Element {
  const mod = kind === 'plain' ? '' : ` jp-mod-${kind}`;
  return (
    <button
      type="button"
      className={`jp-Button jp-mod-styled${mod} ${className ?? ''}`}
      {...others}
    />
  );
}

export type Tone = 'good' | 'wait' | 'bad' | 'plain';

/** A word with a colour; the word is clear without the colour. */
export function Badge({ tone, children }: React.PropsWithChildren<{ tone: Tone }>): JSX.Element {
  return <span className={`jp-GPUPoolConsole-state jp-mod-${tone}`}>{children}</span>;
}

/** Shown if there is nothing to show: what that means, and what to do. */
export function Empty({
  title,
  children
}: React.PropsWithChildren<{ title: string }>): JSX.Element {
  return (
    <div className="jp-GPUPoolConsole-empty">
      <p>
        <strong>{title}</strong>
      </p>
      {children}
    </div>
  );
}

export function Trouble({ children }: React.PropsWithChildren): JSX.Element | null {
  return children ? (
    <p role="alert" className="jp-GPUPool-trouble">
      {children}
    </p>
  ) : null;
}

/** Lines to type into a terminal. */
export function Commands({ lines }: { lines: readonly string[] }): JSX.Element {
  return (
    <pre className="jp-GPUPoolConsole-commands" tabIndex={0}>
      {lines.join('\n')}
    </pre>
  );
}

interface IField {
  label: string;
  hint?: string | undefined;
  children: (id: string, hint: string | undefined) => JSX.Element;
}

/** A label, its field, and a line of help. */
export function Field({ label, hint, children }: IField): JSX.Element {
  const id = React.useId();
  return (
    <div className="jp-GPUPoolConsole-formField">
      <label htmlFor={id}>{label}</label>
      {children(id, hint ? `${id}-hint` : undefined)}
      {hint && (
        <span id={`${id}-hint`} className="jp-GPUPoolConsole-formHint">
          {hint}
        </span>
      )}
    </div>
  );
}

/** The answer to a request, or why there is none. */
export function RequestResult<T>(props: {
  asked: IRequestResult<T>;
  wait: string;
  children: (answer: T) => JSX.Element;
}): JSX.Element {
  const { asked, wait, children } = props;
  if (asked.answer !== null) {
    return children(asked.answer);
  }
  return asked.trouble ? <Trouble>{asked.trouble}</Trouble> : <p role="status">{wait}</p>;
}
