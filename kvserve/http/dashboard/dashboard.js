// SPDX-License-Identifier: Apache-2.0
// Follows /v1/kv/events and shows what it says.

import { HeatMap, Lines, Stack, binary, counts, heatColor, times } from "./charts.js";
import { bytes, number, percent, seconds } from "./format.js";
import { connect, get } from "./server.js";
import { setUpPrompt } from "./prompt.js";

const KEEP_SECONDS = 300, SMOOTH_SECONDS = 3, MEAN_SECONDS = 10, RECEIPT_ROWS = 8;
const byId = (id) => document.getElementById(id);
const put = (id, text) => { if (byId(id).textContent !== text) byId(id).textContent = text; };

const history = [];
let plan = null;
let shown = null;

const charts = {
  memory: new Lines(byId("memory-chart"), [
    { label: "full cache", color: "--full", dash: [5, 4] },
    { label: "held", color: "--held", fill: true },
  ], bytes, 190, binary),
  output: new Lines(byId("output-chart"), [{ label: "output tokens/s", color: "--held", fill: true }], number, 130, counts),
  load: new Lines(byId("load-chart"), [
    { label: "running", color: "--held", fill: true },
    { label: "waiting", color: "--second" },
  ], number, 130, counts),
  ttft: new Lines(byId("ttft-chart"), [{ label: "mean", color: "--held" }], seconds, 130, times),
  itl: new Lines(byId("itl-chart"), [{ label: "mean", color: "--held" }], seconds, 130, times),
};
const heat = new HeatMap(byId("heat"), byId("scale"), describeCell);

// The sample that is `age` seconds older than the last, or the oldest.
function before(age) {
  const now = history.at(-1).time;
  return history.findLast((one) => one.time <= now - age) ?? history[0];
}

function rate(name, age) {
  const now = history.at(-1), then = before(age);
  if (!now.traffic || !then.traffic || now === then) return null;
  return Math.max(now.traffic[name] - then.traffic[name], 0) / (now.time - then.time);
}

function mean(name, age) {
  const now = history.at(-1), then = before(age);
  if (!now.traffic || !then.traffic) return null;
  const count = now.traffic[name].count - then.traffic[name].count;
  return count > 0 ? (now.traffic[name].sum - then.traffic[name].sum) / count : null;
}

function take(stats) {
  if (history.length && stats.time <= history.at(-1).time) return;
  if (history.length && stats.traffic?.generation_tokens < history.at(-1).traffic?.generation_tokens) {
    history.length = 0; // another server answers now
  }
  history.push(stats);
  while (stats.time - history[0].time > KEEP_SECONDS) history.shift();
  stats.rate = rate("generation_tokens", SMOOTH_SECONDS);
  stats.ttft = mean("time_to_first_token", MEAN_SECONDS);
  stats.itl = mean("inter_token_latency", MEAN_SECONDS);
  show(stats);
}

function show(stats) {
  const optional = (value, format) => (value == null ? "–" : format(value));
  put("running", number(stats.running));
  put("waiting", number(stats.waiting));
  put("output-rate", optional(stats.rate, number));
  put("prompt-rate", optional(rate("prompt_tokens", MEAN_SECONDS), number));
  put("ttft", optional(stats.ttft, seconds));
  put("itl", optional(stats.itl, seconds));
  showPrefixes(stats);
  showMemory(stats.cache);
  showCharts();
  showHeat(stats.cache);
  showState(stats.draining ? "stopping" : "live", "live");
}

function showPrefixes({ traffic, cache }) {
  if (!traffic?.prefix_queries) return;
  put("hits", percent(traffic.prefix_hits / traffic.prefix_queries));
  put("hit-tokens", `${number(traffic.prefix_hits)} tokens were not read again`
    + (cache?.pages.spared ? `; ${number(cache.pages.spared)} pages are spared` : ""));
}

function showMemory(cache) {
  if (!cache) {
    put("ratio-text", "stock vLLM: nothing is compressed");
    return;
  }
  const { held, full, saved } = cache.bytes, runs = full > 0;
  put("ratio", runs ? `${cache.compression_ratio.toFixed(1)}×` : "idle");
  put("ratio-text", runs ? "smaller than a full cache" : "no request runs");
  put("bytes-held", bytes(held));
  put("bytes-saved", bytes(Math.max(saved, 0)));
  put("bytes-full", bytes(full));
  byId("bar-held").style.width = runs ? `${(held / Math.max(full, held)) * 100}%` : "0";
  byId("bar-saved").style.width = runs ? `${(Math.max(saved, 0) / Math.max(full, held)) * 100}%` : "0";
  byId("bar").setAttribute("aria-label", runs ? `${bytes(held)} held of ${bytes(full)}` : "No request runs");
  const { pages } = cache, size = plan?.page_bytes ?? 0;
  put("pool", `${number(pages.held)} of ${number(pages.total)} pages of the pool (${bytes(pages.total * size)}) are held, ${percent(pages.held / pages.total)}`
    + (pages.dense_prefill ? `; ${number(pages.dense_prefill)} by prompts being read` : ""));
  put("evictions", number(cache.evictions_per_second));
  put("evicted", `${number(cache.entries_evicted)} since the start`);
}

function showCharts() {
  const column = (value) => history.map(value), at = column((one) => one.time);
  charts.memory.show([at, column((one) => one.cache?.bytes.full ?? null), column((one) => one.cache?.bytes.held ?? null)]);
  charts.output.show([at, column((one) => one.rate)]);
  charts.load.show([at, column((one) => one.running), column((one) => one.waiting)]);
  charts.ttft.show([at, column((one) => one.ttft)]);
  charts.itl.show([at, column((one) => one.itl)]);
  if (charts.budgets) showBudgets(at, column);
}

// A server with a range of budgets: strong for the largest, light for the least.
function setUpBudgets(levels) {
  const shade = (at) => () => heatColor(0.25 + 0.6 * (1 - at / Math.max(levels.length - 1, 1)));
  byId("budgets").hidden = false;
  const series = levels.map((one, at) => ({ label: one.budget, color: shade(at), fill: true }));
  charts.budgets = new Stack(byId("budget-chart"), series, number, 130, counts);
  const paint = () => byId("budget-keys").replaceChildren(...series.map((one) => {
    const key = document.createElement("i"), name = document.createElement("span");
    key.className = "key";
    key.style.background = one.color();
    name.append(key, one.label);
    return name;
  }));
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

function showBudgets(at, column) {
  const of = (level) => column((one) => one.cache?.budgets?.[level].running ?? null);
  charts.budgets.show([at, ...plan.levels.map((_, level) => of(level))]);
  const begun = history.at(-1).cache.budgets.filter((one) => one.begun);
  put("budget-note", begun.length
    ? `Requests since the start: ${begun.map((one) => `${number(one.begun)} at ${one.budget}`).join(", ")}`
    : "No request has begun yet.");
}

// When nothing runs, the plan of the longest request stands in.
function showHeat(cache) {
  if (!cache) return;
  const [layers, heads] = [cache.retained_by_head.length, cache.retained_by_head[0].length];
  const seen = cache.entries_seen / (layers * heads);
  shown = seen
    ? { entries: cache.retained_by_head, seen, live: true }
    : plan?.budgets && { entries: plan.budgets.retained, seen: plan.budgets.context, live: false, rows: plan.budgets.rows };
  if (shown) heat.show(shown.entries.map((row) => row.map((entries) => entries / shown.seen)));
}

function describeCell(cell) {
  if (!shown) return;
  if (!cell) {
    put("heat-cell", shown.live
      ? `Live: share of the ${number(shown.seen)} tokens of running requests that each head holds. Point at a cell, or use the arrow keys.`
      : `Nothing runs: what ${shown.rows} would keep of ${number(shown.seen)} tokens. Point at a cell, or use the arrow keys.`);
    return;
  }
  const [layer, head] = cell, entries = shown.entries[layer][head];
  put("heat-cell", `Layer ${layer}, KV head ${head}: ${number(entries)} of ${number(shown.seen)} tokens, ${percent(entries / shown.seen)}${keeps(layer, head)}`);
}

// Under policies that thin: what stays of what leaves a head's window.
function keeps(layer, head) {
  const budgets = plan?.budgets, kept = budgets?.keep?.[layer][head];
  return kept == null ? "" : `; keeps ${kept} of each ${budgets.group} tokens that leave its window`;
}

function showState(text, state) {
  put("state", text);
  byId("state").dataset.state = state;
}

function row(cells, runs) {
  const line = document.createElement("tr");
  line.className = runs ? "runs" : "";
  for (const text of cells) line.insertCell().textContent = text;
  line.cells[0].title = cells[0];
  return line;
}

// Where requests may name policies, the share that one retains says nothing without its name.
function retained(share, one) {
  return plan.request_policies ? `${percent(share)} · ${one.policy}` : percent(share);
}

async function showRequests() {
  const cache = history.at(-1)?.cache;
  if (!cache || document.hidden) return;
  const lanes = cache.retained_by_head.length * cache.retained_by_head[0].length;
  const running = cache.requests.slice(0, RECEIPT_ROWS).map((one) => row([
    one.request_id, number(one.tokens_seen), retained(one.entries_retained / (one.tokens_seen * lanes), one),
    number(one.pages_held), number(one.tokens_seen * lanes - one.entries_retained),
  ], true));
  const receipts = await get(`/v1/kv/receipts?limit=${RECEIPT_ROWS}`);
  const ended = receipts.data.map((one) => row([
    one.request_id, number(one.tokens_seen), retained(one.entries_retained / one.entries_seen, one),
    `${number(one.pages_held)} of ${number(one.pages_full)}`, number(one.entries_evicted),
  ], false));
  const rows = [...running, ...ended].slice(0, RECEIPT_ROWS);
  if (rows.length) byId("rows").replaceChildren(...rows);
}

async function start() {
  plan = await get("/v1/kv/policy");
  put("model", plan.model ? `${plan.model.name} · ${plan.model.num_layers} layers × ${plan.model.num_kv_heads} KV heads · up to ${number(plan.model.max_tokens)} tokens` : "stock vLLM");
  put("policy", `policy ${plan.policy}`);
  byId("policy").title = plan.summary ?? "";
  byId("policy").hidden = false;
  if (plan.levels) setUpBudgets(plan.levels);
  setInterval(() => showRequests().catch(() => {}), 3000);
  connect("/v1/kv/events", take, () => showState("no connection, trying again", "lost"));
}

setUpPrompt();
start().catch((error) => showState(error.message, "lost"));
