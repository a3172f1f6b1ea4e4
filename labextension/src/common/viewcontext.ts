/** What every view of the panel is given. */

import * as React from 'react';

import type { IChoices, IGPUPool, ISettings, ISidebarSection, ISidebarSections } from '../tokens';

export type { IViewContext, IViewProps } from '../tokens';

/** The pool's state and connection, again whenever they change. */
export function usePool(pool: IGPUPool): Pick<IGPUPool, 'state' | 'connection'> {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    pool.changed.connect(again);
    again();
    return () => {
      pool.changed.disconnect(again);
    };
  }, [pool]);
  return { state: pool.state, connection: pool.connection };
}

/** What the user prefers, again whenever that changes. */
export function usePreferences(preferences: ISettings): IChoices {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    preferences.changed.connect(again);
    return () => {
      preferences.changed.disconnect(again);
    };
  }, [preferences]);
  return preferences.choices;
}

/** The sections that extensions have added, again whenever that changes. */
export function useSections(sections: ISidebarSections): readonly ISidebarSection[] {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    sections.changed.connect(again);
    return () => {
      sections.changed.disconnect(again);
    };
  }, [sections]);
  return sections.items;
}
