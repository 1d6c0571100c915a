"""The examples as a user runs them, on the embedded model at its own size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from haste_compile.evaluation.video import read_mp4
from haste_compile.loading import NANO_WAN

ROOT = Path(__file__).parents[1]
SIZE = ["--model", NANO_WAN, "--height", "256", "--width", "256", "--frames", "33"]
OPTIONS = json.dumps({"block_size": 64, "inner": "eager"})  # eager: no C++ compiler run for the sparse side


def _run(example: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_to_video(tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    text = _run("text_to_video.py", *SIZE, "--steps", "2", "--out", out, "--options", OPTIONS)
    assert "8 attention sites rewritten" in text and "masks rebuilt" in text
    assert read_mp4(out).shape == (33, 256, 256, 3)


def test_compile_transformer() -> None:
    text = _run("compile_transformer.py", *SIZE, "--steps", "2", "--options", OPTIONS)
    assert re.findall(r"^(\w+): first step [\d.]+ s, later steps [\d.]+ s$", text, re.M) == ["dense", "haste"]


@pytest.mark.parametrize("example", ["text_to_video.py", "compile_transformer.py"])
def test_written_for_wan(example: str) -> None:
    text = (ROOT / "examples" / example).read_text()
    assert 'default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"' in text
    assert "default=480" in text and "default=832" in text and "default=81" in text
