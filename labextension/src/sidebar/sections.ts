/** The sections that extensions add to the sidebar, by rank. */

import { DisposableDelegate, IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';

import type { ISidebarSection, ISidebarSections } from '../tokens';

export class SidebarSections implements ISidebarSections {
  get items(): readonly ISidebarSection[] {
    return this._items;
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  add(section: ISidebarSection): IDisposable {
    if (this._items.some(({ id }) => id === section.id)) {
      throw new Error(`The sidebar already has a section with the id ${section.id}`);
    }
    this._items = [...this._items, section].sort((a, b) => a.rank - b.rank);
    this._changed.emit();
    return new DisposableDelegate(() => {
      this._items = this._items.filter(item => item !== section);
      this._changed.emit();
    });
  }

  private _changed = new Signal<this, void>(this);
  private _items: readonly ISidebarSection[] = [];
}
