/**
 * Bundles the Console's page into what is installed: node labextension/standalone/build.mjs [--development]
 *
 * Beside the page goes bundled.json, which names the packages that are in it, in the form of JupyterLab's
 * third-party-licenses.json.
 */
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { resolve } from 'node:path';

import { rspack } from '@rspack/core';

const here = import.meta.dirname;
const lib = resolve(here, '../lib');
const output = resolve(here, '../../jupyter_gpupool/labextension/page');
const development = process.argv.includes('--development');

const compiler = rspack({
  mode: development ? 'development' : 'production',
  devtool: false, // one would need `eval`, which the page's policy forbids
  context: resolve(here, '../..'),
  entry: {
    page: [
      resolve(here, 'page.css'),
      ...['base', 'chart', 'console', 'console-table', 'console-dialog'].map(name =>
        resolve(here, `../style/${name}.css`)
      ),
      resolve(lib, 'standalone/index.js')
    ]
  },
  output: {
    path: output,
    filename: '[name].js',
    cssFilename: '[name].css',
    publicPath: '',
    clean: true
  },
  resolve: { alias: { '@jupyterlab/ui-components': resolve(lib, 'standalone/components.js') } },
  // One file: no piece of it is loaded later, so nothing has to know where it came from.
  module: {
    parser: { javascript: { dynamicImportMode: 'eager' } },
    rules: [{ test: /\.css$/, type: 'css' }]
  },
  performance: { hints: false }
});

compiler.run((error, stats) => {
  if (error || stats.hasErrors()) {
    console.error(error ?? stats.toString({ all: false, errors: true }));
    process.exit(1);
  }
  mkdirSync(output, { recursive: true });
  copyFileSync(resolve(here, 'index.html'), resolve(output, 'index.html'));
  writeFileSync(
    resolve(output, 'bundled.json'),
    `${JSON.stringify({ packages: packagesIn(stats) }, null, 2)}\n`
  );
  console.log(`The Console's page is in ${output}`);
  compiler.close(() => undefined);
});

/** The npm packages whose modules are in the bundle, by name. */
function packagesIn(stats) {
  const found = new Map();
  const look = ({ nameForCondition, modules = [] }) => {
    const [folder, name] =
      /^.*\/node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(nameForCondition ?? '') ?? [];
    if (folder && !found.has(folder)) {
      const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, 'utf-8'));
      found.set(folder, { name, versionInfo: version, licenseId: license ?? '' });
    }
    modules.forEach(look);
  };
  stats
    .toJson({
      all: false,
      modules: true,
      nestedModules: true,
      orphanModules: false,
      modulesSpace: Infinity,
      nestedModulesSpace: Infinity
    })
    .modules.forEach(look);
  return [...found.values()].sort((one, other) => (one.name < other.name ? -1 : 1));
}
