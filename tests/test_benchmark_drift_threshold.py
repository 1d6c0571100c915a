"""The benchmark that chooses δ, on the tiny random pipeline: its drift is the gate's, its rows make sense."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny_wan
import torch

from benchmarks import drift_threshold
from haste_compile.kernels.drift_gate.reference import decide
from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Counter, Ctl

SIZE = [
    "--height",
    "128",
    "--width",
    "128",
    "--frames",
    "17",
    "--steps",
    "4",
    "-o",
    "block_size=64",
    "-o",
    "min_tokens=64",
    "-o",
    "stride=8",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drift")
    model = tiny_wan.save_pipeline(folder / "model")
    arguments = ["--model", model, "--prompt", "a red circle moves left", "--seeds", 0, 1]
    arguments += ["--top-p", 0.7, "--deltas", 0.001, 1e6, "--device", "cpu", "--json", folder / "report.json"]
    drift_threshold.main([*map(str, arguments), *SIZE])
    return json.loads((folder / "report.json").read_text())


def test_a_larger_threshold_rebuilds_less(report: dict[str, Any]) -> None:
    never, small, large = report["rows"]
    assert never["delta"] is None and never["refresh_rate"] == 1.0
    assert small["refresh_rate"] == 1.0
    assert large["refresh_rate"] == pytest.approx(1 / 4)
    # A threshold that no drift stays below leaves the very videos of reuse="never".
    assert small["density"] == never["density"] and small["psnr_worst"] == never["psnr_worst"]
    assert all(0.2 <= row["density"] < 1 and row["psnr_worst"] <= row["psnr_mean"] for row in report["rows"])


def test_percentiles_are_those_of_small_steps(report: dict[str, Any]) -> None:
    found = list(report["drift_percentiles"]["0.7"].values())
    assert len(found) == 5 and found == sorted(found)
    assert found[0] > 0.001


def test_drift_is_what_the_gate_compares_with_its_threshold() -> None:
    anchors, means = torch.randn(2, 1, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    drift = drift_threshold.drifts(anchors, means)[0]
    ctl = torch.zeros(CTL_COLUMNS, dtype=torch.int32)
    counters = torch.zeros(1, 3, COUNTER_COLUMNS, dtype=torch.int64)
    ctl[Ctl.EPOCH] = 1
    counters[..., Counter.EPOCH] = counters[..., Counter.SEEN] = 1
    rules = {"reuse": "drift", "interval": 0, "max_age": 0, "relative": False}
    rebuilds = decide(
        *means.unbind(2),
        drift * torch.tensor([0.99, 1.01, 0.99]),
        ctl,
        anchors,
        counters,
        tokens=320,
        gate_low=0.0,
        gate_high=1.0,
        **rules,
    )[0]
    assert rebuilds.bool().tolist() == [[True, False, True]]


def test_the_request_is_recorded(report: dict[str, Any]) -> None:
    assert [request["seed"] for request in report["requests"]] == [0, 1]
    assert report["steps"] == 4 and report["options"]["block_size"] == 64
