/** Draws a chart with uPlot, which is loaded with this file when the first chart is shown. */

import uPlot from 'uplot';

import 'uplot/dist/uPlot.min.css';

import { Drawn, isolated, roomAtEdge } from './data';

const AXIS = 18;

/** A chart that fills the width of an element. */
export class ChartCanvas {
  constructor(
    private _node: HTMLElement,
    private _options: ChartCanvas.IOptions
  ) {
    this._make();
    this._sizes = new ResizeObserver(() => this._fit());
    this._sizes.observe(_node);
    // JupyterLab names its theme there once the theme's style is loaded.
    this._theme = new MutationObserver(() => this._make());
    this._theme.observe(document.body, {
      attributes: true,
      attributeFilter: ['data-jp-theme-name', 'data-jp-theme-light']
    });
  }

  /** Show these columns on an axis from `from` to `to`. */
  show(data: Drawn, from: number, to: number): void {
    this._data = data;
    this._from = from;
    this._to = to;
    this._fit(); // what was made while the page had no layout
    this._plot?.batch(() => {
      this._plot?.setData(data, false);
      this._plot?.setScale('x', { min: from, max: to });
    });
  }

  /** Point at a slot; null for none. */
  point(n: number | null): void {
    const plot = this._plot;
    if (!plot) {
      return;
    }
    this._pointing = true;
    const at = n === null ? undefined : this._data[0][n];
    const left = at === undefined ? -10 : plot.valToPos(at, 'x');
    plot.setCursor({ left, top: at === undefined ? -10 : 0 });
    this._pointing = false;
  }

  /** The position of a note beside a slot, on the side with more room. */
  beside(n: number): { left?: number; right?: number } {
    const plot = this._plot;
    const at = this._data[0][n];
    const left = plot && at !== undefined ? plot.valToPos(at, 'x') + plot.over.offsetLeft : 0;
    const { clientWidth } = this._node;
    return left > clientWidth / 2 ? { right: clientWidth - left + 10 } : { left: left + 10 };
  }

  dispose(): void {
    this._sizes.disconnect();
    this._theme.disconnect();
    this._plot?.destroy();
    this._plot = null;
  }

  private _fit(): void {
    const { clientWidth } = this._node;
    if (clientWidth > 0 && this._plot && this._plot.width !== clientWidth) {
      this._plot.setSize({ width: clientWidth, height: this._options.height });
    }
  }

  /** The pixels that the axis's last label needs beyond the drawing. */
  private _roomAtEdge(font: string): number {
    const context = this._node.ownerDocument.createElement('canvas').getContext('2d');
    if (context === null) {
      return 10;
    }
    context.font = font;
    const labels = [this._from, this._to].map(this._options.time);
    return roomAtEdge(labels, label => context.measureText(label).width);
  }

  private _make(): void {
    this._plot?.destroy();
    const paint = palette(this._node);
    const { height, time } = this._options;
    const area = (stroke: string, fill: string, width: number): uPlot.Series => ({
      stroke,
      fill,
      width,
      points: {
        size: 4,
        fill: stroke,
        filter: (plot, series) => isolated(plot.data[series] as (number | null)[])
      }
    });
    const font = `10px ${paint.font}`;
    this._plot = new uPlot(
      {
        width: this._node.clientWidth || 200,
        height,
        legend: { show: false },
        padding: [6, () => this._roomAtEdge(font), 0, 0],
        cursor: {
          y: false,
          drag: { x: false, y: false },
          points: { size: 6 }
        },
        scales: { x: { range: () => [this._from, this._to] }, y: { range: [0, 100] } },
        series: [
          {},
          area(paint.granted, paint.grantedFill, 1),
          area(paint.used, paint.usedFill, 1),
          area(paint.busy, paint.busyFill, 1.5)
        ],
        axes: [
          {
            size: AXIS,
            gap: 4,
            space: 64,
            font,
            stroke: paint.text,
            ticks: { show: false },
            grid: { stroke: paint.grid, width: 1 },
            values: (_plot, splits) => splits.map(time)
          },
          {
            size: 34,
            gap: 4,
            font,
            stroke: paint.text,
            ticks: { show: false },
            grid: { stroke: paint.grid, width: 1 },
            splits: () => [0, 50, 100],
            values: (_plot, splits) => splits.map(this._options.percent)
          }
        ],
        hooks: {
          setCursor: [
            plot => {
              const { left, idx } = plot.cursor;
              if (!this._pointing) {
                this._options.onPoint(left !== undefined && left >= 0 ? (idx ?? null) : null);
              }
            }
          ]
        }
      },
      this._data,
      this._node
    );
  }

  private _data: Drawn = [[], [], [], []];
  private _from = 0;
  private _plot: uPlot | null = null;
  private _pointing = false;
  private _sizes: ResizeObserver;
  private _theme: MutationObserver;
  private _to = 1;
}

export namespace ChartCanvas {
  export interface IOptions {
    /** Of the whole chart, in pixels. */
    height: number;
    /** The label of a time on the axis. */
    time: (at: number) => string;
    /** The label of a percentage on the axis, from 0 to 100. */
    percent: (value: number) => string;
    /** Called when the user points at a slot; null for none. */
    onPoint: (n: number | null) => void;
  }
}

/** The theme's colours, resolved for the canvas; style/chart.css defines them. */
function palette(node: HTMLElement) {
  const probe = node.ownerDocument.createElement('span');
  node.appendChild(probe);
  const resolved = (colour: string): string => {
    probe.style.color = colour;
    return getComputedStyle(probe).color;
  };
  const faint = (name: string, part: number) =>
    resolved(`color-mix(in srgb, var(${name}) ${part}%, transparent)`);
  const paint = {
    text: resolved('var(--jp-ui-font-color1)'),
    grid: faint('--jp-ui-font-color1', 14),
    granted: resolved('var(--jp-gpupool-granted)'),
    grantedFill: faint('--jp-gpupool-granted', 22),
    used: resolved('var(--jp-gpupool-used)'),
    usedFill: faint('--jp-gpupool-used', 55),
    busy: resolved('var(--jp-gpupool-busy)'),
    busyFill: faint('--jp-gpupool-busy', 12),
    font: getComputedStyle(node).fontFamily
  };
  probe.remove();
  return paint;
}
