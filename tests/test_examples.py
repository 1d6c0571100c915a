"""The examples as a user runs them, on the tiny random pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_wan

from haste_compile.evaluation.video import read_mp4

ROOT = Path(__file__).parents[1]
SMALL = ["--height", "128", "--width", "128", "--frames", "17"]
OPTIONS = json.dumps({"block_size": 64, "min_tokens": 64, "top_p": 0.5, "inner": "eager"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def _run(example: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_to_video(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    text = _run(
        "text_to_video.py", "--model", model, "--steps", "2", "--out", out, *SMALL, "--options", OPTIONS
    )
    assert "2 attention sites rewritten" in text and "masks rebuilt" in text
    assert read_mp4(out).shape == (17, 128, 128, 3)


def test_compile_transformer(model: Path) -> None:
    text = _run("compile_transformer.py", "--model", model, "--steps", "3", *SMALL, "--options", OPTIONS)
    assert re.findall(r"^(\w+): first step [\d.]+ s, later steps [\d.]+ s$", text, re.M) == ["dense", "haste"]


@pytest.mark.parametrize("example", ["text_to_video.py", "compile_transformer.py"])
def test_written_for_wan(example: str) -> None:
    text = (ROOT / "examples" / example).read_text()
    assert 'default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"' in text
    assert "default=480" in text and "default=832" in text and "default=81" in text
