"use strict";

const find = (id) => document.getElementById(id);
const PAGE = 30;
// Seconds behind the picture that stay in the browser's buffer when it is full, and bytes that may wait for it.
const KEPT_S = 10, MOST_WAITING = 2 ** 27;
const state = { chosen: null, live: null, shown: PAGE, timer: null };

// What the server refuses comes as one sentence.
async function ask(path, options) {
  const answer = await fetch(path, options);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(body.error ? body.error.message : `the server answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return body;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// A form whose refusal is shown in it.
function handle(form, act) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const said = form.querySelector("output"), button = form.querySelector("button");
    said.textContent = "";
    button.disabled = true;
    try {
      await act(new FormData(form));
      form.reset();
    } catch (error) {
      said.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  });
}

// --- the list ---

function line(video) {
  const what = { queued: "waits", in_progress: `${video.progress} %`, completed: "complete", failed: "failed" };
  const bar = element("span", { className: "bar" }, element("i"));
  bar.firstChild.style.width = `${video.status === "failed" ? 0 : video.progress}%`;
  const button = element(
    "button",
    { type: "button", title: video.prompt, onclick: () => choose(video) },
    element("span", { className: "words", textContent: video.prompt }),
    element("small", { textContent: `${what[video.status]} · ${video.seconds} s · ${video.size}` }),
    bar,
  );
  button.setAttribute("aria-current", String(video.id === state.chosen));
  return element("li", { className: video.status }, button);
}

async function refreshList() {
  const list = await ask(`/v1/videos?limit=${Math.min(100, state.shown)}`);
  const had = document.activeElement && find("videos").contains(document.activeElement)
    ? [...find("videos").children].findIndex((one) => one.contains(document.activeElement)) : -1;
  find("videos").replaceChildren(...list.data.map(line));
  if (had >= 0 && find("videos").children[had]) find("videos").children[had].firstChild.focus();
  find("count").textContent = list.has_more ? `(newest ${list.data.length})` : `(${list.data.length})`;
  find("more").hidden = !list.has_more || state.shown >= 100;
  return list.data;
}

// --- the player: a complete video is a file; of one that grows, bytes of a fragmented mp4 come over a socket and go
// into the browser's buffer as there is room for them ---

function play(video) {
  const player = find("player"), at = find("broken").textContent && video.id === state.chosen ? player.currentTime : 0;
  stop();
  if (video.status === "completed") player.src = `/v1/videos/${video.id}/content`;
  else playLive(video.id);
  if (at) player.currentTime = at;
}

function playLive(id) {
  const player = find("player"), source = new MediaSource(), waiting = [];
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/videos/${id}/live`);
  let buffer = null, mime = null, over = false, bytes = 0;
  socket.binaryType = "arraybuffer";
  state.live = { socket, url: URL.createObjectURL(source) };
  player.src = state.live.url;

  // What has come is played.
  const end = (why) => {
    over = true;
    socket.close();
    find("broken").textContent = why;
  };
  const feed = () => {
    if (source.readyState !== "open" || !mime || (buffer && buffer.updating)) return;
    try {
      if (!buffer) {
        buffer = source.addSourceBuffer(mime);
        buffer.addEventListener("updateend", feed);
      }
      if (waiting.length) {
        buffer.appendBuffer(waiting[0]);
        bytes -= waiting.shift().byteLength;
      } else if (over) source.endOfStream();
    } catch (error) {
      if (error.name === "QuotaExceededError") return makeRoom();
      waiting.length = 0;
      end(`this browser cannot play it: ${error.message}`);
    }
  };
  // The buffer is full: what was seen goes, or there is room once more of it is seen.
  const makeRoom = () => {
    const behind = player.currentTime - KEPT_S;
    if (buffer.buffered.length && buffer.buffered.start(0) < behind) buffer.remove(0, behind);
  };
  source.addEventListener("sourceopen", feed, { once: true });
  player.ontimeupdate = feed;
  socket.onmessage = ({ data }) => {
    if (over) return;
    if (typeof data === "string") {
      const told = JSON.parse(data);
      if (told.mime) mime = told.mime;
      else if (told.status) over = true;
    } else {
      waiting.push(data);
      bytes += data.byteLength;
    }
    if (bytes > MOST_WAITING) end("more waits than this page keeps; choose the video again to go on with it");
    feed();
  };
  socket.onclose = ({ reason }) => {
    if (over || !state.live || state.live.socket !== socket) return;
    end(`the live stream broke off${reason ? `: ${reason}` : ""}; choose the video again to go on with it`);
    feed();
  };
}

function stop() {
  const player = find("player");
  find("broken").textContent = "";
  player.ontimeupdate = null;
  if (state.live) {
    state.live.socket.close();
    URL.revokeObjectURL(state.live.url);
    state.live = null;
  }
  player.removeAttribute("src");
  player.load();
}

// --- one video ---

function choose(video) {
  play(video);
  state.chosen = video.id;
  find("watch").hidden = false;
  find("change").querySelector("output").textContent = "";
  refresh();
}

function drawTimeline(told) {
  const level = new Map(told.window.map((one) => [one.chunk, one.level]));
  // A long video has more chunks than there are pixels: neighbours share a block then.
  const blocks = Math.min(told.chunks, 240), drawn = [];
  for (let block = 0; block < blocks; block++) {
    const first = Math.floor(block * told.chunks / blocks), behind = Math.floor((block + 1) * told.chunks / blocks);
    const mark = element("i", { title: behind - first > 1 ? `chunks ${first} to ${behind - 1}` : `chunk ${first}` });
    const noisy = [...level.keys()].find((chunk) => chunk >= first && chunk < behind);
    if (behind <= told.done) mark.className = "done";
    else if (told.decoding.some((chunk) => chunk >= first && chunk < behind)) mark.className = "decoding";
    else if (noisy !== undefined) {
      mark.className = "window";
      mark.style.opacity = String(1 - 0.75 * level.get(noisy));
      mark.title += `, noise level ${level.get(noisy).toFixed(2)}`;
    }
    drawn.push(mark);
  }
  find("timeline").replaceChildren(...drawn);
  drawStages(told);
  find("prompts").replaceChildren(...told.prompts.map(([chunk, text]) => element(
    "li", {}, element("small", { textContent: `from chunk ${chunk}` }), text,
  )));
}

// Who does what of this video: the stages by the unit that each has finished last, or that there are none.
function drawStages(told) {
  const row = `row ${Math.min(told.row + 1, told.rows)} of ${told.rows}`;
  find("engine").textContent = !told.awaited ? ""
    : told.engine === "stages" ? `${row}; ${told.awaited}` : `sampled and decoded in one process, ${row}`;
  find("stages").replaceChildren(...(told.awaited ? told.stages : []).map((stage) => {
    const chunk = stage.chunk === undefined ? "the whole window" : `chunk ${stage.chunk}`;
    const what = stage.at_work ? `row ${stage.row + 1}, ${chunk}${stage.branch ? ", second branch" : ""}`
      : stage.video ? "at another video" : "nothing so far";
    return element(
      "li", { className: stage.at_work ? "at-work" : "", title: "what it has finished last" },
      `stage ${stage.stage}: ${what}`,
      element("small", { textContent: `blocks ${stage.blocks[0]} to ${stage.blocks[1] - 1}` }),
    );
  }));
}

async function refreshChosen(video) {
  const told = await ask(`/v1/videos/${video.id}/timeline`);
  const pace = told.seconds_per_chunk ? `, ${told.seconds_per_chunk.toFixed(1)} s a chunk` : "";
  find("title").textContent = video.prompt;
  find("facts").textContent = video.error ? video.error.message
    : `${video.status.replace("_", " ")}, ${told.done} of ${told.chunks} chunks${pace}`;
  drawTimeline(told);
  find("change").hidden = video.status !== "in_progress";
  find("cancel").textContent = video.status === "completed" || video.status === "failed" ? "Delete" : "Cancel";
  find("download").hidden = video.status !== "completed";
  find("download").href = `/v1/videos/${video.id}/content`;
}

async function refresh() {
  clearTimeout(state.timer);
  try {
    const health = await ask("/health").catch((error) => ({ status: error.message }));
    find("health").textContent = health.model
      ? `${health.model} · ${health.in_progress} under way · ${health.queued} waiting` : health.status;
    const videos = await refreshList();
    find("login").hidden = true;
    find("desk").hidden = false;
    if (state.chosen) {
      const video = videos.find((one) => one.id === state.chosen) || await ask(`/v1/videos/${state.chosen}`);
      await refreshChosen(video);
    } else if (videos.length) choose(videos[0]);
  } catch (error) {
    if (error.status === 401) {
      find("desk").hidden = true;
      find("login").hidden = false;
      return;
    }
    if (error.status === 404) {
      state.chosen = null;
      find("watch").hidden = true;
      stop();
    } else find("health").textContent = "no answer from the server";
  }
  clearTimeout(state.timer);
  state.timer = setTimeout(refresh, document.hidden ? 5000 : 1000);
}

handle(find("login"), async (fields) => {
  await ask("/login", { method: "POST", body: new URLSearchParams(fields) });
  await refresh();
});

handle(find("create"), async (fields) => {
  for (const name of ["seconds", "size", "seed"]) if (!fields.get(name)) fields.delete(name);
  if (!fields.get("input_reference").size) fields.delete("input_reference");
  const video = await ask("/v1/videos", { method: "POST", body: fields });
  choose(video);
});

handle(find("change"), async (fields) => {
  await ask(`/v1/videos/${state.chosen}/prompt`, { method: "POST", body: new URLSearchParams(fields) });
});

find("cancel").addEventListener("click", async () => {
  const id = state.chosen;
  try {
    await ask(`/v1/videos/${id}`, { method: "DELETE" });
  } catch (error) {
    find("facts").textContent = error.message;
    return;
  }
  stop();
  state.chosen = null;
  find("watch").hidden = true;
  refresh();
});

find("more").addEventListener("click", () => {
  state.shown += PAGE;
  refresh();
});

refresh();
