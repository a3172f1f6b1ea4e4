/** The page's translation bundle, which leaves texts as they are. */

import { TranslationBundle } from '@jupyterlab/translation';

function filled(text: string, args: readonly unknown[]): string {
  return text.replace(/%(\d+)/g, (_, n: string) => String(args[Number(n) - 1] ?? ''));
}

const plural = (one: string, many: string, n: number, ...args: unknown[]) =>
  filled(n === 1 ? one : many, [n, ...args]);
const single = (text: string, ...args: unknown[]) => filled(text, args);

export const words: TranslationBundle = {
  __: single,
  gettext: single,
  _n: plural,
  ngettext: plural,
  _p: (_: string, text: string, ...args: unknown[]) => filled(text, args),
  pgettext: (_: string, text: string, ...args: unknown[]) => filled(text, args),
  _np: (_: string, ...args: Parameters<typeof plural>) => plural(...args),
  npgettext: (_: string, ...args: Parameters<typeof plural>) => plural(...args),
  dcnpgettext: (_: string, __: string, ...args: Parameters<typeof plural>) => plural(...args)
};
