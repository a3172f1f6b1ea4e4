/** The GPUs by server: a bar for each, divided by its slices. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { IViewProps } from '../common/viewcontext';
import { age, exactly, plain, share } from '../common/format';
import { IGPU, ILease, IServer, ISlice } from '../pool/apitypes';
import { IRow, WindowedList } from '../common/windowedlist';

const SERVER_HEIGHT = 28;
const GPU_HEIGHT = 58;

/** A server, or the GPU whose uuid is the key. */
interface IGPURow extends IRow {
  server?: IServer;
}

export function GPUsView({ state, slices, trans }: IViewProps): JSX.Element {
  const { servers, gpus, leases } = state;
  const { me } = slices.myLeases;
  const rows = React.useMemo(
    () =>
      servers.flatMap((server): IGPURow[] => [
        { key: `server ${server.name}`, height: SERVER_HEIGHT, server },
        ...server.gpus.map(uuid => ({ key: uuid, height: GPU_HEIGHT }))
      ]),
    [servers]
  );
  const render = ({ key, server }: IGPURow) => {
    const gpu = gpus[key];
    return server ? (
      <Server server={server} trans={trans} />
    ) : gpu ? (
      <GPU gpu={gpu} me={me} leases={leases} trans={trans} />
    ) : (
      <></>
    );
  };
  return (
    <section aria-label={trans.__('GPUs')}>
      <h3>{trans.__('GPUs')}</h3>
      <WindowedList
        rows={rows}
        render={render}
        scroller=".jp-GPUPool"
        label={trans.__('GPUs by server')}
      />
    </section>
  );
}

interface ITranslated {
  trans: TranslationBundle;
}

function Server({ server, trans }: ITranslated & { server: IServer }): JSX.Element {
  return (
    <h4 className="jp-GPUPool-server" title={server.host}>
      {trans._n('%2: %1 GPU', '%2: %1 GPUs', server.gpus.length, server.name)}
    </h4>
  );
}

interface IGPUProps extends ITranslated {
  gpu: IGPU;
  me: string | null;
  leases: Readonly<Record<string, ILease>>;
}

/** A bar changes with its GPU and, seldom, with its holders. */
const GPU = React.memo(
  function GPU({ gpu, me, leases, trans }: IGPUProps): JSX.Element {
    // The badge says it, in the user's language.
    const name = gpu.emulated ? gpu.name.replace(/ *\(emulated\)$/, '') : gpu.name;
    const granted =
      gpu.memory_mib > 0
        ? trans.__('%1 of %2 granted', plain(gpu.granted_mib), exactly(gpu.memory_mib, trans))
        : trans.__('memory usage unavailable');
    const busy = trans.__('%1 busy', share(gpu.busy));
    return (
      <>
        <div className="jp-GPUPool-name">
          <span className="jp-GPUPool-index">{gpu.index}</span>
          <span className="jp-GPUPool-model" title={`${name} · ${gpu.uuid}`}>
            {name}
          </span>
          {gpu.emulated && (
            <span
              className="jp-GPUPool-badge"
              title={trans.__('No hardware: a CPU does the work of this GPU')}
            >
              {trans.__('emulated')}
            </span>
          )}
          {!gpu.healthy && (
            <span className="jp-GPUPool-badge jp-mod-warn">{trans.__('unhealthy')}</span>
          )}
        </div>
        <div
          className="jp-GPUPool-bar"
          role="meter"
          aria-label={trans.__('Granted memory of GPU %1 of %2', gpu.index, gpu.server)}
          aria-valuemin={0}
          aria-valuemax={Math.max(1, gpu.memory_mib)}
          aria-valuenow={gpu.granted_mib}
          aria-valuetext={`${granted}, ${busy}`}
        >
          {gpu.slices.map((slice, n) => (
            <Piece
              key={slice.lease ?? n}
              slice={slice}
              isMine={slice.lease !== null && (me === null || slice.owner === me)}
              total={gpu.memory_mib}
              lease={slice.lease === null ? undefined : leases[slice.lease]}
              trans={trans}
            />
          ))}
        </div>
        <div className="jp-GPUPool-figures">
          <span title={granted}>{granted}</span>
          <span>{busy}</span>
        </div>
      </>
    );
  },
  (a, b) =>
    a.gpu === b.gpu &&
    a.me === b.me &&
    a.trans === b.trans &&
    (a.leases === b.leases ||
      a.gpu.slices.every(({ lease }) => lease === null || a.leases[lease] === b.leases[lease]))
);

/** The frameworks' own spellings of their names. */
const FRAMEWORKS: { [name: string]: string } = { torch: 'PyTorch', jax: 'JAX' };

interface IPieceProps extends ITranslated {
  slice: ISlice;
  isMine: boolean;
  total: number;
  lease: ILease | undefined;
}

/** One slice: as wide as its share, filled as far as its memory is used. */
function Piece({ slice, isMine, total, lease, trans }: IPieceProps): JSX.Element {
  const [title, describe] = React.useState('');
  const width = total > 0 ? (100 * slice.memory_mib) / total : 0;
  const used = slice.memory_mib > 0 ? (100 * slice.used_mib) / slice.memory_mib : 0;
  // How old it is is only looked up for who points at it.
  const point = () => describe(story(slice, lease, trans));
  return (
    <span
      className={isMine ? 'jp-GPUPool-piece jp-mod-mine' : 'jp-GPUPool-piece'}
      style={{ width: `${Math.min(100, width)}%` }}
      title={title}
      onPointerEnter={point}
    >
      <span style={{ width: `${Math.min(100, used)}%` }} />
    </span>
  );
}

/** Who holds it, what for, how much, and since when. */
function story(slice: ISlice, lease: ILease | undefined, trans: TranslationBundle): string {
  const lines = [slice.owner ?? trans.__('Another user')];
  if (slice.label) {
    lines.push(slice.label);
  }
  lines.push(
    trans.__(
      '%1 of %2 used, %3 busy',
      plain(slice.used_mib),
      exactly(slice.memory_mib, trans),
      share(slice.busy)
    )
  );
  if (slice.frameworks?.length) {
    const names = slice.frameworks.map(name => FRAMEWORKS[name] ?? name);
    lines.push(trans.__('used by %1', names.join(', ')));
  }
  if (lease?.granted_at) {
    lines.push(trans.__('for %1', age(Date.now() / 1000 - lease.granted_at, trans)));
  }
  return lines.join('\n');
}
