"""The demo, end to end on the tiny random pipeline: four files, honest figures, checks that can fail."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from chromium import assert_clean, chromium, clip_times, open_page, wait_for, wait_for_seek

from haste_compile import cli, demo
from haste_compile.evaluation.metrics import psnr_db
from haste_compile.evaluation.video import read_mp4
from haste_compile.generation import NANO_OPTIONS, NANO_REQUEST, Request, default_request
from haste_compile.loading import NANO_PROFILE, NANO_WAN, shown_path

STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One run of the command: its exit code and its folder."""
    return run_demo(tmp_path_factory.mktemp("demo"), "-o", "top_p=0.4", "-o", "delta=1000")


def run_demo(folder: Path, *options: str) -> tuple[int, Path]:
    model = tiny_wan.save_pipeline(folder / "model")
    torch._dynamo.reset()
    arguments = ["demo", "--model", model, "--out", folder / "out", "--steps", STEPS, "--seed", 7]
    arguments += ["--prompt", "a red circle moves left", "--height", 128, "--width", 128, "--frames", 17]
    arguments += ["-o", "block_size=64", "-o", "min_tokens=64", *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["haste", *map(str, arguments)])
        cli.main()
    return int(exit_.value.code or 0), folder / "out"


@pytest.fixture(scope="module")
def summary(finished: tuple[int, Path]) -> dict[str, Any]:
    return json.loads((finished[1] / "summary.json").read_text())


def test_writes_four_files_and_leaves_nothing_else(finished: tuple[int, Path]) -> None:
    code, out = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.html",
        "dense.mp4",
        "haste.mp4",
        "summary.json",
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["model", "out"]
    assert code == 0


def test_the_other_host_makes_a_demo_too(tmp_path: Path) -> None:
    code, out = run_demo(tmp_path, "--predictor", "svg2", "-o", "top_p=0.3", "-o", "delta=1000")
    found = json.loads((out / "summary.json").read_text())
    assert found["options"]["predictor"] == "svg2" and found["options"]["delta"] == 1000
    assert found["sites_rewritten"] == tiny_wan.LAYERS and found["graph_breaks"] == 0
    assert found["recompiles_after_first_step"] == 0
    assert 0.1 < found["density"] < 0.6
    assert found["refresh_rate"] == pytest.approx(1 / STEPS)
    assert code == (0 if all(found["checks"].values()) else 1)


def test_summary_says_what_was_asked(summary: dict[str, Any]) -> None:
    assert summary["prompt"] == "a red circle moves left"
    assert (summary["seed"], summary["steps"]) == (7, STEPS)
    assert summary["size"] == {"frames": 17, "height": 128, "width": 128}
    assert summary["options"]["top_p"] == 0.4
    assert summary["versions"]["torch"] == torch.__version__
    assert "CPU" in summary["device"] or torch.cuda.is_available()


def test_summary_counts_the_sites(summary: dict[str, Any]) -> None:
    assert summary["tokens"] == tiny_wan.TOKENS
    assert summary["sites_rewritten"] == tiny_wan.LAYERS
    assert [site["name"] for site in summary["sites_skipped"]] == ["blocks.0.attn2", "blocks.1.attn2"]
    assert all("cross-attention" in site["reason"] for site in summary["sites_skipped"])


def test_summary_counts_the_work(summary: dict[str, Any]) -> None:
    table = summary["density_by_head"]
    assert len(table) == tiny_wan.LAYERS and all(len(row) == tiny_wan.HEADS for row in table)
    assert summary["density"] == pytest.approx(sum(map(sum, table)) / (tiny_wan.LAYERS * tiny_wan.HEADS))
    assert 0.2 <= summary["density"] < 0.6
    # A huge δ: every mask is built in the first step and never again.
    assert summary["refresh_rate"] == pytest.approx(1 / STEPS)
    assert summary["refreshes_by_step"] == [1.0, 0.0, 0.0]


def test_summary_counts_compilation(summary: dict[str, Any]) -> None:
    assert summary["graphs"] >= 1
    assert summary["graph_breaks"] == 0
    assert summary["recompiles_after_first_step"] == 0


def test_summary_times_every_step(summary: dict[str, Any]) -> None:
    for run in ("dense", "haste"):
        steps = summary[f"{run}_step_seconds"]
        assert len(steps) == STEPS and min(steps) > 0
        assert summary[f"{run}_seconds"] == pytest.approx(sum(steps))


def test_summary_compares_the_files(finished: tuple[int, Path], summary: dict[str, Any]) -> None:
    """The decoded MP4 files differ by as much as the frames did, and by what H.264 loses."""
    dense, haste = (read_mp4(finished[1] / f"{name}.mp4") / 255.0 for name in ("dense", "haste"))
    assert dense.shape == haste.shape == (17, 128, 128, 3)
    assert summary["psnr_db"] is not None and math.isfinite(summary["psnr_db"])
    assert 30 < psnr_db(haste, dense) < summary["psnr_db"] + 3
    assert 0 < summary["ssim"] < 1


def test_page_shows_the_summary(finished: tuple[int, Path], summary: dict[str, Any]) -> None:
    page = (finished[1] / "compare.html").read_text()
    assert "a red circle moves left" in page
    assert page.count("data:video/mp4;base64,") == 3
    for text in (f"{summary['psnr_db']:.1f} dB", f"{summary['density']:.1%}", "blocks.1.attn1"):
        assert text in page


def test_page_plays_in_a_browser(finished: tuple[int, Path]) -> None:
    with chromium() as session:
        open_page(session, finished[1] / "compare.html")
        session.find_element("id", "play").click()
        wait_for(lambda: min(clip_times(session)) > 0.3, "all clips to play for 0.3 s")
        session.find_element("id", "play").click()
        session.execute_script("slider.value = 11; slider.dispatchEvent(new Event('input'))")
        wait_for_seek(session)
        assert [int(t * 16) for t in clip_times(session)] == [11, 11, 11]
        assert_clean(session)


def test_checks_can_fail(summary: dict[str, Any]) -> None:
    assert all(summary["checks"].values())
    self_site = {"name": "blocks.0.attn1", "kind": "self", "reason": "head dim 32"}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"sites_skipped": [self_site]}, "every self-attention site is rewritten"),
        ({"sites_rewritten": 0}, "every self-attention site is rewritten"),
        ({"graph_breaks": 1}, "no graph breaks"),
        ({"recompiles_after_first_step": 1}, "no recompiles after the first step"),
        ({"density": 0.6}, "density below 0.6"),
        ({"psnr_db": 24.9}, "PSNR of at least 25 dB"),
    ]
    for change, failing in changes:
        found = demo.checks({**summary, **change})
        assert [name for name, passed in found.items() if not passed] == [failing]
    assert all(demo.checks({**summary, "psnr_db": None}).values())  # equal bit for bit


def test_failed_check_exits_with_1(monkeypatch: pytest.MonkeyPatch, summary: dict[str, Any], capsys) -> None:
    failed = {**summary, "checks": {"density below 0.6": False}}
    monkeypatch.setattr(demo, "run_demo", lambda *_args, **_keywords: failed)
    monkeypatch.setattr(sys, "argv", ["haste", "demo"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "failed  density below 0.6" in capsys.readouterr().out


def test_failure_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is gone after the output folder was found writable."""
    monkeypatch.setattr(demo, "generate", lambda *_: pytest.fail("must not be reached"))
    from haste_compile.errors import ModelPathError

    with pytest.raises(ModelPathError):
        demo.run_demo(
            tmp_path / "absent",
            Request("x"),
            {},
            out=tmp_path / "deep" / "out",
            device=torch.device("cpu"),
            progress=lambda *_: None,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_record_names_the_embedded_model_by_its_place_in_the_package(tmp_path: Path) -> None:
    assert shown_path(NANO_WAN) == "haste_compile/assets/nano_wan"
    assert shown_path(str(NANO_PROFILE)) == "haste_compile/assets/nano_wan_profile"
    assert shown_path(tmp_path / "model") == str(tmp_path / "model")
    assert shown_path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_defaults_suit_the_model() -> None:
    assert default_request(NANO_WAN) is NANO_REQUEST
    assert NANO_OPTIONS["block_size"] == 64
    wan = default_request("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert (wan.height, wan.width, wan.frames, wan.steps) == (480, 832, 81, 50)
