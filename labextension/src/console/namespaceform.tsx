/** The form of a namespace: its limits and members. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { AdminAPI, ILimits, INamespace, Role } from './adminapi';
import { Form } from './dialog';
import { Choice, Figure, Text } from './fields';
import { Button } from './parts';

interface INamespaceForm {
  adminAPI: AdminAPI;
  /** Null for a new namespace. */
  before: INamespace | null;
  trans: TranslationBundle;
  onClose: () => void;
}

interface IMember {
  owner: string;
  role: Role;
}

/** What becomes of idle leases while somebody waits; the pool's default where the namespace says nothing. */
type Reclaim = NonNullable<INamespace['reclaim']> | 'default';

const ROLES: readonly Role[] = ['view', 'use', 'administer'];

export function NamespaceForm({ adminAPI, before, trans, onClose }: INamespaceForm) {
  const [name, setName] = React.useState('');
  const [description, setDescription] = React.useState(before?.description ?? '');
  const [limits, setLimits] = React.useState(() => textsOf(before?.limits ?? {}));
  const [weight, setWeight] = React.useState(String(before?.weight ?? 1));
  const [names, setNames] = React.useState(before?.names_holders ?? false);
  const [reclaim, setReclaim] = React.useState<Reclaim>(before?.reclaim ?? 'default');
  const [members, setMembers] = React.useState<readonly IMember[]>(() =>
    Object.entries(before?.members ?? {}).map(([owner, role]) => ({ owner, role }))
  );
  const save = () => {
    const fields = {
      description,
      limits: valuesOf(limits),
      weight: Number(weight),
      names_holders: names,
      reclaim: reclaim === 'default' ? null : reclaim,
      members: Object.fromEntries(
        members.filter(({ owner }) => owner.trim()).map(({ owner, role }) => [owner.trim(), role])
      )
    };
    return before
      ? adminAPI.changeNamespace(before.name, fields)
      : adminAPI.createNamespace({ name, ...fields });
  };
  const figures: [keyof ILimits, string, string][] = [
    ['memory_mib', trans.__('Memory in MiB'), trans.__('all of its leases together')],
    ['gpus', trans.__('Whole GPUs'), trans.__('shares added up: two halves are one')],
    ['leases', trans.__('Leases'), trans.__('at a time')],
    ['user_share', trans.__('Share of one user'), trans.__('of the above: 0.5 is half')],
    ['lease_s', trans.__('Longest lease in seconds'), trans.__('then it ends')],
    ['idle_s', trans.__('Idle seconds'), trans.__('without computing, then it ends')],
    [
      'reclaim_after_s',
      trans.__('Seconds before parking'),
      trans.__('an idle lease keeps its GPUs so long while others wait')
    ]
  ];
  return (
    <Form
      title={before ? trans.__('Namespace “%1”', before.name) : trans.__('New namespace')}
      accept={before ? trans.__('Save') : trans.__('Create')}
      cancel={trans.__('Cancel')}
      action={save}
      onClose={onClose}
    >
      {!before && (
        <Text
          label={trans.__('Name')}
          hint={trans.__('Letters, digits, - and _')}
          autoFocus
          required
          maxLength={63}
          value={name}
          onChange={setName}
        />
      )}
      <Text
        label={trans.__('Description')}
        maxLength={200}
        value={description}
        onChange={setDescription}
      />
      <fieldset className="jp-GPUPoolConsole-limits">
        <legend>{trans.__('Limits (empty: no limit)')}</legend>
        {figures.map(([key, label, hint]) => (
          <Figure
            key={key}
            label={label}
            hint={hint}
            value={limits[key]}
            onChange={value => setLimits({ ...limits, [key]: value })}
          />
        ))}
        <Figure
          label={trans.__('Weight')}
          hint={trans.__('share of the pool when requests queue: 2 gets twice as much as 1')}
          value={weight}
          onChange={setWeight}
        />
      </fieldset>
      <Choice
        label={trans.__('Idle leases while somebody waits')}
        hint={trans.__('a parked lease keeps its tensors and wakes by itself')}
        value={reclaim}
        choices={[
          ['default', trans.__('as the pool’s default')],
          ['never', trans.__('keep their GPUs')],
          ['idle', trans.__('are parked')]
        ]}
        onChange={setReclaim}
      />
      <label className="jp-GPUPool-check">
        <input type="checkbox" checked={names} onChange={event => setNames(event.target.checked)} />
        {trans.__('Show members who holds which GPU slices')}
      </label>
      <Members members={members} trans={trans} onChange={setMembers} />
    </Form>
  );
}

interface IMembers {
  members: readonly IMember[];
  trans: TranslationBundle;
  onChange: (members: readonly IMember[]) => void;
}

function Members({ members, trans, onChange }: IMembers): JSX.Element {
  const change = (n: number, fields: Partial<IMember>) =>
    onChange(members.map((member, m) => (m === n ? { ...member, ...fields } : member)));
  const roles: Record<Role, string> = {
    view: trans.__('can view'),
    use: trans.__('can use'),
    administer: trans.__('administrator')
  };
  return (
    <fieldset className="jp-GPUPoolConsole-members">
      <legend>{trans.__('Members')}</legend>
      {members.map(({ owner, role }, n) => (
        <div key={n}>
          <input
            className="jp-mod-styled"
            aria-label={trans.__('Member %1', n + 1)}
            value={owner}
            onChange={event => change(n, { owner: event.target.value })}
          />
          <select
            className="jp-mod-styled"
            aria-label={trans.__('Role of %1', owner || trans.__('member %1', n + 1))}
            value={role}
            onChange={event => change(n, { role: event.target.value as Role })}
          >
            {ROLES.map(value => (
              <option key={value} value={value}>
                {roles[value]}
              </option>
            ))}
          </select>
          <Button
            className="jp-mod-small"
            aria-label={trans.__('Remove %1', owner || trans.__('member %1', n + 1))}
            onClick={() => onChange(members.filter((_, m) => m !== n))}
          >
            {trans.__('Remove')}
          </Button>
        </div>
      ))}
      <Button
        className="jp-mod-small"
        onClick={() => onChange([...members, { owner: '', role: 'use' }])}
      >
        {trans.__('Add a member')}
      </Button>
    </fieldset>
  );
}

type Texts = Record<keyof ILimits, string>;

function textsOf(limits: Partial<ILimits>): Texts {
  const text = (key: keyof ILimits) => String(limits[key] ?? '');
  return {
    memory_mib: text('memory_mib'),
    gpus: text('gpus'),
    leases: text('leases'),
    user_share: text('user_share'),
    lease_s: text('lease_s'),
    idle_s: text('idle_s'),
    reclaim_after_s: text('reclaim_after_s')
  };
}

/** The pool refuses what is no number, with a message. */
function valuesOf(texts: Texts): ILimits {
  const value = (key: keyof ILimits) => (texts[key].trim() === '' ? null : Number(texts[key]));
  return {
    memory_mib: value('memory_mib'),
    gpus: value('gpus'),
    leases: value('leases'),
    user_share: value('user_share'),
    lease_s: value('lease_s'),
    idle_s: value('idle_s'),
    reclaim_after_s: value('reclaim_after_s')
  };
}
