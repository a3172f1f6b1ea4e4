/** How the pool is reached: below a Jupyter server, or by a page of the pool's own. */

export interface ITransport {
  /** `path` is below `gpupool/api/v1/`. Rejects where nobody answers. */
  fetch(path: string, init: RequestInit): Promise<Response>;
  socket(path: string): WebSocket;
}
