"""The benchmark that compares the hosts, on the tiny random pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_wan

from benchmarks import hosts
from benchmarks.drift_threshold import Row
from haste_compile.errors import OptionError
from haste_compile.predictors import PREDICTORS


def test_every_host_has_its_rows(tmp_path: Path) -> None:
    model = tiny_wan.save_pipeline(tmp_path / "model")
    arguments = ["--model", model, "--prompt", "a red circle moves left", "--seeds", 0, "--device", "cpu"]
    arguments += ["--height", 128, "--width", 128, "--frames", 17, "--steps", 2, "--top-p", 0.4, 1.0]
    arguments += ["--deltas", "-o", "min_tokens=64", "-o", "xattention:block_size=64"]
    arguments += ["-o", "svg2:cluster_iterations=[3,1]", "--json", tmp_path / "hosts.json"]
    hosts.main([*map(str, arguments)])
    report = json.loads((tmp_path / "hosts.json").read_text())
    assert set(report["rows"]) == {"never"}
    curves = report["rows"]["never"]
    assert set(curves) == set(PREDICTORS)
    for low, high in curves.values():
        assert low["density"] < high["density"] <= 1 and high["psnr_mean"] > low["psnr_mean"]
        assert low["refresh_rate"] == high["refresh_rate"] == 1.0
    points = report["at_equal_density"]["never"]
    assert len(points) == 3 and all(set(point) == {"density", *PREDICTORS} for point in points)
    assert report["options"]["svg2"]["cluster_iterations"] == [3, 1]
    assert "block_size" not in report["options"]["svg2"]


def row(density: float, psnr: float) -> Row:
    return Row(0.9, None, density, 1.0, psnr, psnr, 1.0)


def test_curves_are_read_between_their_points_where_they_overlap() -> None:
    curves = {"a": [row(0.6, 30.0), row(0.2, 20.0)], "b": [row(0.4, 22.0), row(0.8, 32.0)]}
    low, high = hosts.at_equal_density(curves, points=2)
    assert low == pytest.approx({"density": 0.4, "a": 25.0, "b": 22.0})
    assert high == pytest.approx({"density": 0.6, "a": 30.0, "b": 27.0})
    assert hosts.at_equal_density({"a": [row(0.1, 1.0)], "b": [row(0.2, 1.0)]}) == []


def test_an_option_goes_to_every_host_or_to_the_one_that_is_named() -> None:
    found = hosts.host_options(["strict=true", "svg2:top_p=0.5", "reuse=interval:3"])
    assert found["svg2"] == {"strict": True, "top_p": 0.5, "reuse": "interval:3"}
    assert found["xattention"] == {"strict": True, "reuse": "interval:3"}
    with pytest.raises(OptionError, match="svg9"):
        hosts.host_options(["svg9:top_p=0.5"])
