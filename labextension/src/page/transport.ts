/** The pool that served this page: its calls are beside it, and admit a cookie of a hub's login or a token. */

import { ITransport } from '../transport';

const CALLS = new URL('../api/v1/', location.href);

export class PageTransport implements ITransport {
  /** Empty: the browser is known already. Kept by this page alone, and gone with it. */
  token = '';

  fetch(path: string, init: RequestInit): Promise<Response> {
    const headers = new Headers(init.headers);
    if (this.token) {
      headers.set('Authorization', `Bearer ${this.token}`);
    }
    const [, crossSite] = /(?:^|; )_xsrf=([^;]*)/.exec(document.cookie) ?? [];
    if (crossSite) {
      headers.set('X-XSRFToken', crossSite);
    }
    return fetch(new URL(path, CALLS), { ...init, headers, credentials: 'same-origin' });
  }

  socket(path: string): WebSocket {
    const url = new URL(path, CALLS);
    url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:';
    // A browser's socket has no header of its own but this one.
    return this.token
      ? new WebSocket(url, ['gpupool', `gpupool.token.${this.token}`])
      : new WebSocket(url);
  }
}
