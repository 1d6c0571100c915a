"""The notebook's commands are ones that the scripts take, and its figures those of the record."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
NOTEBOOK = (ROOT / "docs/speed-notebook.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", NOTEBOOK, re.M | re.S) for line in block.splitlines()
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken(command: str) -> None:
    python, dash_m, module, *arguments = shlex.split(command)
    assert (python, dash_m) == ("python", "-m")
    if module == "pytest":
        paths = [argument for argument in arguments if argument.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    importlib.import_module(module).parse(arguments)


def test_refresh_and_reuse_are_the_recorded_ones() -> None:
    record = json.loads((ROOT / "benchmarks/results/attention-h200.json").read_text(encoding="utf-8"))
    share: dict[tuple[str, int], float] = {}
    for tokens in (32760, 75600):
        rows = [row for row in record["rows"] if row["tokens"] == tokens]
        dense = [row["milliseconds"] for row in rows if row["what"] == "dense SDPA"]
        for word in ("rebuilds", "reuses"):
            row = next(row for row in rows if row["what"].endswith(word))
            share[word, tokens] = 100 * row["milliseconds"] / dense[0]  # as in the README
    assert f"| {share['rebuilds', 32760]:.1f} %, {share['rebuilds', 75600]:.1f} % |" in NOTEBOOK
    reuse = f"{share['reuses', 32760]:.1f} % at 32,760, {share['reuses', 75600]:.1f} % at 75,600"
    assert reuse in NOTEBOOK


def test_the_default_kernels_range_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks/results/attention-h200.json").read_text(encoding="utf-8"))
    rates = [row["tflops"] for row in record["rows"] if row["what"] == "haste kernel"]
    assert f"{min(rates):.0f}–{max(rates):.0f} TFLOP/s" in NOTEBOOK
