// SPDX-License-Identifier: Apache-2.0
// Lines over time (uPlot) and the heat map of layers and heads.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const dark = matchMedia("(prefers-color-scheme: dark)");

// Distances between marks on a scale.
export const counts = [1, 2, 5].flatMap((n) => [...Array(9).keys()].map((e) => n * 10 ** e)).sort((a, b) => a - b);
export const binary = [...Array(48).keys()].map((e) => 2 ** e);
export const times = [1, 2, 5].flatMap((n) => [...Array(7).keys()].map((e) => n * 10 ** (e - 4))).sort((a, b) => a - b);

// A line chart that is drawn anew when the theme changes.
export class Lines {
  // series: [{label, color: a CSS variable, or what returns a colour; fill, dash}];
  // format: number to text; steps: distances that marks on the scale may have.
  constructor(element, series, format, height, steps) {
    Object.assign(this, { element, series, format, height, steps });
    this.data = [[], ...series.map(() => [])];
    this.draw();
    dark.addEventListener("change", () => this.draw());
    new ResizeObserver(() => {
      this.plot.setSize({ width: this.width(), height: this.height });
    }).observe(element);
  }

  width() {
    return Math.max(this.element.clientWidth, 120);
  }

  draw() {
    this.plot?.destroy();
    const axis = {
      stroke: css("--soft"),
      grid: { stroke: css("--grid"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    const value = (_, raw, at, i) => (raw == null ? "–" : this.format(this.shown(raw, at, i)));
    const series = this.series.map((one) => ({
      label: one.label,
      stroke: this.color(one),
      width: 2,
      dash: one.dash,
      fill: one.fill && this.color(one) + this.veil,
      points: { show: false },
      spanGaps: true,
      value,
    }));
    const options = {
      width: this.width(),
      height: this.height,
      padding: [8, 4, 0, 0],
      cursor: { points: { size: 7 }, drag: { x: false, y: false } },
      legend: { live: true },
      scales: { y: { range: (_, low, high) => [0, nice(high)] } },
      axes: [
        { ...axis, space: 70, size: 24, gap: 4, values: (_, ticks) => ticks.map(clock) },
        {
          ...axis, size: 58, space: 28, incrs: this.steps,
          values: (_, ticks) => ticks.map((tick) => (tick ? this.format(tick) : "0")),
        },
      ],
      series: [{ label: "time", value: (_, raw) => (raw == null ? "–" : clock(raw)) }, ...series],
    };
    this.plot = new uPlot(options, this.data, this.element);
    this.element.setAttribute("role", "img");
  }

  // How much of what is behind a filled area shows, behind a colour of #rrggbb.
  get veil() {
    return "22";
  }

  color(series) {
    return typeof series.color === "function" ? series.color() : css(series.color);
  }

  // The value at a point, of what is drawn there.
  shown(raw) {
    return raw;
  }

  // columns: [times, values of the first series, ...]
  show(columns) {
    this.data = columns;
    this.plot.setData(columns);
    const last = this.series.map((one, i) => {
      const value = columns[i + 1].at(-1);
      return `${one.label} ${value == null ? "none" : this.format(value)}`;
    });
    this.element.setAttribute("aria-label", `Now: ${last.join(", ")}`);
  }
}

// Areas that lie on one another: the last series at the bottom.
export class Stack extends Lines {
  get veil() {
    return "";
  }

  shown(_, at, i) {
    return this.own[at][i];
  }

  show(columns) {
    const [times, ...own] = columns;
    const sums = own.map((_, at) => times.map((_, i) => (
      own[at][i] == null ? null : own.slice(at).reduce((sum, column) => sum + column[i], 0)
    )));
    this.own = columns;
    super.show([times, ...sums]);
    const last = this.series.map((one, at) => `${one.label} ${own[at].at(-1) ?? "none"}`);
    this.element.setAttribute("aria-label", `Now: ${last.join(", ")}`);
  }
}

const clock = (seconds) => new Date(seconds * 1000).toTimeString().slice(0, 8);

// The top of a scale: a little above the highest value.
const nice = (high) => (high > 0 ? high * 1.12 : 1);

// From cold to the accent, through the hues between: light for little, strong for all.
export function heatColor(share) {
  const stops = dark.matches
    ? [[26, 35, 44], [20, 66, 84], [16, 122, 128], [45, 212, 191], [214, 255, 236]]
    : [[238, 242, 245], [178, 221, 220], [78, 176, 172], [13, 128, 120], [4, 62, 66]];
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const mix = stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
  return `rgb(${mix.join(" ")})`;
}

export class HeatMap {
  constructor(canvas, scale, describe) {
    Object.assign(this, { canvas, scale, describe, shares: [], cell: null });
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.select(null));
    canvas.addEventListener("blur", () => this.select(null));
    canvas.addEventListener("keydown", (event) => this.move(event));
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    dark.addEventListener("change", () => this.draw());
  }

  // shares: of tokens retained, [layers][heads].
  show(shares) {
    this.shares = shares;
    this.draw();
    this.select(this.cell);
  }

  size() {
    return [this.shares.length, this.shares[0]?.length ?? 0];
  }

  draw() {
    this.drawScale();
    const [layers, heads] = this.size();
    if (!layers) return;
    const left = 48, below = 20;
    const width = this.canvas.parentElement.clientWidth;
    const step = (width - left) / layers;
    const tall = Math.max(8, Math.min(step, 26, 420 / heads));
    const height = tall * heads + below;
    const ratio = devicePixelRatio;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    this.canvas.style.height = `${height}px`;
    this.frame = { left, step, tall };
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const gap = step > 6 ? 1 : 0;
    this.shares.forEach((row, layer) => row.forEach((share, head) => {
      pen.fillStyle = heatColor(share);
      pen.fillRect(left + layer * step, head * tall, step - gap, tall - gap);
    }));
    this.label(pen, height - 5);
    if (this.cell) {
      const [layer, head] = this.cell;
      pen.strokeStyle = css("--second");
      pen.lineWidth = 2;
      pen.strokeRect(left + layer * step, head * tall, step - gap, tall - gap);
    }
  }

  label(pen, base) {
    const { left, step, tall } = this.frame, [layers, heads] = this.size();
    pen.fillStyle = css("--soft");
    pen.font = "11px system-ui, sans-serif";
    pen.fillText("layer", 0, base);
    for (let head = 0; head < heads; head += Math.ceil(14 / tall)) {
      pen.fillText(`head ${head}`, 0, head * tall + tall / 2 + 4);
    }
    pen.textAlign = "center";
    for (let layer = 0; layer < layers; layer += Math.ceil(22 / step)) {
      pen.fillText(`${layer}`, left + (layer + 0.5) * step, base);
    }
  }

  drawScale() {
    const pen = this.scale.getContext("2d"), { width, height } = this.scale;
    for (let x = 0; x < width; x++) {
      pen.fillStyle = heatColor(x / (width - 1));
      pen.fillRect(x, 0, 1, height);
    }
  }

  point(event) {
    if (!this.frame) return;
    const { left, step, tall } = this.frame, [layers, heads] = this.size();
    const layer = Math.floor((event.offsetX - left) / step);
    const head = Math.floor(event.offsetY / tall);
    const inside = layer >= 0 && layer < layers && head >= 0 && head < heads;
    this.select(inside ? [layer, head] : null);
  }

  move(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!step[event.key] || !this.shares.length) return;
    event.preventDefault();
    const limits = this.size(), cell = this.cell ?? [0, 0];
    const moved = this.cell ? cell.map((c, i) => c + step[event.key][i]) : cell;
    this.select(moved.map((c, i) => Math.min(Math.max(c, 0), limits[i] - 1)));
  }

  select(cell) {
    const same = String(cell) === String(this.cell);
    this.cell = cell;
    if (!same) this.draw();
    this.describe(cell);
  }
}
