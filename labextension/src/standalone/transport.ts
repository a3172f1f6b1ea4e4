/** The transport to the pool that served this page, with a cookie of the hub's login or with a token. */

import { ITransport } from '../pool/transport';

const CALLS = new URL('../api/v1/', location.href);

export class PageTransport implements ITransport {
  /** The token; empty if the browser has the hub's cookie. Only this page keeps it. */
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
    // A browser's WebSocket can set no other header.
    return this.token
      ? new WebSocket(url, ['gpupool', `gpupool.token.${this.token}`])
      : new WebSocket(url);
  }
}
