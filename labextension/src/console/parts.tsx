/** Small things that the views of the Console share. No part of JupyterLab's shell is needed for them. */

import * as React from 'react';

import { IAsked } from './asked';

type ButtonProps = React.ButtonHTMLAttributes<HTMLButtonElement> & {
  kind?: 'accept' | 'warn' | 'plain';
};

/** A button as JupyterLab has them. */
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

/** A word with a colour; the word alone says it too. */
export function Badge({ tone, children }: React.PropsWithChildren<{ tone: Tone }>): JSX.Element {
  return <span className={`jp-GPUPoolConsole-state jp-mod-${tone}`}>{children}</span>;
}

/** Where there is nothing to show: what that means, and what to do. */
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
  hint?: string;
  children: (id: string, hint: string | undefined) => JSX.Element;
}

/** A label, what it is for, and what a line says about it. */
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

/** What was asked for, or why it is not there. */
export function Asked<T>(props: {
  asked: IAsked<T>;
  wait: string;
  children: (answer: T) => JSX.Element;
}): JSX.Element {
  const { asked, wait, children } = props;
  if (asked.answer !== null) {
    return children(asked.answer);
  }
  return asked.trouble ? <Trouble>{asked.trouble}</Trouble> : <p role="status">{wait}</p>;
}
