"""The benchmarks of artifacts, on small random models: they compare what they say, and can fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_wan
import torch

from benchmarks import artifact_parity, artifact_speed, wan_forward
from benchmarks.attention_problems import WrongResultError
from haste_compile.artifacts import FORMATS

ROOT = Path(__file__).parents[1]
SIZE = ["--height", "128", "--width", "128", "--frames", "17", "--steps", "3"]
OPTIONS = [
    "-o",
    "block_size=64",
    "-o",
    "min_tokens=64",
    "-o",
    "stride=8",
    "-o",
    "top_p=0.7",
    "-o",
    "delta=10",
]


def test_parity_of_an_artifact_in_a_fresh_process(tmp_path: Path):
    model = tiny_wan.save_pipeline(tmp_path / "model")
    out = tmp_path / "parity.json"
    arguments = [
        "--model",
        str(model),
        "--prompt",
        "a red circle",
        "--formats",
        "torchscript",
        "--json",
        str(out),
    ]
    assert artifact_parity.main([*arguments, *SIZE, *OPTIONS]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["relative_error"] == 0 and row["repeats"] and row["same_masks"]
    assert 0.2 < row["density"] < 1 and row["bytes"] > 100_000 and row["steps"] == 3


def test_parity_fails_where_it_should():
    row = {"relative_error": 1e-3, "tolerance": 1e-4, "repeats": True, "same_masks": True}
    assert not artifact_parity.good(row)
    assert artifact_parity.good({**row, "tolerance": 1e-2})
    assert not artifact_parity.good({**row, "tolerance": 1e-2, "repeats": False})


def test_every_format_has_a_tolerance():
    assert set(FORMATS) <= set(artifact_parity.TOLERANCES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_speed_needs_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert artifact_speed.main(["--layers", "1"]) == 2
    assert "DeviceError" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small() -> wan_forward.Run:
    """One layer × 12 heads × 128 on 768 tokens, eager; six steps."""
    return wan_forward.Run(
        wan_forward.Geometry(1, 12, 128, (4, 12, 16), text_tokens=8), "cpu", torch.float32,
        {"block_size": 64, "stride": 8, "inner": "eager"},
        density=0.25, refresh=0.2, steps=6, text_dim=32, in_channels=4, out_channels=4,
    )  # fmt: skip


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def test_speed_compares_the_same_steps_of_both_sides(small: wan_forward.Run):
    record = artifact_speed.measure(small, timer=milliseconds, format="torchscript")
    assert json.loads(json.dumps(record))["weights"] == "structured random weights: speed only"
    assert (record["num_frames"], record["height"], record["width"]) == (13, 192, 256)
    assert record["timed_calls"] == 5 and record["relative_error"] == 0 and record["bytes"] > 100_000
    for name, wanted, apart in (("density", 0.25, 0.04), ("refresh_rate", 0.2, 0.08)):
        live, artifact = record[name].values()
        assert live == artifact == pytest.approx(wanted, abs=apart)


def test_speed_times_nothing_when_outputs_differ(small: wan_forward.Run, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    monkeypatch.setattr(artifact_speed, "relative_error", lambda *sides: float("nan"))
    with pytest.raises(WrongResultError, match="differ by nan"):
        artifact_speed.measure(small, timer=lambda call: pytest.fail("timed"), format="torchscript")


def test_speed_sums_up_interleaved_times():
    row = artifact_speed.summary([2.0, 1.0, 3.0], [2.2, 2.0, 2.1])
    assert row == {
        "timed_calls": 3,
        "live_ms": 2.0,
        "live_spread": pytest.approx(0.5),
        "artifact_ms": 2.1,
        "artifact_spread": pytest.approx(0.1 / 2.1),
        "ratio": pytest.approx(1.05),
        "paired_ratio": pytest.approx(1.1),
        "paired_quartiles": pytest.approx([0.9, 1.55]),
    }


def test_the_docs_give_the_recorded_speed() -> None:
    record = json.loads((ROOT / "benchmarks/results/artifact-speed-h200.json").read_text(encoding="utf-8"))
    docs = " ".join((ROOT / "docs/export.md").read_text(encoding="utf-8").split())
    low, high = record["paired_quartiles"]
    for text in (
        f"{record['live_ms']:.2f} ms live and {record['artifact_ms']:.2f} ms as an artifact, "
        f"a ratio of {record['ratio']:.3f}",
        f"the median ratio of a step is {record['paired_ratio']:.3f}, its quartiles {low:.3f} and {high:.3f}",
        f"{record['bytes'] / 1e9:.2f} GB on disk; {record['export_s']:.0f} s to export, "
        f"{record['load_s']:.1f} s to load",
    ):
        assert text in docs
    assert f"Outputs agree to within a relative error of {record['relative_error']:.1e}" in docs
    assert record["relative_error"] <= artifact_speed.TOLERANCE
    assert abs(record["ratio"] - 1) <= 0.03 and record["layers"] == 30 and "All 30 blocks at 480p" in docs
