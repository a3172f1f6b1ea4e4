/** The names of this extension's commands. */
export namespace CommandIDs {
  export const open = 'gpupool:open';
  export const console = 'gpupool:open-console';
  export const request = 'gpupool:request';
  export const newNotebook = 'gpupool:new-notebook';
  export const resize = 'gpupool:resize';
  export const extend = 'gpupool:extend';
  export const release = 'gpupool:release';
  export const releaseAll = 'gpupool:release-all';
  export const leaveQueue = 'gpupool:leave-queue';
  export const chart = 'gpupool:chart-range';
}
