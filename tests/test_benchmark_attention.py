from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_attention", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no CUDA device" in printed.err


def test_a_wrong_output_is_refused(benchmark: ModuleType) -> None:
    q, k, v = (torch.randn(1, 200, 2, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    problem = benchmark.Problem(q, k, v, torch.ones(1, 2, 2, 2, dtype=torch.bool))
    out = F.scaled_dot_product_attention(q, k, v)
    assert benchmark.check("SDPA", out, problem) <= 2
    out[0, 1, 150, 7] += 0.1
    with pytest.raises(benchmark.WrongResultError, match="head 1, query block 1"):
        benchmark.check("SDPA", out, problem)
    out[0, 1, 150, 7] = float("nan")
    with pytest.raises(benchmark.WrongResultError, match="error nan"):
        benchmark.check("SDPA", out, problem)


def test_a_row_counts_kept_pairs(benchmark: ModuleType) -> None:
    q = torch.zeros(1, 2, 200, 128)
    problem = benchmark.Problem(q, q, q, torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2))
    pairs = problem.pairs()
    assert pairs == 2 * (128**2 + 72**2)
    found = benchmark.row("ours", problem, [3.0, 1.0, 2.0], pairs, 1.0)
    assert found.density == pairs / (2 * 200**2)
    assert (found.milliseconds, found.spread) == (2.0, 2.0)
    assert found.tflops == pytest.approx(4 * 128 * pairs / 2e-3 / 1e12)


def test_the_readme_gives_the_recorded_run() -> None:
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    recorded = json.loads((root / "benchmarks/results/attention-h200.json").read_text(encoding="utf-8"))
    for name in ("gpu", "torch", "triton", "date"):
        assert recorded["environment"][name] in readme
    groups: list[dict[str, dict[str, Any]]] = []
    for row in recorded["rows"]:
        if row["what"] == "dense SDPA":
            groups.append({})
        groups[-1][row["what"]] = row

    def cell(row: dict[str, Any]) -> str:
        return f"{row['milliseconds']:.2f} ± {row['spread'] / 2:.2f}"

    assert len(groups) == 8
    for group in groups:
        dense, flex, ours = (group[what] for what in ("dense SDPA", "FlexAttention", "haste kernel"))
        cells = [f"{ours['tokens']:,}", f"{ours['density']:.2f}", cell(dense), cell(flex), cell(ours)]
        cells += [f"{ours['tflops']:.0f}"]
        cells += [f"{other['milliseconds'] / ours['milliseconds']:.2f}×" for other in (dense, flex)]
        assert f"| {' | '.join(cells)} |" in readme
        for what, row in group.items():
            if what.startswith("refresh_mask_"):
                assert cell(row) in readme
