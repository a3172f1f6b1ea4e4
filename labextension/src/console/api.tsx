/** The pool's HTTP interface, for people who write programs: its calls and objects, from its OpenAPI document. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { asCommand, callsOf, ICall, IDocument, IField, matching, objectsOf } from './apicalls';
import { IConsoleProps } from './context';
import { useRequest } from './hooks';
import { Commands, Empty, RequestResult } from './parts';

export function API({ adminAPI, trans }: IConsoleProps): JSX.Element {
  const asked = useRequest(() => adminAPI.openAPI());
  return (
    <RequestResult asked={asked} wait={trans.__('Loading the description of the calls…')}>
      {description => <Calls description={description} base={adminAPI.base} trans={trans} />}
    </RequestResult>
  );
}

interface ICalls {
  description: IDocument;
  base: string;
  trans: TranslationBundle;
}

function Calls({ description, base, trans }: ICalls): JSX.Element {
  const [search, setSearch] = React.useState('');
  const calls = React.useMemo(() => callsOf(description), [description]);
  const objects = React.useMemo(() => objectsOf(description), [description]);
  const text = React.useMemo(() => JSON.stringify(description, null, 2), [description]);
  const shown = matching(calls, search);
  return (
    <>
      <p>
        {trans.__(
          'The calls of this pool, version %1. Each needs a token, and acts for its user.',
          description.info.version
        )}{' '}
        <a
          download="openapi.json"
          href={`data:application/json;charset=utf-8,${encodeURIComponent(text)}`}
        >
          {trans.__('Download as OpenAPI document')}
        </a>
      </p>
      <input
        type="search"
        className="jp-mod-styled"
        aria-label={trans.__('Search calls')}
        placeholder={trans.__('Search')}
        value={search}
        onChange={event => setSearch(event.target.value)}
      />
      <section aria-label={trans.__('Calls')}>
        <h2>{trans.__('Calls')}</h2>
        {shown.length === 0 && <Empty title={trans.__('No call matches.')} />}
        {shown.map(call => (
          <Call key={call.id} call={call} base={base} trans={trans} />
        ))}
      </section>
      <section aria-label={trans.__('Objects')}>
        <h2>{trans.__('Objects')}</h2>
        {objects.map(one => (
          <details key={one.name} id={idOf(one.name)} className="jp-GPUPoolConsole-call">
            <summary>
              <code>{one.name}</code> <Prose text={one.description} />
            </summary>
            {one.fields.length > 0 ? (
              <Fields label={one.name} fields={one.fields} trans={trans} />
            ) : (
              <p>
                <code>{one.kind}</code>
              </p>
            )}
          </details>
        ))}
      </section>
    </>
  );
}

interface ICallProps {
  call: ICall;
  base: string;
  trans: TranslationBundle;
}

function Call({ call, base, trans }: ICallProps): JSX.Element {
  return (
    <details className="jp-GPUPoolConsole-call">
      <summary>
        <code>
          {call.method} {call.path}
        </code>{' '}
        <Prose text={call.summary} />
      </summary>
      {call.parameters.length > 0 && (
        <Fields label={trans.__('Parameters')} fields={call.parameters} trans={trans} />
      )}
      {call.body && (
        <p>
          {trans.__('Body:')} <Reference name={call.body} />
        </p>
      )}
      <table aria-label={trans.__('Answers')}>
        <tbody>
          {call.answers.map(({ status, description, brings }) => (
            <tr key={status}>
              <th scope="row">{status}</th>
              <td>{brings && <Reference name={brings} />}</td>
              <td>
                <Prose text={description} />
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      <Commands lines={[asCommand(call, base)]} />
    </details>
  );
}

/** A button that opens an object's entry: an address with a fragment would leave JupyterLab's. */
function Reference({ name }: { name: string }): JSX.Element {
  const open = (event: React.MouseEvent<HTMLElement>) => {
    const entry = event.currentTarget.ownerDocument.getElementById(idOf(name));
    if (entry instanceof HTMLDetailsElement) {
      entry.open = true;
      entry.querySelector('summary')?.focus();
      entry.scrollIntoView({ block: 'nearest' });
    }
  };
  return (
    <button type="button" className="jp-GPUPoolConsole-reference" onClick={open}>
      {name}
    </button>
  );
}

interface IFields {
  label: string;
  fields: readonly IField[];
  trans: TranslationBundle;
}

function Fields({ label, fields, trans }: IFields): JSX.Element {
  return (
    <table aria-label={label}>
      <tbody>
        {fields.map(field => (
          <tr key={field.name}>
            <th scope="row">
              <code>{field.name}</code>
            </th>
            <td>
              {[field.where, field.kind, field.required ? trans.__('required') : '']
                .filter(Boolean)
                .join(' · ')}
            </td>
            <td>
              <Prose text={field.description} />
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** What stands between backticks is code. */
function Prose({ text }: { text: string }): JSX.Element {
  const pieces = text.split('`');
  return <>{pieces.map((piece, n) => (n % 2 ? <code key={n}>{piece}</code> : piece))}</>;
}

function idOf(name: string): string {
  return `jp-gpupool-console-object-${name}`;
}
