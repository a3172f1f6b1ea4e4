/** A table with search and sorting, which renders only the visible rows. */

import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';

import { useWindow } from '../common/windowedlist';
import { found, IColumn, sorted } from './sortrows';

export type { IColumn } from './sortrows';

interface ITable<T> {
  label: string;
  trans: TranslationBundle;
  rows: readonly T[];
  columns: readonly IColumn<T>[];
  keyOf: (row: T) => string;
  /** Buttons at the end of a row. */
  actions?: ((row: T) => React.ReactNode) | undefined;
  actionsWidth?: string;
  /** Right of the search field. */
  tools?: React.ReactNode;
  /** Shown if there are no rows. */
  empty: React.ReactNode;
  sortedBy: string;
  descending?: boolean;
}

const ROW_HEIGHT = 36;
const GAP = 12;

export function Table<T>(props: ITable<T>): JSX.Element {
  const { label, trans, rows, columns, keyOf, actions, tools, empty } = props;
  const [text, setText] = React.useState('');
  const [order, setOrder] = React.useState({
    by: props.sortedBy,
    down: props.descending ?? false
  });
  const body = React.useRef<HTMLDivElement>(null);
  const [from, to] = useWindow(body, '.jp-GPUPoolConsole-tableScroller');
  const shown = React.useMemo(
    () => sorted(found(rows, columns, text), columns, order),
    [rows, columns, text, order]
  );
  const tracks = [...columns.map(column => column.width)];
  if (actions) {
    tracks.push(props.actionsWidth ?? 'max-content');
  }
  const grid = tracks.join(' ');
  const least = tracks.reduce((sum, track) => sum + GAP + leastOf(track), GAP);
  const first = Math.max(0, Math.floor(from / ROW_HEIGHT));
  const last = Math.min(shown.length, Math.ceil(to / ROW_HEIGHT));

  const sortBy = (id: string) =>
    setOrder(before => ({ by: id, down: before.by === id && !before.down }));
  return (
    <div className="jp-GPUPoolConsole-table">
      <div className="jp-GPUPoolConsole-tableTools">
        <input
          className="jp-mod-styled"
          type="search"
          placeholder={trans.__('Search')}
          aria-label={trans.__('Search: %1', label)}
          value={text}
          onChange={event => setText(event.target.value)}
        />
        <span role="status" className="jp-GPUPoolConsole-tableCount">
          {shown.length === rows.length
            ? trans.__('%1 in all', rows.length.toLocaleString())
            : trans.__('%1 of %2', shown.length.toLocaleString(), rows.length.toLocaleString())}
        </span>
        {tools}
      </div>
      {rows.length === 0 && empty}
      <div
        className="jp-GPUPoolConsole-tableScroller"
        role="region"
        aria-label={trans.__('%1, scrollable', label)}
        tabIndex={0}
        hidden={rows.length === 0}
      >
        <div
          role="table"
          aria-label={label}
          aria-rowcount={shown.length + 1}
          style={{ minWidth: least }}
        >
          <div role="rowgroup" className="jp-GPUPoolConsole-tableHead">
            <div
              role="row"
              className="jp-GPUPoolConsole-tr"
              style={{ gridTemplateColumns: grid }}
              aria-rowindex={1}
            >
              {columns.map(({ id, title, isFigure }) => (
                <span
                  key={id}
                  role="columnheader"
                  className={isFigure ? 'jp-mod-figure' : ''}
                  aria-sort={order.by !== id ? 'none' : order.down ? 'descending' : 'ascending'}
                >
                  <button type="button" onClick={() => sortBy(id)}>
                    {title}
                    <span aria-hidden="true" className="jp-GPUPoolConsole-sort">
                      {order.by !== id ? '' : order.down ? '▼' : '▲'}
                    </span>
                  </button>
                </span>
              ))}
              {actions && (
                <span role="columnheader" className="jp-GPUPoolConsole-cellButtons">
                  <span className="jp-GPUPoolConsole-hidden">{trans.__('Actions')}</span>
                </span>
              )}
            </div>
          </div>
          <div
            ref={body}
            role="rowgroup"
            className="jp-GPUPoolConsole-tableBody"
            style={{ height: shown.length * ROW_HEIGHT }}
          >
            {shown.slice(first, last).map((row, n) => (
              <Row
                key={keyOf(row)}
                row={row}
                columns={columns}
                actions={actions}
                grid={grid}
                index={first + n}
              />
            ))}
          </div>
        </div>
      </div>
    </div>
  );
}

interface IRowProps<T> extends Pick<ITable<T>, 'columns' | 'actions'> {
  row: T;
  grid: string;
  index: number;
}

/** Rendered again only when its row has changed: scrolling leaves most rows as they are. */
const Row = React.memo(function Row<T>(props: IRowProps<T>): JSX.Element {
  const { row, columns, actions, grid, index } = props;
  return (
    <div
      role="row"
      className="jp-GPUPoolConsole-tr"
      style={{ gridTemplateColumns: grid, top: index * ROW_HEIGHT }}
      aria-rowindex={index + 2}
    >
      {columns.map(column => (
        <Cell key={column.id} column={column} row={row} />
      ))}
      {actions && (
        <span role="cell" className="jp-GPUPoolConsole-cellButtons">
          {actions(row)}
        </span>
      )}
    </div>
  );
}) as <T>(props: IRowProps<T> & { key: string }) => JSX.Element;

function Cell<T>({ column, row }: { column: IColumn<T>; row: T }): JSX.Element {
  const value = column.value(row);
  return (
    <span
      role="cell"
      className={
        column.isFigure ? 'jp-GPUPoolConsole-cell jp-mod-figure' : 'jp-GPUPoolConsole-cell'
      }
      title={typeof value === 'string' ? value : undefined}
    >
      {column.render ? column.render(row) : value}
    </span>
  );
}

/** The least width of a track, in pixels. */
function leastOf(track: string): number {
  return Number(/(\d+)px/.exec(track)?.[1] ?? 0);
}
