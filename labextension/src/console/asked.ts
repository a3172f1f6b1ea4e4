/** What is asked of the pool once, and again when something was changed. */

import * as React from 'react';

import { PoolError } from '../api';

export interface IAsked<T> {
  /** Null before the first answer, and where it is refused. */
  answer: T | null;
  /** Why there is no answer; empty if there is or is still to come. */
  trouble: string;
  /** The status of the refusal, 0 without one. */
  status: number;
  again: () => void;
}

/** `every`: asked again after so many milliseconds, while the page can be seen; 0 for never. */
export function useAsked<T>(ask: () => Promise<T>, every = 0): IAsked<T> {
  const [count, again] = React.useReducer((n: number) => n + 1, 0);
  const [told, tell] = React.useState<Omit<IAsked<T>, 'again'>>({
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

/** One action at a time: whether one is under way, and what went wrong with the last. */
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
