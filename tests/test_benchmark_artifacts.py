"""The benchmarks of artifacts, on the tiny random pipeline: they compare what they say, and can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_wan
import torch

from benchmarks import artifact_parity, artifact_speed
from haste_compile.artifacts import FORMATS

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


def test_speed_sums_up_interleaved_times():
    row = artifact_speed.summary({"live": [2.0, 1.0, 3.0], "artifact": [2.2, 2.0, 2.1]})
    assert row == {
        "live_ms": 2.0,
        "artifact_ms": 2.1,
        "ratio": pytest.approx(1.05),
        "spread": pytest.approx(0.5),
    }
