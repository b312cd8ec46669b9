// SPDX-License-Identifier: Apache-2.0
// Talks to the server that the page came from, with the API key if it wants one.

const KEY = "kvserve-api-key", RETRY_MS = 2000;
const root = location.pathname.replace(/\/dashboard\/?$/, "");
let asking = null;

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog"), input = document.getElementById("key");
    dialog.addEventListener("close", () => {
      sessionStorage.setItem(KEY, input.value);
      input.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// Like fetch; asks for the key as long as the server says 401.
export async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(root + path, { ...options, headers });
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
    }
    return response;
  }
}

export const get = async (path) => (await request(path)).json();

// Yields the data of server-sent events.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}

// Follows a stream of JSON for good.
export async function connect(path, take, lost) {
  for (;;) {
    try {
      for await (const data of events(await request(path))) take(JSON.parse(data));
    } catch (error) {
      console.info(`${path}: ${error.message}`);
    }
    lost();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}
