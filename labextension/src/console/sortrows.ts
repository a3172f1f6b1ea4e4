/** Which rows of a table are shown, and in which order. Pure. */

import type { ReactNode } from 'react';

export interface IColumn<T> {
  id: string;
  title: string;
  /** A track of a CSS grid. */
  width: string;
  /** The value by which rows are sorted and searched; null comes last. */
  value: (row: T) => string | number | null;
  render?: (row: T) => ReactNode;
  isFigure?: boolean;
}

/** The rows that contain every word of the text. */
export function found<T>(
  rows: readonly T[],
  columns: readonly IColumn<T>[],
  text: string
): readonly T[] {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) {
    return rows;
  }
  return rows.filter(row => {
    const hay = columns
      .map(column => column.value(row) ?? '')
      .join('\n')
      .toLowerCase();
    return words.every(word => hay.includes(word));
  });
}

/** A sorted copy; rows without a value come last in both directions. */
export function sorted<T>(
  rows: readonly T[],
  columns: readonly IColumn<T>[],
  order: { by: string; down: boolean }
): readonly T[] {
  const column = columns.find(({ id }) => id === order.by);
  if (!column) {
    return rows;
  }
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: 'base' });
  const sign = order.down ? -1 : 1;
  return rows
    .map(row => [column.value(row), row] as const)
    .sort(([a], [b]) => {
      if (a === null || b === null) {
        return Number(a === null) - Number(b === null);
      }
      return typeof a === 'number' && typeof b === 'number'
        ? sign * (a - b)
        : sign * collator.compare(String(a), String(b));
    })
    .map(([, row]) => row);
}
