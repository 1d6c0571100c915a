"""A profile at work: each transformer gets its table, other weights are refused, the rest is warned of."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from graph_capture import export
from tiny_calibration import REQUEST, Finished

from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.calibration.use import mismatches, warming_up
from haste_compile.config import HasteConfig, parse_options
from haste_compile.errors import OptionError, ProfileError
from haste_compile.generation import generate
from haste_compile.passes import BufferBinding, PassContext, run_passes
from haste_compile.pipeline import optimize
from haste_compile.state import states_of


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def tables(module: torch.nn.Module, field: str) -> list[list[float]]:
    (state,) = states_of(module)
    return [state.tensor(i, field).tolist() for i in range(len(state.specs))]


@pytest.mark.parametrize("compile", ["whole", "blocks"])
def test_each_expert_takes_its_own_table(finished: Finished, compile: Any) -> None:
    pipe, experts = finished.pipe, finished.profile.experts
    changed = finished.profile.with_experts(
        {
            "transformer": experts["transformer"].chosen(experts["transformer"].choice * 0),
            "transformer_2": experts["transformer_2"].chosen(experts["transformer_2"].choice * 0 + 2),
        }
    )
    folder = finished.folder.parent / f"changed-{compile}"
    changed.save(folder)
    with optimize(pipe, profile=str(folder), inner="eager", compile=compile) as handle:
        generate(pipe, REQUEST, lambda _step: None, decode=False)
        for name, module in handle.transformers.items():
            states = [state for state in states_of(module) if state.config == handle.config]
            assert sum(len(state.specs) for state in states) == tiny_wan.LAYERS
            rows = [
                (state.tensor(i, "top_p"), state.tensor(i, "delta"))
                for state in states
                for i in range(len(state.specs))
            ]
            expert = changed.experts[name]
            torch.testing.assert_close(
                torch.stack([top_p for top_p, _ in rows]), torch.tensor(expert.top_p).float()
            )
            torch.testing.assert_close(
                torch.stack([delta for _, delta in rows]), torch.tensor(expert.delta).float()
            )
        found = handle.statistics()
        assert found["transformer"].density < found["transformer_2"].density


def test_another_profile_in_the_same_folder_is_another_profile(finished: Finished, tmp_path: Path) -> None:
    """State keeps its thresholds for life: what is saved over a profile must not meet the old ones."""
    transformer = tiny_wan.build_transformer(2)
    expert = finished.profile.experts["transformer_2"]
    torch._dynamo.reset()
    for pick in (0, 2):
        changed = finished.profile.with_experts({"transformer_2": expert.chosen(expert.choice * 0 + pick)})
        changed.save(tmp_path)
        with optimize(transformer, profile=str(tmp_path), inner="eager") as handle, torch.no_grad():
            transformer(**tiny_wan.transformer_inputs())
            (state,) = [state for state in states_of(transformer) if state.config == handle.config]
            wanted = torch.tensor(changed.experts["transformer_2"].top_p).float()
            torch.testing.assert_close(torch.stack([state.tensor(i, "top_p") for i in range(2)]), wanted)


def test_a_profile_that_changed_since_is_refused(finished: Finished, tmp_path: Path) -> None:
    transformer = tiny_wan.build_transformer(2)
    expert = finished.profile.experts["transformer_2"]
    finished.profile.save(tmp_path)
    torch._dynamo.reset()
    with optimize(transformer, profile=str(tmp_path), inner="eager") as handle, torch.no_grad():
        finished.profile.with_experts({"transformer_2": expert.chosen(expert.choice * 0)}).save(tmp_path)
        with pytest.raises(ProfileError, match="of the profile that was asked for"):
            transformer(**tiny_wan.transformer_inputs())
    checksum = handle.config.profile_checksum
    with pytest.raises(OptionError, match="option profile with it"):
        HasteConfig.from_options({"profile_checksum": checksum})
    with pytest.raises(ProfileError, match=f"wanted {checksum}"):
        HasteConfig.from_options({"profile": str(tmp_path), "profile_checksum": checksum})


def test_a_bare_compile_finds_its_table(finished: Finished) -> None:
    transformer = tiny_wan.build_transformer(2)  # the second expert's weights, another instance
    options = {"profile": str(finished.folder), "inner": "eager"}
    compiled = torch.compile(transformer, backend="haste", options=options, dynamic=False)
    with torch.no_grad():
        compiled(**tiny_wan.transformer_inputs())
    wanted = finished.profile.experts["transformer_2"].top_p
    assert tables(transformer, "top_p") == torch.tensor(wanted).float().tolist()


def test_other_weights_are_refused(finished: Finished) -> None:
    other = tiny_wan.build_transformer(5)
    with pytest.raises(ProfileError, match="parameters with other values"):
        optimize(other, profile=str(finished.folder))
    compiled = torch.compile(
        other, backend="haste", options={"profile": str(finished.folder), "inner": "eager"}, dynamic=False
    )
    with torch.no_grad(), pytest.raises(ProfileError, match="Calibrate for these weights"):
        compiled(**tiny_wan.transformer_inputs())


def test_one_changed_parameter_is_refused(finished: Finished) -> None:
    transformer = tiny_wan.build_transformer(0)
    optimize(transformer, profile=str(finished.folder)).restore()
    transformer.blocks[1].attn1.to_q.weight.data *= 1.05
    with pytest.raises(ProfileError, match="found 1 of"):
        optimize(transformer, profile=str(finished.folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_fingerprint_is_stable_under_dtype(dtype: torch.dtype) -> None:
    parameters = list(tiny_wan.build_transformer(0).parameters())
    known = Fingerprint.of(parameters)
    assert known.unknown(Fingerprint.of([p.to(dtype) for p in parameters])) == 0
    assert known.unknown(Fingerprint.of([p.to(dtype).to(torch.bfloat16) for p in parameters])) == 0
    assert Fingerprint.of([p.to(dtype) for p in parameters]).unknown(known) == 0
    assert known.unknown(Fingerprint.of(tiny_wan.build_transformer(1).parameters())) > len(parameters) / 3


def test_another_dtype_is_the_same_model(finished: Finished) -> None:
    optimize(tiny_wan.build_transformer(0).to(torch.bfloat16), profile=str(finished.folder)).restore()


def test_another_size_and_other_steps_are_warned_of(
    finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = finished.pipe
    with optimize(pipe, profile=str(finished.folder), inner="eager"), caplog.at_level(logging.WARNING):
        generate(pipe, REQUEST, lambda _step: None, decode=False)
        assert "calibrated" not in caplog.text
        other = dataclasses.replace(REQUEST, width=192, steps=4)
        generate(pipe, other, lambda _step: None, decode=False)
    assert "calibrated with 320 tokens" in caplog.text and "this video has 480" in caplog.text
    assert "calibrated for 5 steps, this video has 4" in caplog.text
    assert mismatches(finished.folder, other) == ["width 192 instead of 128", "steps 4 instead of 5"]


def test_another_scheduler_is_warned_of(finished: Finished, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import UniPCMultistepScheduler

    pipe, before = finished.pipe, finished.pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(before.config, flow_shift=8.0)
    try:
        optimize(pipe, profile=str(finished.folder)).restore()
    finally:
        pipe.scheduler = before
    assert "shift 3.0" in caplog.text and "shift 8.0" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_p": 0.9}, "top_p beside profile"),
        ({"delta": 3.0}, "delta beside profile"),
        ({"block_size": 128}, "under which the profile was calibrated"),
        ({"stride": 16}, "under which the profile was calibrated"),
        ({"token_order": "tile3d"}, "under which the profile was calibrated"),
        ({"clusters": (8, 8)}, "under which the profile was calibrated"),
    ],
)
def test_contradictions_are_refused(finished: Finished, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        HasteConfig.from_options({"profile": str(finished.folder), **options})


def test_a_profile_brings_its_options_and_the_rest_stays_free(finished: Finished) -> None:
    config = HasteConfig.from_options({"profile": str(finished.folder), "reuse": "never", "block_size": 64})
    assert (config.block_size, config.stride, config.dense_steps, config.reuse) == (64, 8, 1, "never")
    assert HasteConfig.from_options(config.to_options()) == config
    assert parse_options([f"profile={finished.folder}"]) == {"profile": str(finished.folder)}


def test_no_profile_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such file"):
        HasteConfig.from_options({"profile": str(tmp_path)})
    with pytest.raises(OptionError, match="folder of a profile"):
        HasteConfig.from_options({"profile": 3})


def test_a_profile_that_is_replaced_is_read_again(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    before = HasteConfig.from_options({"profile": str(folder)})
    (folder / "profile.json").write_text("{}")
    with pytest.raises(ProfileError):
        HasteConfig.from_options({"profile": str(folder)})
    finished.profile.save(folder)
    assert HasteConfig.from_options({"profile": str(folder)}) == before


def test_other_sites_are_refused(finished: Finished) -> None:
    transformer = tiny_wan.build_transformer(0)
    options = {"profile": str(finished.folder), "inner": "eager", "dense_layers": [0]}
    compiled = torch.compile(transformer, backend="haste", options=options, dynamic=False)
    with torch.no_grad(), pytest.raises(ProfileError, match="2 sites of 2 heads"):
        compiled(**tiny_wan.transformer_inputs())


def test_an_exported_graph_gets_the_table_too(finished: Finished) -> None:
    gm = export(tiny_wan.build_transformer(0), **tiny_wan.transformer_inputs())
    run_passes(
        gm,
        PassContext(HasteConfig.from_options({"profile": str(finished.folder)}), "export", BufferBinding()),
    )
    wanted = torch.tensor(finished.profile.experts["transformer"].top_p).float()
    torch.testing.assert_close(torch.stack([gm.haste_0_top_p, gm.haste_1_top_p]), wanted)


def test_a_warm_up_is_no_video(finished: Finished, caplog: pytest.LogCaptureFixture) -> None:
    """Four steps that only compile are not warned of, as the demo runs them."""
    with optimize(finished.pipe, profile=str(finished.folder), inner="eager"), warming_up():
        generate(
            finished.pipe, dataclasses.replace(REQUEST, frames=21, steps=4), lambda _s: None, decode=False
        )
    assert "calibrated with 320 tokens" in caplog.text and "calibrated for 5 steps" not in caplog.text


@pytest.mark.parametrize("named", [{}, {"predictor": "svg2"}])
def test_a_profile_of_another_predictor_brings_its_defaults(
    monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]
) -> None:
    """Blocks are compiled with the options that the first config gives; both have to be one config."""
    brought = {"predictor": "svg2", "profile": "folder", "profile_checksum": "0" * 64}
    monkeypatch.setattr("haste_compile.calibration.use.options_of", lambda given: brought)
    config = HasteConfig.from_options({"profile": "folder", **named})
    assert config.predictor == "svg2" and HasteConfig.from_options(config.to_options()) == config
