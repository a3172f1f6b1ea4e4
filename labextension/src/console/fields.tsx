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

interface IChoice<T extends string> {
  label: string;
  hint?: string | undefined;
  value: T;
  /** Each value with its name. */
  choices: readonly (readonly [T, string])[];
  onChange: (value: T) => void;
}

/** One of a few values. */
export function Choice<T extends string>(props: IChoice<T>): JSX.Element {
  return (
    <Field label={props.label} hint={props.hint}>
      {(id, described) => (
        <select
          id={id}
          aria-describedby={described}
          className="jp-mod-styled"
          value={props.value}
          onChange={event => props.onChange(event.target.value as T)}
        >
          {props.choices.map(([value, name]) => (
            <option key={value} value={value}>
              {name}
            </option>
          ))}
        </select>
      )}
    </Field>
  );
}

/** The lifetime of a token. */
export function Life({ trans, ...others }: ILife): JSX.Element {
  return (
    <Choice choices={lives(trans).map(([life, , name]) => [life, name] as const)} {...others} />
  );
}
