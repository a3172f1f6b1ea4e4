/** The sections of the sidebar, for every plugin that adds one. */

import { JupyterFrontEndPlugin } from '@jupyterlab/application';

import { SidebarSections } from '../sidebar/sections';
import { ISidebarSections } from '../tokens';

export const sectionsPlugin: JupyterFrontEndPlugin<ISidebarSections> = {
  id: 'jupyter-gpupool:sections',
  description: 'The sections of the sidebar; other extensions may add their own.',
  provides: ISidebarSections,
  activate: () => new SidebarSections()
};
