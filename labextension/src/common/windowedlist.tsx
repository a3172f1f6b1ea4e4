/** A long list of which only what can be seen is made. */

import * as React from 'react';

/** One row; its height in pixels is what its style gives it. */
export interface IRow {
  key: string;
  height: number;
}

/** How far beyond what can be seen rows are made, in pixels: what a fast wheel passes in a frame or two. */
const BEYOND = 400;

/** Of the element with that class: it scrolls, and holds the list. */
export interface IWindowedListProps<T extends IRow> {
  /** The same array as before while rows neither come nor go nor grow. */
  rows: readonly T[];
  /** Makes a row, of those that can be seen. */
  render: (row: T) => JSX.Element;
  scroller: string;
  label: string;
}

export function WindowedList<T extends IRow>({
  rows,
  render,
  scroller,
  label
}: IWindowedListProps<T>): JSX.Element {
  const list = React.useRef<HTMLUListElement>(null);
  const [from, to] = useWindow(list, scroller);

  const tops = React.useMemo(() => topsOf(rows), [rows]);
  const shown: JSX.Element[] = [];
  const first = firstFrom(tops, from);
  let top = tops[first] ?? 0;
  for (const row of rows.slice(first)) {
    if (top >= to) {
      break;
    }
    const { key, height } = row;
    shown.push(
      <li
        key={key}
        className="jp-GPUPool-row"
        style={{ top, height }}
        aria-setsize={rows.length}
        aria-posinset={first + shown.length + 1}
      >
        {render(row)}
      </li>
    );
    top += height;
  }
  return (
    <ul
      ref={list}
      className="jp-GPUPool-windowed"
      style={{ height: tops[rows.length] }}
      aria-label={label}
    >
      {shown}
    </ul>
  );
}

/** From where to where a list can be seen, in pixels of its own, and a little beyond. */
export function useWindow(
  list: React.RefObject<HTMLElement>,
  scroller: string
): readonly [number, number] {
  const [seen, see] = React.useState<readonly [number, number]>([0, 1000]);
  React.useLayoutEffect(() => {
    const node = list.current;
    const outer = node?.closest<HTMLElement>(scroller);
    if (!node || !outer) {
      return;
    }
    let frame = 0;
    const look = () => {
      frame = 0;
      const top = outer.getBoundingClientRect().top - node.getBoundingClientRect().top;
      // In steps, so that most frames of a scroll make nothing new.
      const first = Math.floor((top - BEYOND) / 200) * 200;
      const last = Math.ceil((top + outer.clientHeight + BEYOND) / 200) * 200;
      see(before => (before[0] === first && before[1] === last ? before : [first, last]));
    };
    const soon = () => {
      frame ||= requestAnimationFrame(look);
    };
    look();
    outer.addEventListener('scroll', soon, { passive: true });
    const sizes = new ResizeObserver(soon);
    sizes.observe(outer);
    // What stands above the list may grow.
    if (node.parentElement?.parentElement) {
      sizes.observe(node.parentElement.parentElement);
    }
    return () => {
      cancelAnimationFrame(frame);
      outer.removeEventListener('scroll', soon);
      sizes.disconnect();
    };
  }, [list, scroller]);
  return seen;
}

/** Where each row begins, and where the last one ends. */
function topsOf(rows: readonly IRow[]): number[] {
  const tops = [0];
  let top = 0;
  for (const { height } of rows) {
    top += height;
    tops.push(top);
  }
  return tops;
}

/** The first row that ends below `from`. */
function firstFrom(tops: readonly number[], from: number): number {
  let low = 0;
  let high = tops.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    const end = tops[middle + 1];
    if (end !== undefined && end <= from) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}
