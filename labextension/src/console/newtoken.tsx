/** The dialog that creates a token and offers its bundle, once. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IWhoAmI } from '../pool/apitypes';
import { AdminAPI, INewToken } from './adminapi';
import { useRequest } from './hooks';
import { Form, Modal } from './dialog';
import { Choice, Life, Text } from './fields';
import { lifeOf, USUAL_LIFE } from './durations';
import { Button, Commands } from './parts';

interface INewTokenProps {
  adminAPI: AdminAPI;
  who: IWhoAmI | null;
  trans: TranslationBundle;
  onClose: () => void;
}

interface IBundle {
  name: string;
  url: string;
}

export function NewToken(props: INewTokenProps): JSX.Element {
  const { adminAPI, trans, onClose } = props;
  const [bundle, setBundle] = React.useState<IBundle | null>(null);
  React.useEffect(() => (bundle ? () => URL.revokeObjectURL(bundle.url) : undefined), [bundle]);
  return bundle ? (
    <Made bundle={bundle} trans={trans} onClose={onClose} />
  ) : (
    <Wanted
      {...props}
      onMake={async token => {
        const { name, data } = await adminAPI.createToken(token);
        setBundle({ name, url: URL.createObjectURL(data) });
      }}
    />
  );
}

function Wanted(props: INewTokenProps & { onMake: (token: INewToken) => Promise<void> }) {
  const { adminAPI, trans, onMake, onClose } = props;
  const [description, setDescription] = React.useState('');
  const [owner, setOwner] = React.useState('');
  const [namespace, setNamespace] = React.useState('default');
  const [administers, setAdministers] = React.useState(false);
  const [scope, setScope] = React.useState<INewToken['scope']>('administer');
  const [confined, confine] = React.useState(false);
  const [chosen, choose] = React.useState(USUAL_LIFE);
  const namespaces = useRequest(() => adminAPI.namespaces());
  const id = React.useId();
  const life = lifeOf(chosen, trans);
  return (
    <Form
      title={trans.__('New token')}
      accept={trans.__('Create and download')}
      cancel={trans.__('Cancel')}
      action={() =>
        onMake({
          description,
          owner,
          namespace,
          administers,
          expires_s: life,
          scope,
          one_namespace: confined && !administers
        })
      }
      onDone={() => undefined} // the bundle is shown next
      onClose={onClose}
    >
      <Text
        label={trans.__('Description')}
        hint={trans.__('Whom, or what, is it for?')}
        autoFocus
        required
        maxLength={200}
        value={description}
        onChange={setDescription}
      />
      <Text
        label={trans.__('Owner')}
        hint={trans.__('Tokens of one owner share their leases. Empty: an owner of its own.')}
        maxLength={200}
        value={owner}
        onChange={setOwner}
      />
      <Text
        label={trans.__('Namespace')}
        hint={trans.__('Its leases count against the limits of this namespace.')}
        list={`${id}-namespaces`}
        value={namespace}
        onChange={setNamespace}
      />
      <datalist id={`${id}-namespaces`}>
        {(namespaces.answer ?? []).map(({ name }) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      <Life label={trans.__('Valid')} value={chosen} trans={trans} onChange={choose} />
      <Choice
        label={trans.__('Scope')}
        value={scope}
        choices={[
          ['administer', trans.__('whatever its owner may')],
          ['lease', trans.__('reads, and requests and releases GPUs')],
          ['read', trans.__('only reads')]
        ]}
        onChange={setScope}
      />
      {!administers && (
        <label className="jp-GPUPool-check">
          <input
            type="checkbox"
            checked={confined}
            onChange={event => confine(event.target.checked)}
          />
          {trans.__('Changes nothing outside of its namespace')}
        </label>
      )}
      <label className="jp-GPUPool-check">
        <input
          type="checkbox"
          checked={administers}
          onChange={event => setAdministers(event.target.checked)}
        />
        {trans.__('Administers the pool: sees and does everything')}
      </label>
    </Form>
  );
}

/** The download starts automatically; the link repeats it while the dialog is open. */
function Made(props: { bundle: IBundle; trans: TranslationBundle; onClose: () => void }) {
  const { bundle, trans, onClose } = props;
  const link = React.useRef<HTMLAnchorElement>(null);
  React.useEffect(() => link.current?.click(), []);
  return (
    <Modal title={trans.__('The token is made')} onClose={onClose}>
      <div className="jp-GPUPoolConsole-dialogBody">
        <p role="status">
          {trans.__(
            'Its bundle was downloaded. Keep it safe: it is nowhere else, and cannot be had again.'
          )}
        </p>
        <p>
          <a ref={link} href={bundle.url} download={bundle.name}>
            {bundle.name}
          </a>
        </p>
        <p>{trans.__('Unpack it where its user is:')}</p>
        <Commands lines={[`mkdir -p ~/.gpupool && tar -xf ${bundle.name} -C ~/.gpupool`]} />
      </div>
      <div className="jp-GPUPoolConsole-dialogButtons">
        <Button kind="accept" autoFocus onClick={onClose}>
          {trans.__('Done')}
        </Button>
      </div>
    </Modal>
  );
}
