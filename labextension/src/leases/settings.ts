/** What the user prefers: the settings of JupyterLab's settings editor, or their defaults where there are none. */

import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { ReadonlyPartialJSONValue } from '@lumino/coreutils';
import { ISignal, Signal } from '@lumino/signaling';

import type { IChoices, ISettings } from '../tokens';
import { write } from '../common/format';

export const DEFAULTS: IChoices = {
  numGpus: 1,
  partial: 0.5,
  refresh: 1,
  units: 'auto',
  idleMinutes: 30,
  statusBar: 'held',
  chartRange: '5m'
};

export class Settings implements ISettings {
  /** Follow these settings from now on. */
  follow(settings: ISettingRegistry.ISettings): void {
    this._settings = settings;
    settings.changed.connect(this._read, this);
    this._read();
  }

  get changed(): ISignal<this, void> {
    return this._changed;
  }

  get choices(): IChoices {
    return this._choices;
  }

  /** Prefer something else from now on, in the settings too where there are some. */
  async prefer<K extends keyof IChoices>(name: K, value: IChoices[K]): Promise<void> {
    this._set({ ...this._choices, [name]: value });
    await this._settings?.set(name, value as ReadonlyPartialJSONValue as never);
  }

  private _read(): void {
    this._set({ ...DEFAULTS, ...(this._settings?.composite as Partial<IChoices> | undefined) });
  }

  private _set(choices: IChoices): void {
    this._choices = choices;
    write(choices.units);
    this._changed.emit();
  }

  private _changed = new Signal<this, void>(this);
  private _choices = DEFAULTS;
  private _settings: ISettingRegistry.ISettings | null = null;
}
