// SPDX-License-Identifier: Apache-2.0
// The box that sends a prompt and shows the reply as it comes.

import { number } from "./format.js";
import { events, get, request } from "./server.js";

const byId = (id) => document.getElementById(id);

// A fact at the top, then pages of text, then a question about the fact.
async function longPrompt() {
  const { data: [model] } = await get("/v1/models");
  const room = model.max_model_len - byId("most").valueAsNumber - 200;
  const pages = Math.max(1, Math.min(Math.floor(room / 56), 120));
  const fact = "The access code of the north door is 48213.";
  const filler = "The tide came in slowly over the flats, and the boats that had lain on their sides since noon began to lift. "
    + "On the quay somebody was mending a net, and the smell of tar drifted up through the narrow streets to the square. ";
  return `${fact}\n\n${filler.repeat(pages)}\n\nWhat is the access code of the north door?`;
}

async function stream(prompt, most, signal, take) {
  const { data: [model] } = await get("/v1/models");
  const response = await request("/v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      model: model.id,
      messages: [{ role: "user", content: prompt }],
      max_tokens: most,
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  let usage = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    take(chunk.choices[0]?.delta?.content ?? "");
  }
  return { id: response.headers.get("X-Request-Id"), usage };
}

function facts(usage, start, first, receipt) {
  const total = performance.now() - start;
  const speed = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / ((total - first) / 1000) : null;
  return [
    `${number(usage.prompt_tokens)} + ${number(usage.completion_tokens)} tokens`,
    `first token after ${(first / 1000).toFixed(2)} s`,
    speed && `${number(speed)} tokens/s`,
    receipt && `retained ${Math.round((100 * receipt.entries_retained) / receipt.entries_seen)} % of the cache`,
  ].filter(Boolean).join(" · ");
}

async function send(signal) {
  const prompt = byId("prompt").value, most = byId("most").valueAsNumber, copies = byId("copies").valueAsNumber;
  const answer = byId("answer"), start = performance.now();
  let first = 0;
  answer.textContent = "";
  byId("answer-facts").textContent = "reading the prompt …";
  const others = Array.from({ length: copies - 1 }, () => stream(prompt, most, signal, () => {}));
  others.forEach((other) => other.catch(() => {}));
  const { id, usage } = await stream(prompt, most, signal, (text) => {
    if (text && !first) {
      first = performance.now() - start;
      byId("answer-facts").textContent = "writing …";
    }
    answer.append(text);
    answer.scrollTop = answer.scrollHeight;
  });
  const receipt = await get(`/v1/kv/receipts/${id}`).catch(() => null);
  byId("answer-facts").textContent = facts(usage, start, first, receipt);
  await Promise.allSettled(others);
}

export function setUpPrompt() {
  let controller = null;
  byId("long").addEventListener("click", () => {
    longPrompt().then((text) => {
      byId("prompt").value = text;
      byId("prompt").focus();
    }, (error) => { byId("answer-facts").textContent = error.message; });
  });
  byId("stop").addEventListener("click", () => controller?.abort());
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
  byId("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return;
    controller = new AbortController();
    byId("send").disabled = true;
    byId("stop").disabled = false;
    try {
      await send(controller.signal);
    } catch (error) {
      byId("answer-facts").textContent = error.name === "AbortError" ? "stopped" : error.message;
    }
    controller = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  });
}
