"""A calibration killed at any moment, or divided over ranks, ends in the very bytes of an unbroken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Thirty calibrations in one process of their own: what it prints."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(TESTS / "calibration" / "interrupted.py"), "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_equal_calls_give_equal_bytes(result: dict[str, Any], method: str) -> None:
    first, again = result[method]["whole"]
    assert first == again


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_killed_at_random_moments(result: dict[str, Any], method: str) -> None:
    found = result[method]["interrupted"]
    assert {run["digest"] for run in found} == {result[method]["whole"][0]}
    assert sum(run["killed"] for run in found) >= len(found) - 2, "the others were done before"
    assert len(found) == 2 or len({run["left"] for run in found}) > 2, "killed at different stages"


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_two_ranks_give_the_bytes_of_one(result: dict[str, Any], method: str) -> None:
    assert result[method]["shared"] == {"codes": [0, 0], "digest": result[method]["whole"][0]}
