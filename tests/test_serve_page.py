"""The page of ``pavdm serve`` in a real browser without a screen: what a person does, and sees."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_stream
from serving import Served, served, settings

from pavdm_dist.engine.flight import Flight
from pavdm_dist.engine.order import Unit
from pavdm_dist.farm.desk import Sight
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.serve import records

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
By = pytest.importorskip("selenium.webdriver.common.by").By
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# A browser beside a model that samples, on a machine that others use, too.
PATIENCE_S = 300
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromium-driver"),
    pytest.mark.slow,
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    """The shipped model: its videos can be looked at."""
    with served(settings("embedded"), tmp_path / "out") as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def shoot(browser: Any, name: str) -> None:
    """A screenshot, where somebody wants to look at it."""
    if folder := os.environ.get("PAVDM_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def look(browser: Any, selector: str, what: str) -> list[Any]:
    """What the page's elements hold, all as they are at one moment."""
    script = f"return [...document.querySelectorAll(arguments[0])].map((one) => {what})"
    return list(browser.execute_script(script, selector))


def test_a_person_asks_watches_changes_the_prompt_and_cancels(server: Served, browser: Any) -> None:
    def until(what: Any) -> Any:
        return WebDriverWait(browser, PATIENCE_S, poll_frequency=0.1).until(what)

    def text(id: str) -> str:
        return browser.find_element(By.ID, id).text

    server.desk.hold(3)
    browser.get(server.url)
    until(lambda _: browser.find_element(By.ID, "create").is_displayed())
    create = browser.find_element(By.ID, "create")
    # What cannot be is said in the form.
    create.find_element(By.NAME, "prompt").send_keys("a red three drifting up")
    create.find_element(By.NAME, "size").send_keys("1x1")
    create.find_element(By.TAG_NAME, "button").click()
    until(lambda _: "height=1" in create.find_element(By.TAG_NAME, "output").text or "width=1" in create.text)
    create.find_element(By.NAME, "size").clear()
    create.find_element(By.NAME, "seconds").send_keys("8")
    create.find_element(By.TAG_NAME, "button").click()
    until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#videos li"))
    # Three chunks are there, the video plays while the rest waits.
    until(lambda _: "3 of" in text("facts"))
    until(
        lambda _: browser.execute_script(
            "const v = document.getElementById('player'); return v.readyState >= 2 && v.videoWidth > 0"
        )
    )
    until(lambda _: browser.execute_script("return document.getElementById('player').currentTime > 0.3"))
    # In one look: the page draws its lists anew every second.
    marks = look(browser, "#timeline i", "[one.className, one.style.opacity]")
    kinds = [kind for kind, _ in marks]
    assert kinds[:3] == ["done"] * 3 and kinds[3] == "window" and kinds[-1] == ""
    # Nobody but this process is at work, which is said.
    assert re.search(r"^sampled and decoded in one process, row \d+ of \d+$", text("engine"))
    assert not browser.find_elements(By.CSS_SELECTOR, "#stages li")
    faint = [float(opacity) for kind, opacity in marks if kind == "window"]
    assert faint == sorted(faint, reverse=True)
    shoot(browser, "gallery")
    # Another prompt, from the next chunk on.
    change = browser.find_element(By.ID, "change")
    change.find_element(By.NAME, "prompt").send_keys("a blue seven drifting down")
    change.find_element(By.TAG_NAME, "button").click()
    until(lambda _: server.desk.counts.prompts == 1)
    server.desk.let(6)
    until(lambda _: "a blue seven" in text("prompts"))
    shoot(browser, "prompt-changed")
    server.desk.let()
    until(lambda _: browser.find_element(By.ID, "download").is_displayed())
    assert not change.is_displayed(), "its prompt cannot be changed any more"
    assert look(browser, "#videos li", "one.className") == ["completed"]
    until(lambda _: browser.execute_script("return document.getElementById('player').duration") > 7.5)
    shoot(browser, "complete")
    # Chosen again it is the file.
    browser.execute_script("document.querySelector('#videos li button').click()")
    playing = (
        "const v = document.getElementById('player'); return v.currentSrc.endsWith('/content') && v.duration > 7.5"
    )
    until(lambda _: browser.execute_script(playing))
    until(lambda _: browser.execute_script("return document.getElementById('player').currentTime > 0.3"))
    assert text("broken") == ""
    # A second one is cancelled in the middle.
    server.desk.hold(1)
    create.find_element(By.NAME, "prompt").send_keys("a white four")
    create.find_element(By.TAG_NAME, "button").click()
    until(lambda _: "1 of" in text("facts") and "a white four" in text("title"))
    browser.find_element(By.ID, "cancel").click()
    server.desk.let()
    until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#videos li")) == 1)
    wrong = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("status of 400" in line or "status of 404" in line for line in wrong), wrong


def test_a_page_asks_for_the_token_once(tmp_path: Path, browser: Any) -> None:
    with served(settings("embedded"), tmp_path / "out", token="s3cret-of-this-test") as server:
        browser.get(server.url)
        login = browser.find_element(By.ID, "login")
        WebDriverWait(browser, PATIENCE_S).until(lambda _: login.is_displayed())
        for token, shown in (("wrong", True), ("s3cret-of-this-test", False)):
            field = login.find_element(By.NAME, "token")
            field.clear()
            field.send_keys(token)
            login.find_element(By.TAG_NAME, "button").click()
            if shown:
                WebDriverWait(browser, PATIENCE_S).until(lambda _: "not this server" in login.text)
        WebDriverWait(browser, PATIENCE_S).until(lambda _: browser.find_element(By.ID, "desk").is_displayed())
        browser.refresh()
        WebDriverWait(browser, PATIENCE_S).until(lambda _: browser.find_element(By.ID, "desk").is_displayed())


def test_stages_at_work_are_shown_with_what_each_finished_last(
    server: Served, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page alone: the server's answer is one of a video on three stages, whose second chunk is being decoded."""
    server.desk.hold(1)
    told, flight = records.timeline, Flight(tiny_stream(0), 3)
    flight.undecoded.append((CleanChunk(1, torch.zeros(1)), None))

    def on_stages(desk: Any, id: str) -> dict[str, Any]:
        units = (
            Unit(0, 0, 9, 0, True, True, (), False, False),
            Unit(0, 1, 8, 1, True, True, (), False, False, 5),
            None,
        )
        sight = Sight(replace(flight.at_work, row=8, stages=units), {0: id, 1: "other"})
        monkeypatch.setattr(desk, "split", [(0, 2), (2, 4), (4, 6)])
        monkeypatch.setattr(desk, "sight", lambda _: sight)
        return told(desk, id)

    monkeypatch.setattr(records, "timeline", on_stages)
    id = server.front.create({"prompt": "a red three drifting up", "seconds": "8"}, None)["id"]
    try:
        browser.get(server.url)
        WebDriverWait(browser, PATIENCE_S).until(
            lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#stages li.at-work")) == 1
        )
        shoot(browser, "stages")
        assert look(browser, "#stages li", "one.innerText.split(/\\n+/)") == [
            ["stage 0: row 10, the whole window", "blocks 0 to 1"],
            ["stage 1: at another video", "blocks 2 to 3"],
            ["stage 2: nothing so far", "blocks 4 to 5"],
        ]
        kinds = look(browser, "#timeline i", "one.className")
        assert kinds[1] == "decoding" and "window" in kinds
        said = browser.find_element(By.ID, "engine").text
        assert re.fullmatch(r"row 10 of \d+; chunk 1 is with the decoder", said), "once"
    finally:
        server.front.desk.cancel(id)
        server.desk.let()
