"""The comparison page in headless Chromium: clips play, the slider keeps them in step, nothing is remote."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import assert_clean, chromium, clip_times, open_page, wait_for, wait_for_seek

from haste_compile.evaluation.compare_page import Comparison, render_page
from haste_compile.evaluation.video import read_mp4, write_mp4

FPS, FRAMES = 16, 33


def _moving_square(shift: int) -> np.ndarray:
    video = np.full((FRAMES, 64, 64, 3), 0.2, np.float32)
    for t in range(FRAMES):
        left = (t + shift) % 48
        video[t, 20:36, left : left + 16] = (0.9, 0.2, 0.1)
    return video


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    clips = {}
    for caption, shift in (("Dense", 0), ("HASTE", 1), ("Absolute difference × 4", 2)):
        write_mp4(folder / "clip.mp4", _moving_square(shift), fps=FPS)
        clips[caption] = (folder / "clip.mp4").read_bytes()
    comparison = Comparison(
        title="a <red> circle & a blue square </script>",
        clips=clips,
        fps=FPS,
        frames=FRAMES,
        figures={"Density": "41 %", "PSNR": "31.2 dB", "Mask rebuilds": "23 %", "Speed": "1.31×"},
        sites=tuple(f"blocks.{i}.attn1" for i in range(8)),
        density_by_head=tuple(tuple((6 * layer + head) / 47 for head in range(6)) for layer in range(8)),
        refreshes_by_step=tuple(1.0 / (1 + step) for step in range(22)),
        step_seconds={
            "Dense": tuple(2.4 + 0.1 * (s % 3) for s in range(22)),
            "HASTE": tuple(1.9 - 0.01 * s for s in range(22)),
        },
        notes=("Python 3.11, torch 2.13.0",),
    )
    path = folder / "compare.html"
    path.write_text(render_page(comparison), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as session:
        yield session


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    open_page(browser, page)
    return browser


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,40})""", text)
    assert len(addresses) == 4  # three clips and the empty icon
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in text and "@import" not in text
    assert "fetch(" not in text and "import(" not in text


def test_prompt_is_escaped(opened: Any) -> None:
    assert opened.find_element("css selector", "h1").text == "a <red> circle & a blue square </script>"


def test_clips_play_in_step(opened: Any) -> None:
    opened.execute_script("seek(0)")
    opened.find_element("id", "play").click()
    wait_for(lambda: min(clip_times(opened)) > 0.6, "all clips to play for 0.6 s")
    opened.find_element("id", "play").click()
    wait_for_seek(opened)
    times = clip_times(opened)
    assert len(times) == 3
    assert max(times) - min(times) < 0.5 / FPS
    assert opened.execute_script("return clips.map(c => c.error)") == [None] * 3


def test_slider_and_keys_move_every_clip(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = opened.find_element("id", "frame")
    slider.send_keys(Keys.HOME)
    for _ in range(7):
        slider.send_keys(Keys.ARROW_RIGHT)
    wait_for_seek(opened)
    assert [int(t * FPS) for t in clip_times(opened)] == [7, 7, 7]
    assert opened.find_element("id", "where").text == f"frame 7 of {FRAMES - 1}"

    opened.execute_script("document.activeElement.blur()")
    opened.find_element("css selector", "body").send_keys(Keys.END)
    wait_for_seek(opened)
    assert [int(t * FPS) for t in clip_times(opened)] == [FRAMES - 1] * 3


def test_slider_shows_different_frames_of_the_clip(opened: Any) -> None:
    """The picture itself moves: a decoder stuck on frame 0 would pass a test of times alone."""
    pixels = []
    for frame in (0, 20):
        opened.execute_script(f"seek({frame})")
        wait_for_seek(opened)
        pixels.append(
            opened.execute_script(
                "const c = document.createElement('canvas'); c.width = c.height = 64;"
                "const g = c.getContext('2d'); g.drawImage(clips[0], 0, 0);"
                "return Array.from(g.getImageData(0, 28, 64, 1).data).filter((_, i) => i % 4 == 0)"
            )
        )
    first, later = np.array(pixels)
    assert first[8] > 180 and later[8] < 110  # the square covers columns 0–15, then 20–35
    assert first[28] < 110 and later[28] > 180


def test_charts_show_the_numbers(opened: Any) -> None:
    cells = opened.execute_script("return document.querySelectorAll('#density rect').length")
    bars = opened.execute_script("return document.querySelectorAll('#refreshes rect').length")
    dots = opened.execute_script("return document.querySelectorAll('#seconds circle').length")
    assert (cells, bars, dots) == (48, 22, 44)
    rows = opened.execute_script(
        "return Array.from(document.querySelectorAll('#density-table tr')).map(r => r.textContent)"
    )
    assert len(rows) == 9 and rows[1].startswith("blocks.0.attn1") and rows[-1].endswith("100 %")


def test_no_console_error_and_no_request(opened: Any) -> None:
    assert_clean(opened)


def test_mp4_holds_every_frame(tmp_path: Path) -> None:
    video = _moving_square(0)
    write_mp4(tmp_path / "clip.mp4", video, fps=FPS)
    frames = read_mp4(tmp_path / "clip.mp4")
    assert frames.shape == video.shape
    error = frames.astype(np.float32) / 255 - video
    assert float(np.mean(error**2)) < 1e-3  # 30 dB: chroma is halved at the edges of the square
