/** The pool below the Jupyter server that served this JupyterLab, by its settings. */

import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import { ITransport } from './transport';

const BELOW = 'gpupool/api/v1';

export class ServerTransport implements ITransport {
  constructor(private _settings: ServerConnection.ISettings) {}

  get base(): string {
    return URLExt.join(this._settings.baseUrl, BELOW, '/');
  }

  fetch(path: string, init: RequestInit): Promise<Response> {
    return ServerConnection.makeRequest(URLExt.join(this.base, path), init, this._settings);
  }

  socket(path: string): WebSocket {
    const { wsUrl, token, appendToken, WebSocket } = this._settings;
    const url = URLExt.join(wsUrl, BELOW, path);
    const secret = appendToken && token ? `token=${encodeURIComponent(token)}` : '';
    return new WebSocket(secret ? `${url}${path.includes('?') ? '&' : '?'}${secret}` : url);
  }
}
