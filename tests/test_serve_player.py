"""The player of the shipped page in Node: with a browser's buffer that is full, and a stream that breaks off.

What Media Source Extensions say of a ``SourceBuffer`` is in ``BROWSER``; a real browser is in ``test_serve_page.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import resources
from typing import Any

import pytest

NODE = shutil.which("node")
pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(NODE is None, reason="needs node")]

BROWSER = r"""
"use strict";
const vm = require("vm"), QUOTA = 10;
const elements = new Map(), taken = [], removed = [], ends = [];
let socket = null, buffer = null, source = null;

class Events {
  constructor() { this.all = {}; }
  addEventListener(name, act) { (this.all[name] = this.all[name] || []).push(act); }
  fire(name) { for (const act of this.all[name] || []) act(); }
}
// A second of video is a byte here.
class SourceBuffer extends Events {
  constructor() {
    super();
    [this.updating, this.from, this.to] = [false, 0, 0];
    this.buffered = { get length() { return buffer.to > buffer.from ? 1 : 0; }, start: () => this.from };
  }
  appendBuffer(data) {
    const full = Object.assign(new Error("full"), { name: "QuotaExceededError" });
    if (this.to - this.from + data.byteLength > QUOTA) throw full;
    this.change(() => { this.to += data.byteLength; taken.push(data.number); });
  }
  remove(from, to) { this.change(() => { this.from = to; removed.push(to); }); }
  change(act) {
    if (this.updating) throw new Error("it is updating");
    this.updating = true;
    setImmediate(() => { act(); this.updating = false; this.fire("updateend"); });
  }
}
class MediaSource extends Events {
  constructor() {
    super();
    [source, this.readyState] = [this, "closed"];
    setImmediate(() => { this.readyState = "open"; this.fire("sourceopen"); });
  }
  addSourceBuffer() { return buffer = new SourceBuffer(); }
  endOfStream() { this.readyState = "ended"; ends.push(taken.length); }
}
class WebSocket {
  constructor() { [socket, this.closed] = [this, false]; }
  close() { this.closed = true; }
}
class Element extends Events {
  constructor() { super(); this.currentTime = 0; this.textContent = ""; }
  load() { this.currentTime = 0; }
  removeAttribute(name) { delete this[name]; }
}
const find = (id) => elements.get(id) || elements.set(id, new Element()).get(id);
const page = vm.createContext({
  MediaSource, WebSocket, URL: { createObjectURL: () => "blob:", revokeObjectURL() {} }, console, clearTimeout,
  location: { protocol: "http:", host: "x" }, document: { getElementById: find }, fetch: () => new Promise(() => {}),
});
const later = async () => { for (let turn = 0; turn < 50; turn++) await new Promise(setImmediate); };
const say = (data) => socket.onmessage({ data });
const piece = (number, size = 3) => Object.assign(new ArrayBuffer(size), { number });
const watched = (seconds) => { find("player").currentTime = seconds; find("player").ontimeupdate(); };
"""


def told(script: str) -> dict[str, Any]:
    """What a script says that drives the page."""
    source = (resources.files("pavdm_dist.serve") / "page" / "page.js").read_text()
    code = (
        f"{BROWSER}\nvm.runInContext({json.dumps(source)}, page);\n"
        f"(async () => {{\n{script}\n"
        "process.stdout.write(JSON.stringify({ taken, removed, ends, closed: socket && socket.closed,"
        ' said: find("broken").textContent, src: find("player").src, at: find("player").currentTime }));\n})();'
    )
    assert NODE is not None
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_no_fragment_is_lost_where_the_browsers_buffer_is_full() -> None:
    found = told("""
        page.play({ id: "v", status: "in_progress" });
        say('{"mime": "m"}');  // before the source is open
        for (let number = 0; number < 12; number++) say(piece(number));
        say('{"status": "completed"}');
        await later();
        const full = [...taken];
        for (let second = 0; second < 40; second += 1) { watched(second); await later(); }
        if (full.join() !== "0,1,2") throw new Error(full);
    """)
    assert found["taken"] == list(range(12)) and found["ends"] == [12]
    assert found["said"] == "" and found["removed"] and found["removed"] == sorted(found["removed"])


def test_a_stream_that_breaks_off_is_told_of_and_gone_on_with() -> None:
    begin = """
        page.play({ id: "v", status: "in_progress" });
        await later();
        say('{"mime": "m"}');
        for (let number = 0; number < 3; number++) say(piece(number));
        socket.onclose({ reason: "" });
        await later();
    """
    found = told(begin)
    assert found["said"] == "the live stream broke off; choose the video again to go on with it"
    assert found["taken"] == [0, 1, 2] and found["ends"] == [3], "what has come is played"
    again = told(f"{begin} watched(7); vm.runInContext('state.chosen = \"v\"', page); page.play({{ id: 'v' }});")
    assert again["said"] == "" and again["at"] == 7
    # One that was left, or came to its end, says nothing.
    for end in ("page.stop();", 'say(\'{"status": "completed"}\');'):
        quiet = told(
            f"page.play({{ id: 'v' }}); await later(); const old = socket; {end} old.onclose({{ reason: '' }});"
        )
        assert quiet["said"] == ""


def test_a_page_that_nobody_looks_at_keeps_so_much_and_no_more() -> None:
    found = told("""
        page.play({ id: "v", status: "in_progress" });
        await later();
        say('{"mime": "m"}');
        for (let number = 0; number < 20 && !socket.closed; number++) say(piece(number, 2 ** 24));
    """)
    assert found["closed"] and "more waits than this page keeps" in found["said"]


def test_a_complete_video_is_a_file_with_ranges() -> None:
    found = told("page.play({ id: 'v', status: 'completed' });")
    assert found["src"] == "/v1/videos/v/content" and found["closed"] is None, "no stream was begun"
