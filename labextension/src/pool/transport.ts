/** How the pool is reached: below a Jupyter server, or by a page of the pool's own. */

export interface ITransport {
  /** The URL of the calls, with a slash at its end. */
  readonly base: string;
  /** `path` is below `gpupool/api/v1/`. Rejects where nobody answers. */
  fetch(path: string, init: RequestInit): Promise<Response>;
  socket(path: string): WebSocket;
}
