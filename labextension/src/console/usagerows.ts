/** The rows of the report of usage, as text. Pure. */

import { IUsageRow, UsageBy } from './adminapi';

export const HOURS = ['granted_h', 'computing_h', 'idle_h', 'unknown_h', 'parked_h'] as const;

const FIGURES = new Intl.NumberFormat(undefined, {
  minimumFractionDigits: 1,
  maximumFractionDigits: 1
});

/** Hours; less than a tenth of an hour, but some, is no zero. */
export function figure(hours: number): string {
  return hours > 0 && hours < 0.05 ? `< ${FIGURES.format(0.1)}` : FIGURES.format(hours);
}

/** The columns are those of `gpupool usage --csv`. */
export function asCSV(by: UsageBy, rows: readonly IUsageRow[]): string {
  const lines = rows.map(row => [row.name, row.gpu, row.leases, ...HOURS.map(field => row[field])]);
  return [[by, 'server_and_index', 'leases', ...HOURS], ...lines]
    .map(line => line.map(cell).join(',') + '\n')
    .join('');
}

function cell(value: string | number): string {
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}
