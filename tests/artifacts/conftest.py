"""Artifacts that several test files share, since compiling them is what takes the time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_case import export

NAMES = {"torchscript": "tiny.ts", "aoti": "tiny.pt2", "onnx": "tiny.onnx"}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Format -> an artifact of the tiny transformer, made at the first request; not to be changed."""
    folder = tmp_path_factory.mktemp("artifacts")

    @functools.cache
    def make(format: str) -> Path:
        path = folder / NAMES[format]
        export(format, path)
        return path

    return make
