/** Requests to the pool, repeated when something has changed. */

import * as React from 'react';

import { PoolError } from '../pool/api';

export interface IRequestResult<T> {
  /** Null before the first answer, and after a refusal. */
  answer: T | null;
  /** Why there is no answer; empty if there is one, or while it is awaited. */
  trouble: string;
  /** The HTTP status of the refusal; 0 without one. */
  status: number;
  again: () => void;
}

/** `every`: repeat after this many milliseconds while the page is visible; 0 for never. */
export function useRequest<T>(ask: () => Promise<T>, every = 0): IRequestResult<T> {
  const [count, again] = React.useReducer((n: number) => n + 1, 0);
  const [told, tell] = React.useState<Omit<IRequestResult<T>, 'again'>>({
    answer: null,
    trouble: '',
    status: 0
  });
  const asking = React.useRef(ask);
  React.useEffect(() => {
    asking.current = ask;
  });
  React.useEffect(() => {
    let over = false;
    let timer: ReturnType<typeof setTimeout> | undefined;
    const look = async () => {
      if (document.hidden) {
        timer = setTimeout(look, 1000);
        return;
      }
      try {
        const answer = await asking.current();
        if (!over) {
          tell({ answer, trouble: '', status: 0 });
        }
      } catch (reason) {
        if (!over) {
          const trouble = reason instanceof Error ? reason.message : String(reason);
          tell({ answer: null, trouble, status: reason instanceof PoolError ? reason.status : 0 });
        }
      }
      if (every > 0 && !over) {
        timer = setTimeout(look, every);
      }
    };
    void look();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [count, every]);
  return { ...told, again };
}

/** Runs one action at a time: whether one is running, and the error of the last. */
export function useAct(): {
  acting: boolean;
  trouble: string;
  act: (action: () => Promise<unknown>) => Promise<boolean>;
} {
  const [acting, setActing] = React.useState(false);
  const [trouble, setTrouble] = React.useState('');
  const act = async (action: () => Promise<unknown>) => {
    setActing(true);
    setTrouble('');
    try {
      await action();
      return true;
    } catch (reason) {
      setTrouble(reason instanceof Error ? reason.message : String(reason));
      return false;
    } finally {
      setActing(false);
    }
  };
  return { acting, trouble, act };
}
