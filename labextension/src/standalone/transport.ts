/** The transport to the pool that served this page: with a cookie of the hub's login or of a sign-in, or with a token. */

import { ITransport } from '../pool/transport';

const CALLS = new URL('../api/v1/', location.href);

export class PageTransport implements ITransport {
  readonly base = CALLS.href;
  /** The token; empty if the browser has the hub's cookie. Only this page keeps it. */
  token = '';
  /** What the calls of a sign-in carry besides its cookie; empty without a sign-in. */
  csrf = '';

  fetch(path: string, init: RequestInit): Promise<Response> {
    const headers = new Headers(init.headers);
    if (this.token) {
      headers.set('Authorization', `Bearer ${this.token}`);
    }
    if (this.csrf) {
      headers.set('X-GPUPool-CSRF', this.csrf);
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
    if (this.token) {
      return new WebSocket(url, ['gpupool', `gpupool.token.${this.token}`]);
    }
    return this.csrf
      ? new WebSocket(url, ['gpupool', `gpupool.csrf.${this.csrf}`])
      : new WebSocket(url);
  }
}
