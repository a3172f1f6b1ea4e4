/** Sentences untranslated, as JupyterLab makes them where there is no translation. */

import type { TranslationBundle } from '@jupyterlab/translation';

function filled(text: string, values: unknown[]): string {
  return text.replace(/%(\d+)/g, (_, n: string) => String(values[Number(n) - 1]));
}

export const english = {
  __: (text: string, ...values: unknown[]) => filled(text, values),
  _n: (one: string, many: string, count: number, ...values: unknown[]) =>
    filled(count === 1 ? one : many, [count, ...values])
} as unknown as TranslationBundle;
