/** The fields that the Console's forms are made of: one line of text, a figure, and how long something is to last. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { lives } from './lives';
import { Field } from './parts';

interface IInput extends Omit<React.InputHTMLAttributes<HTMLInputElement>, 'onChange' | 'value'> {
  label: string;
  hint?: string;
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

/** A figure from 0 up; as text, for what is no number the pool refuses, in words. */
export function Figure(props: IInput): JSX.Element {
  return <Text type="number" min={0} step="any" {...props} />;
}

interface ILife {
  label: string;
  hint?: string;
  /** One of `lives`, by its id. */
  value: string;
  trans: TranslationBundle;
  onChange: (value: string) => void;
}

/** How long a token is to be valid. */
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
