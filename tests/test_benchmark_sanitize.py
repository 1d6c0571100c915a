from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import sanitize  # noqa: E402


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 1 error\n", 1),
        ("========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
        ("Error: Device not supported\n", None),
    ],
)
def test_findings_are_counted(output: str, count: int | None) -> None:
    assert sanitize.findings(output) == count


def test_without_the_tool_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert sanitize.main([]) == 2
    assert "compute-sanitizer" in capsys.readouterr().err


def _tool(folder: Path, script: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', 0),
        ('echo "========= ERROR SUMMARY: 2 errors"; exit 1', 2),
        ('echo "========= ERROR SUMMARY: 0 errors"; exit 3', None),  # the case itself failed
        ("exit 0", None),
        ("exec sleep 30", None),
    ],
)
def test_a_run_counts_only_if_tool_and_case_came_to_their_end(
    script: str, count: int | None, tmp_path: Path
) -> None:
    found, _ = sanitize.examine(_tool(tmp_path, script), "memcheck", "attention op", limit=2)
    assert found == count


def test_the_cases_of_the_ops_run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = sanitize.cases(device)
    assert {"refresh, drift", "attention op, dense step", "attention over clusters"} <= set(found)
    for case in found.values():
        case()
