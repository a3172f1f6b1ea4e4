import { LabIcon } from '@jupyterlab/ui-components';

import gpuSvg from '../../style/icons/gpu.svg';

/** A graphics card with two fans: the sign of everything about the pool. */
export const gpuIcon = new LabIcon({ name: 'gpupool:gpu', svgstr: gpuSvg });
