/** The fields of the Console's forms: a line of text, a number, and a lifetime. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { lives } from './durations';
import { Field } from './parts';

interface IInput extends Omit<React.InputHTMLAttributes<HTMLInputElement>, 'onChange' | 'value'> {
  label: string;
  hint?: string | undefined;
  value: string;
  onChange: (value: string) => void;
}

/** One line of text. */
export function Text({ label, hint, onChange, ...others }: IInput): JSX.Element {
  return (
    <Field label={label} hint={hint}>
      {(id, described) => (
        <input
          id={id}
          className="jp-mod-styled"
          aria-describedby={described}
          onChange={event => onChange(event.target.value)}
          {...others}
        />
      )}
    </Field>
  );
}

/** A number from 0 up, kept as text: the pool refuses what is no number, with a message. */
export function Figure(props: IInput): JSX.Element {
  return <Text type="number" min={0} step="any" {...props} />;
}

interface ILife {
  label: string;
  hint?: string | undefined;
  /** One of `lives`, by its id. */
  value: string;
  trans: TranslationBundle;
  onChange: (value: string) => void;
}

/** The lifetime of a token. */
export function Life({ label, hint, value, trans, onChange }: ILife): JSX.Element {
  return (
    <Field label={label} hint={hint}>
      {(id, described) => (
        <select
          id={id}
          aria-describedby={described}
          className="jp-mod-styled"
          value={value}
          onChange={event => onChange(event.target.value)}
        >
          {lives(trans).map(([life, , name]) => (
            <option key={life} value={life}>
              {name}
            </option>
          ))}
        </select>
      )}
    </Field>
  );
}
