"""``calibrate`` and ``haste calibrate`` from end to end, on every kind of Wan pipeline."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from PIL import Image
from tiny_calibration import OPTIONS, PROMPTS, REQUEST, SMALL, Finished

import haste_compile
from haste_compile import _torch, cli
from haste_compile.calibration.cost import Seconds, estimate
from haste_compile.calibration.gradient import _probe_scale
from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.plan import interval_bounds, make_plan, served_steps
from haste_compile.calibration.run import make_settings
from haste_compile.calibration.settings import Settings
from haste_compile.calibration.states import record_video
from haste_compile.config import HasteConfig
from haste_compile.errors import BudgetError, HasteError, OptionError, OutputPathError, ProfileError
from haste_compile.generation import generate


@pytest.fixture
def pipe() -> Any:
    return tiny_wan.build_pipeline()


def calibrate(pipe: Any, **changes: Any) -> haste_compile.CalibrationProfile:
    settings = {"request": REQUEST, "options": OPTIONS, **SMALL, **changes}
    return haste_compile.calibrate(pipe, PROMPTS, **settings)


def test_the_budget_is_met_at_less_error_than_a_shared_threshold(finished: Finished) -> None:
    for expert in finished.profile.experts.values():
        shared = expert.chosen(np.full(expert.top_p.shape, 1))
        assert expert.density.mean() <= shared.density.mean() + 1e-9
        assert expert.error.sum() <= shared.error.sum()
        assert expert.joint_error is not None and expert.joint_error > 0


def test_delta_was_chosen_from_staleness(finished: Finished) -> None:
    deltas = np.concatenate([e.delta.ravel() for e in finished.profile.experts.values()])
    assert ((deltas == 0) | (deltas == 1e30) | ((deltas > 0) & (deltas < 1e4))).all()
    assert len(set(deltas.tolist())) > 1


def test_held_out_figures_are_those_of_the_profile_in_use(finished: Finished) -> None:
    found = finished.profile.held_out
    assert found is not None and len(found["videos"]) == 1
    assert 20 < found["psnr_db"]["mean"] < 100 and 0.2 < found["density"] < 1


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    before = generate(pipe, dataclasses.replace(REQUEST, prompt=PROMPTS[0]), lambda _s: None, decode=False)
    calibrate(pipe, intervals=1)
    after = generate(pipe, dataclasses.replace(REQUEST, prompt=PROMPTS[0]), lambda _s: None, decode=False)
    assert (before.video == after.video).all()
    assert not any(_torch.is_compiled(module) for module in pipe.transformer.modules())
    assert not torch.are_deterministic_algorithms_enabled()


def test_image_to_video(tmp_path: Path) -> None:
    path = tmp_path / "first.png"
    Image.new("RGB", (128, 128), (200, 30, 30)).save(path)
    profile = calibrate(
        tiny_wan.build_image_pipeline(), request=dataclasses.replace(REQUEST, image=path), intervals=1
    )
    expert = profile.experts["transformer"]
    assert profile.pipeline == "WanImageToVideoPipeline"
    assert expert.sites == ("blocks.0.attn1", "blocks.1.attn1") and (expert.errors > 0).any()


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.5), (torch.float16, 0.05)])
def test_half_precision_weights(pipe: Any, dtype: torch.dtype, near: float) -> None:
    """Errors are summed in float32: those of narrower weights are near those of float32."""
    exact = calibrate(pipe, intervals=1, probes=16).experts["transformer"]
    half = tiny_wan.build_pipeline()
    half.transformer.to(dtype)
    found = calibrate(half, intervals=1, probes=16).experts["transformer"]
    np.testing.assert_allclose(found.errors.sum((0, 1)), exact.errors.sum((0, 1)), rtol=near)
    assert found.fingerprint.unknown(exact.fingerprint) == 0


def test_probes_are_scaled_against_underflow(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two, taken out again: float32 gives the same bits, float16 would lose its gradients."""
    scales = []

    def scale(dense: torch.Tensor) -> float:
        scales.append(_probe_scale(dense) / float(dense.norm()))
        return 1.0

    scaled = calibrate(pipe, intervals=1).experts["transformer"]
    monkeypatch.setattr("haste_compile.calibration.gradient._probe_scale", scale)
    np.testing.assert_array_equal(calibrate(pipe, intervals=1).experts["transformer"].errors, scaled.errors)
    assert scales and all(0.7 < s < 1.5 for s in scales)


def test_dense_layers_get_no_row(pipe: Any) -> None:
    profile = calibrate(pipe, intervals=1, options={**OPTIONS, "dense_layers": [0]})
    expert = profile.experts["transformer"]
    assert expert.sites == ("blocks.1.attn1",) and expert.top_p.shape == (1, 2)


def test_out_of_time_and_on_again(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="goes on where it stopped"):
        calibrate(pipe, out=tmp_path, budget_minutes=0)
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    whole = calibrate(pipe, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json", "tables.safetensors"]
    assert whole.calibration["units_done"] == whole.calibration["units_planned"] == 4


def test_a_partial_profile_says_so(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time runs out after the first unit: its figures stand, and the journal stays."""
    from haste_compile.calibration import run

    ticks = iter([0.0, *[0.0, 1.0], *[59.5] * 100])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(ticks))
    profile = calibrate(pipe, out=tmp_path, budget_minutes=1)
    assert profile.calibration["units_done"] == 1 and profile.calibration["units_planned"] == 4
    assert (tmp_path / "journal").is_dir() and profile.experts["transformer"].states == 1
    assert haste_compile.CalibrationProfile.load(tmp_path).calibration["units_done"] == 1


def test_another_calibration_does_not_go_on_in_the_folder(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ProfileError):
        calibrate(pipe, out=tmp_path, budget_minutes=0)
    with pytest.raises(ProfileError, match="other settings"):
        calibrate(pipe, out=tmp_path, seed=1)


def test_progress_is_told(pipe: Any) -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(pipe, progress=lambda *what: told.append(what))
    assert told[0] == ("dense video 1 of 1", 1, 5)
    assert told[-1] == ("measuring", 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"method": "guess"}, OptionError, "'gradient', 'exact'"),
        ({"candidates": ()}, OptionError, "candidates"),
        ({"candidates": (0.0, 0.5)}, OptionError, "candidates"),
        ({"budget": "half"}, OptionError, "budget"),
        ({"probes": 0}, OptionError, "probes"),
        ({"intervals": 0}, OptionError, "intervals"),
        ({"intervals": ((3, 2),)}, OptionError, "intervals"),
        ({"ages": (2, 1)}, OptionError, "ages"),
        ({"speed": 1}, OptionError, "'speed'"),
        ({"held_out": 3}, OptionError, "held out"),
        ({"method": "exact", "allocator": "quadratic"}, OptionError, "gradient"),
        ({"options": {**OPTIONS, "profile": "x"}}, OptionError, "a profile is what comes out"),
        ({"options": {**OPTIONS, "top": 1}}, OptionError, "Did you mean"),
        ({"options": {**OPTIONS, "token_order": "tile3d"}}, OptionError, "'raster': blocks are measured"),
        ({"options": {**OPTIONS, "dense_steps": 5}}, OptionError, "dense warm-up"),
        ({"out": "/proc/nothing"}, OutputPathError, "/proc/nothing"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    pipe: Any, changes: dict[str, Any], error: type[HasteError], says: str
) -> None:
    with pytest.raises(error, match=says):
        calibrate(pipe, progress=lambda *_: pytest.fail("nothing may run"), **changes)


def test_an_infeasible_budget_names_the_range(pipe: Any) -> None:
    with pytest.raises(BudgetError, match=r"between .*\(density"):
        calibrate(pipe, intervals=1, budget="density:0.01")


def test_draws() -> None:
    pipe = tiny_wan.build_pipeline()
    config = HasteConfig.from_options({**OPTIONS, "dense_steps": 0})
    request = dataclasses.replace(REQUEST, steps=50)
    assert interval_bounds(Settings(), 50) == ((0, 11), (12, 24), (25, 36), (37, 49))
    prompts = [f"prompt {i}" for i in range(12)]
    plan = make_plan(pipe, prompts, request, config, make_settings(method="exact", held_out=2))
    assert len(plan.videos) == 10 and len({video.prompt for video in plan.videos}) == 10
    assert not {video.prompt for video in plan.videos} & {video.prompt for video in plan.held_out}
    for video in plan.videos:
        bounds = interval_bounds(Settings(), 50)
        assert all(a <= step <= b for step, (a, b) in zip(video.steps["transformer"], bounds, strict=True))
    assert len({video.steps["transformer"] for video in plan.videos}) > 5
    assert make_plan(pipe, prompts, request, config, plan.settings) == plan
    other = make_plan(pipe, prompts, request, config, dataclasses.replace(plan.settings, seed=1))
    assert other.videos != plan.videos
    alone = make_plan(pipe, prompts, request, config, dataclasses.replace(plan.settings, held_out=0))
    assert alone.videos == plan.videos and not alone.held_out
    units = plan.units()
    assert len(units) == len(set(units))
    assigned = plan.experts["transformer"].assigned
    heads = sum(assigned[unit.layer].count(unit.video) for unit in units if unit.layer is not None)
    assert heads * len(plan.settings.measured) == 12 * 2 * tiny_wan.LAYERS * tiny_wan.HEADS, (
        "12·L·H sparse forwards, for each branch"
    )


def test_each_expert_is_measured_where_it_serves() -> None:
    pipe = tiny_wan.build_pipeline(experts=2)
    served = served_steps(pipe, REQUEST)
    assert served["transformer"] + served["transformer_2"] == tuple(range(5))
    with pytest.raises(OptionError, match="transformer_2"):
        served_steps(pipe, dataclasses.replace(REQUEST, steps=1))


def test_a_dense_video_ends_with_its_last_state() -> None:
    pipe = tiny_wan.build_pipeline()
    config = HasteConfig.from_options(OPTIONS)
    plan = make_plan(pipe, PROMPTS, REQUEST, config, make_settings(**SMALL))
    (video,) = plan.videos
    video = dataclasses.replace(video, steps={"transformer": (1, 2)})
    plan = dataclasses.replace(plan, videos=(video,))
    seen: list[int] = []
    with Interception(pipe.transformer, config) as interception:
        kept = record_video(pipe, {"transformer": interception}, plan, 0, seen.append)
    assert seen == [0, 1, 2] and REQUEST.steps > 3
    assert {int(name.split(".")[2]) for name in kept if ".input." in name} == {1, 2}


def test_cost_counts_what_is_done() -> None:
    pipe = tiny_wan.build_pipeline()
    config = HasteConfig.from_options(OPTIONS)
    seconds = {"transformer": Seconds(forward=1.0, again=2.0, backward=3.0, sparse=0.5)}
    plan = make_plan(pipe, PROMPTS, REQUEST, config, make_settings(**SMALL, held_out=1))
    cost = estimate(plan, seconds)
    assert cost.dense == plan.videos[0].needed_steps * 2 and cost.held_out == 2 * 5 * 2
    assert cost.units == 4 and cost.measuring == 4 * (1 + 2 + 4 * 3 + 3 * 0.5)
    plan = make_plan(pipe, PROMPTS, REQUEST, config, make_settings(**SMALL, method="exact"))
    cost = estimate(plan, seconds)
    # Two heads of three candidates at each of 4 states: layer 0 from the start, layer 1 half of it.
    assert cost.measured_forwards == 4 * (6 + 3 + 1) and cost.full_forwards == 4 * (6 + 6 + 1)
    assert cost.measuring == 4 * (9 + 1 + 3 * 0.5)


@pytest.fixture
def haste(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run ``haste calibrate`` on the tiny pipeline: (exit code, stdout, stderr)."""
    model = tiny_wan.save_pipeline(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("# the pool\n" + "\n\n".join(PROMPTS) + "\n")
    given = ["--model", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    given += ["--steps", 4, "--guidance", 1, "--height", 128, "--width", 128, "--frames", 17]
    given += ["--device", "cpu", "-o", "block_size=64", "-o", "min_tokens=64"]
    given += ["--candidates", "0.5,0.9", "--budget", "shared:0.5"]

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["haste", "calibrate", *map(str, given), *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def test_command(haste, tmp_path: Path) -> None:
    code, out, _ = haste("--dry-run", "--intervals", "1")
    assert code == 0 and "in all" in out and "2 units: 4 forwards, 6 backward passes" in out
    assert not (tmp_path / "out").exists()
    code, out, err = haste("--json", "--intervals", "1")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["cost"]["units"] == 2
    assert facts["profile"]["experts"]["transformer"]["sites"] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert facts["profile"]["model"] == "model"
    found = haste_compile.CalibrationProfile.load(tmp_path / "out")
    assert found.to_dict() == facts["profile"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--candidates", "0.5;0.9"], "numbers with commas"),
        (["--budget", "fast"], "option budget"),
        (["--prompts", "/no/such/file"], "no file /no/such/file"),
        (["-o", "top_p=0"], "(0, 1]"),
    ],
)
def test_command_refuses(haste, arguments: list[str], says: str) -> None:
    code, out, err = haste(*arguments)
    assert code == 2 and out == "" and says in err
