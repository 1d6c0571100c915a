"""docs/calibration.md: its figures are the records', its commands run, and so do the scripts behind them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch

import haste_compile
from benchmarks import (
    calibration_bench,
    calibration_cost,
    calibration_forms,
    calibration_report,
    calibration_study,
)
from benchmarks.calibration_rows import bootstrap_interval
from haste_compile import cli
from haste_compile.calibration.command import NANO_PROMPTS, NANO_SETTINGS
from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.config import HasteConfig
from haste_compile.generation import NANO_OPTIONS, NANO_REQUEST, complete_options
from haste_compile.loading import NANO_PROFILE, NANO_WAN, load_pipeline

DOCUMENT = calibration_report.DOCUMENT.read_text(encoding="utf-8")
SIZE = ["--height", "128", "--width", "128", "--frames", "17"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_figures_are_the_records() -> None:
    assert calibration_report.fill(DOCUMENT) == DOCUMENT
    assert DOCUMENT.count("<!-- end -->") == len(calibration_report.RECORDS)


def test_the_readme_s_figures_are_the_records() -> None:
    readme = (calibration_report.ROOT / "README.md").read_text(encoding="utf-8")
    records = {
        name: json.loads((calibration_report.RESULTS / file).read_text(encoding="utf-8"))
        for name, (file, _) in calibration_report.RECORDS.items()
        if (calibration_report.RESULTS / file).is_file()
    }
    rows = {row["name"]: np.array(row["psnr"]) for row in records["study-gpu"]["rows"]}
    gain = rows["+ EBC"] - rows["XAttention, shared τ"]
    low, high = bootstrap_interval(gain)
    minutes = [
        records[f"cost-{model}"]["estimates"][form]["seconds"] / 60
        for form in ("gradient", "exact")
        for model in ("1.3b", "14b")
    ]
    for figure in (
        f"On {len(gain)} videos of nano-wan",
        f"{gain.mean():.1f} dB (95 % interval {low:.1f} to {high:.1f})",
        f"{minutes[0]:.0f} minutes for Wan 2.1 1.3B, {minutes[1]:.0f} for 14B",
        f"({minutes[2]:.0f} minutes and {minutes[3] / 60:.0f} hours",
    ):
        assert figure in " ".join(readme.split())


def test_commands_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The two lines in turn, on the tiny pipeline."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```sh\n(.*?)^```", DOCUMENT, re.M | re.S)
    assert block is not None
    calibrate, generate = block[1].splitlines()
    more = f"--model {model} --steps 2 {' '.join(SIZE)} --device cpu -o block_size=64 -o min_tokens=64"
    Path("prompts.txt").write_text("a red circle\n", encoding="utf-8")
    extra = {calibrate: "--prompts prompts.txt --intervals 1 --guidance 1", generate: "-o inner=eager"}
    for line, added in extra.items():
        program, *arguments = shlex.split(f"{line} {more} {added}")
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code in (0, None), capsys.readouterr().err
    assert "attention sites rewritten" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", DOCUMENT) if "://" not in t]
    assert targets and all((calibration_report.DOCUMENT.parent / t).exists() for t in targets)


def test_the_embedded_profile_is_what_the_command_makes() -> None:
    profile = haste_compile.CalibrationProfile.load(NANO_PROFILE)
    expert = profile.experts["transformer"]
    settings = profile.calibration["settings"]
    assert profile.model == "nano-wan" and expert.top_p.shape == (8, 6)
    assert settings["candidates"] == list(NANO_SETTINGS["candidates"])
    assert settings["budget"] == NANO_SETTINGS["budget"]
    assert profile.calibration["units_done"] == profile.calibration["units_planned"]
    assert profile.prompts["count"] == len(NANO_PROMPTS.read_text(encoding="utf-8").splitlines())
    for name in ("height", "width", "frames", "steps", "guidance"):
        assert profile.request[name] == getattr(NANO_REQUEST, name)
    for name in ("block_size", "stride", "dense_steps"):
        assert profile.options[name] == NANO_OPTIONS[name]
    compared = profile.held_out
    assert compared is not None and len(compared["videos"]) == NANO_SETTINGS["held_out"]
    psnr, density = compared["psnr_db"], compared["density"]
    assert psnr["mean"] >= 25 and density < 0.6
    said = f"{psnr['mean']:.1f} dB on average and {psnr['worst']:.1f} dB at worst, at density {density:.1%}"
    assert said in " ".join(DOCUMENT.split())


def test_the_embedded_profile_fits_the_embedded_weights() -> None:
    """If not, nano-wan has new weights: ``haste calibrate --out haste_compile/assets/nano_wan_profile``."""
    pipe = load_pipeline(NANO_WAN, device=torch.device("cpu"), dtype=torch.float32)
    expert = haste_compile.CalibrationProfile.load(NANO_PROFILE).experts["transformer"]
    assert expert.fingerprint.unknown(Fingerprint.of(pipe.transformer.parameters())) == 0


@pytest.mark.parametrize(
    ("given", "profile"),
    [
        ({}, True),
        ({"reuse": "never"}, True),
        ({"top_p": 0.9}, False),
        ({"delta": 2.0}, False),
        ({"block_size": 128}, False),
    ],
)
def test_the_embedded_model_takes_its_profile_unless_told_otherwise(
    given: dict[str, Any], profile: bool
) -> None:
    config = HasteConfig.from_options(complete_options(NANO_WAN, given))
    assert (config.profile is not None) == profile
    assert (config.block_size, config.dense_steps) == (given.get("block_size", 64), 2)
    assert "profile" not in complete_options("some/model", given)


def test_the_study(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows and columns, on the tiny pipeline; and the report that is made of them."""
    monkeypatch.setattr(
        calibration_bench, "_TUNING_ROUNDS", 1
    )  # each is a compilation; four heads meet nothing
    pool = tmp_path / "pool.txt"
    pool.write_text("a red circle moves left\na blue square moves up\n", encoding="utf-8")
    arguments = ["--model", model, "--pool", pool, "--small", "--no-plain", "--device", "cpu", *SIZE]
    arguments += ["--steps", 3, "--prompts", 2, "--candidates", 0.3, 0.6, 0.9, "--shared", 0.6]
    arguments += ["--intervals", 1, "--batch", 2, "--json", tmp_path / "study.json"]
    for option in ("block_size=64", "min_tokens=64", "stride=8", "dense_steps=1", "delta=5"):
        arguments += ["-o", option]
    arguments += ["-o", "cluster_iterations=[3,1]"]
    calibration_study.main(list(map(str, arguments)))
    record = json.loads((tmp_path / "study.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert [name.split(" of ")[0] for name in rows] == [
        name for name in calibration_study.ROWS if "plain" not in name
    ]
    assert not record["failed"] and all(len(row["psnr"]) == 2 for row in rows.values())
    shared, reused = rows["XAttention, shared τ"], rows["+ TMR"]
    assert shared["refresh_rate"] == pytest.approx(2 / 3), "every step but the dense one"
    assert reused["refresh_rate"] <= shared["refresh_rate"]
    assert all(1 / 3 < row["density"] < 1 for row in rows.values())
    assert all(row["seconds"]["sparse"] > 0 for row in rows.values())
    assert -1 <= record["overlap"]["spearman"] <= 1 and record["overlap"]["pairs"] == 2 * 2 * 2 * 2
    assert record["joint"]["measured_seen"] > 0
    text = calibration_report.study(record, "command")
    assert all(f"| {name} |" in text for name in rows)
    assert "Not measured" not in text and "equal time" not in text, "no GPU was busy"
    calibration_report.plot("study", record, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png") if path.stat().st_size > 5_000}
    assert drawn == set(calibration_report.plots("study", record)) and len(drawn) == 2


def test_the_report_of_a_study_cut_short() -> None:
    """The rows that there are, their differences, and what is missing; SVG2 read off at equal time."""

    def row(name: str, psnr: float, busy: float | None) -> dict[str, Any]:
        both = {"sparse": 1.0, "dense": 2.0, "busy_sparse": busy, "busy_dense": 2.0}
        values = {name: [psnr, psnr + 1] for name in ("psnr", "ssim", "latent_error")}
        return {"name": name, "density": 0.5, "refresh_rate": 1.0, "seconds": both, **values}

    record = {
        "setting": {"shared": 0.9, "candidates": [0.9], **dict.fromkeys(_SETTING, 1)},
        "options": {"dense_steps": 2},
        "device": "H100",
        "dtype": "float16",
        "versions": {"torch": "2"},
        "rows": [
            row("XAttention, shared τ", 28.0, None),
            row("+ EBC + TMR", 30.0, 1.0),
            row("SVG2 + EBC + TMR", 34.0, 1.2),
            row("SVG2 + EBC + TMR, 0.8 × density", 30.0, 0.8),
        ],
        "failed": {"SVG2 + TMR": "TimeoutError: not begun"},
        **dict.fromkeys(("overlap", "joint", "forms")),
    }
    text = calibration_report.study(record, "command")
    assert "| + EBC + TMR − XAttention, shared τ | +2.00 | [+2.00, +2.00] | +0.000 |" in text
    assert "| 0.50 | 0.60 |" in text and "| 0.50 | – |" in text
    assert "busy for 0.500 of dense, at 30.50 dB; SVG2 takes 0.400 to 0.600 and comes to 32.50 dB" in text
    assert "* Not measured: SVG2 + TMR (TimeoutError: not begun)" in text
    assert set(calibration_report.plots("study", record)) == {"calibration-study-quality.png"}
    record["rows"][1]["seconds"]["busy_sparse"] = 0.6
    assert "so there is no equal time" in calibration_report.study(record, "command")


_SETTING = ("prompts", "seeds", "frames", "height", "width", "steps", "videos", "probes", "tuning")


def test_the_comparison_of_forms(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_forms, "load", lambda args: _tiny_load(model, args))
    pool = tmp_path / "pool.txt"
    pool.write_text("a red circle moves left\na blue square moves up\n", encoding="utf-8")
    arguments = ["--pool", pool, "--device", "cpu", *SIZE, "--steps", 3, "--intervals", 1]
    arguments += [
        "--branches",
        "conditional",
        "--candidates",
        0.3,
        0.6,
        "--budget",
        "shared:0.6",
        "--probes",
        32,
    ]
    calibration_forms.main([*map(str, arguments), "--json", str(tmp_path / "forms.json")])
    record = json.loads((tmp_path / "forms.json").read_text())
    assert record["heads"] == 4 and record["spearman"] > 0.8
    assert record["blocks_run"]["exact"] == 2 + 2 * 2 * 2 + 2 * 2 * 1, "from the probed layer on"
    assert 0.5 < record["joint_ratio"] < 2
    assert "Spearman" in calibration_report.forms(record, "command")


def _tiny_load(model: Path, args: Any) -> Any:
    args.model = model
    args.option = ["block_size=64", "min_tokens=64", "stride=8"]
    return calibration_bench.load(args)


def test_the_cost_of_a_full_size_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--frames", "17", "--steps", "4", "--block-size", "64", "--blocks", "1"]
    calibration_cost.main([*arguments, "--device", "cpu", "--json", str(tmp_path / "cost.json")])
    record = json.loads((tmp_path / "cost.json").read_text())
    assert record["weights"] == "random" and min(record["seconds"].values()) >= 0
    assert record["estimates"]["exact"]["units"] > record["estimates"]["gradient"]["units"]
    assert "gradient" in capsys.readouterr().out
    assert record["blocks"] == {"model": 2, "timed": 1}
    text = calibration_report.cost(record, "command")
    assert "Estimate" in text and "timed on 1 of 2 blocks" in text
    units = record["estimates"]["gradient"]["units"]
    assert units == 2 * 4 * 2, "of the whole model: two videos, four steps, two branches"
    layers, heads, *_ = calibration_cost.MODELS["14b"]
    assert (layers, heads) == (40, 40)
