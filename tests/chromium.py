"""A headless Chromium for tests of HTML pages: Debian's packages chromium and chromium-driver."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A Selenium session; where Chromium is missing, the test is skipped, but fails in CI."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        if os.environ.get("CI"):
            pytest.fail("chromium and chromedriver must be installed in CI; .ci/run does that")
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1750"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()


def open_page(session: Any, page: Path) -> None:
    """Load a comparison page and wait until every clip shows a picture."""
    session.get(page.as_uri())
    wait_for(
        lambda: session.execute_script("return clips.every(c => c.readyState >= 2)"), "the clips to load"
    )


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def wait_for_seek(session: Any) -> None:
    wait_for(lambda: session.execute_script("return clips.every(c => c.paused && !c.seeking)"), "the seek")


def clip_times(session: Any) -> list[float]:
    return session.execute_script("return clips.map(c => c.currentTime)")


def assert_clean(session: Any) -> None:
    """No console error since the last call, and no request but for the file itself and its own data."""
    assert [entry for entry in session.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in session.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(("file:", "data:")) for url in urls), urls
