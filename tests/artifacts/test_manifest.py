"""What stands beside an artifact, and every way in which loading or calling it is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from artifact_case import OPTIONS, SIZE, denoise, export, inputs

import haste_compile
from haste_compile.artifacts import Manifest, Runner, manifest
from haste_compile.errors import (
    ArtifactFileError,
    ArtifactSizeError,
    ArtifactTrustError,
    ArtifactVersionError,
    DeviceError,
    InputError,
    OptionError,
    OutputPathError,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny.ts"
    export("torchscript", path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    for file in (original, manifest.manifest_path(original)):
        shutil.copy(file, tmp_path)
    return tmp_path / original.name


@pytest.fixture(scope="module")
def runner(original: Path) -> Runner:
    return haste_compile.load(original, trust=True)


def edit(path: Path, *, sign: bool = True, **changes: Any) -> None:
    """Change fields of the manifest, and its digest along with them."""
    file = manifest.manifest_path(path)
    values = {**json.loads(file.read_text()), **changes}
    digest = values.pop("digest")
    file.write_text(json.dumps({**values, "digest": manifest._digest(values) if sign else digest}))


def test_the_manifest_says_what_the_artifact_is(original: Path):
    found = Manifest.read(original)
    assert (found.format, found.device, found.dtype) == ("torchscript", "cpu", "float32")
    assert str(found.size) == "128×128, 17 frames" and found.vae_scales == (4, 8)
    assert found.versions == {"haste_compile": haste_compile.__version__, "torch": torch.__version__}
    assert {name: found.options[name] for name in OPTIONS} == OPTIONS
    assert [str(layout) for layout in found.inputs] == [
        "hidden_states [1, 4, 5, 16, 16] float32",
        "timestep [1] float32",
        "encoder_hidden_states [1, 16, 32] float32",
        "haste_ctl [8] int32",
    ]
    assert [str(layout) for layout in found.state[:3]] == [
        "haste_0_mask [4, 1, 2, 5, 1] int32",
        "haste_0_anchors [4, 1, 2, 2, 64] float32",
        "haste_0_counters [4, 1, 2, 8] int64",
    ]
    assert [str(layout) for layout in found.outputs] == ["sample [1, 4, 5, 16, 16] float32"]
    assert found.sites[0] == {"name": "blocks.0.attn1", "B": 1, "H": 2, "N": 320, "D": 64}
    assert found.skipped["blocks.0.attn2"].startswith("cross-attention")
    assert found.transformer["class"] == "WanTransformer3DModel"
    assert found.files == {
        "tiny.ts": {"bytes": original.stat().st_size, "sha256": manifest.file_digest(original)}
    }


def test_other_thresholds_have_another_hash(original: Path, tmp_path: Path):
    table = [[0.5, 0.6], [0.7, 0.8]]
    found = export("torchscript", tmp_path / "tiny.ts", top_p=table)
    assert found.thresholds != Manifest.read(original).thresholds
    assert Manifest.read(tmp_path / "tiny.ts").config.top_p == ((0.5, 0.6), (0.7, 0.8))


def test_nobody_vouches(path: Path):
    with pytest.raises(ArtifactTrustError, match="trust=True or sha256=") as caught:
        haste_compile.load(path)
    digest = Manifest.read(path).digest
    assert digest in str(caught.value)
    haste_compile.load(path, sha256=digest)
    with pytest.raises(ArtifactTrustError, match=f"found digest {digest}; wanted 00"):
        haste_compile.load(path, sha256="00" + digest[2:], trust=True)


def test_a_truncated_file(path: Path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(ArtifactFileError, match=rf"tiny.ts: found {size // 2} bytes; wanted {size}"):
        haste_compile.load(path, trust=True)


def test_a_changed_byte(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactFileError, match="as its manifest says"):
        haste_compile.load(path, trust=True)


def test_missing_files(path: Path):
    path.unlink()
    with pytest.raises(ArtifactFileError, match="nothing there"):
        haste_compile.load(path, trust=True)
    manifest.manifest_path(path).unlink()
    with pytest.raises(
        ArtifactFileError, match=r"tiny.ts.json: found No such file.*the manifest that export"
    ):
        haste_compile.load(path, trust=True)


def test_an_edited_manifest(path: Path):
    edit(path, sign=False, size={**SIZE, "height": 256, "batch": 1, "text_tokens": 16})
    with pytest.raises(ArtifactFileError, match="those of its own digest"):
        haste_compile.load(path, trust=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_manifest_that_is_none(path: Path, text: str):
    manifest.manifest_path(path).write_text(text)
    with pytest.raises(ArtifactFileError):
        haste_compile.load(path, trust=True)


def test_another_version(path: Path):
    edit(path, versions={"haste_compile": "0.1.0", "torch": "2.4.1"})
    with pytest.raises(ArtifactVersionError, match="made with torch 2.4.1; wanted one made with torch 2"):
        haste_compile.load(path, trust=True)
    edit(path, schema=99)
    with pytest.raises(ArtifactVersionError, match="form 99; wanted form 1"):
        haste_compile.load(path, trust=True)


def test_an_artifact_of_a_format_that_is_not_known_here(path: Path):
    edit(path, format="tarot")
    with pytest.raises(OptionError, match="found 'tarot'; wanted one of"):
        haste_compile.load(path, trust=True)


def test_two_sizes_and_the_wrong_one_fed(runner: Runner, tmp_path: Path):
    wide = {**SIZE, "width": 192}
    export("torchscript", tmp_path / "wide.ts", **wide)
    other = haste_compile.load(tmp_path / "wide.ts", trust=True)
    call = tiny_wan.transformer_inputs(width=192)
    assert other(**call)[0].shape == (1, 4, 5, 16, 24)
    with pytest.raises(ArtifactSizeError) as caught:
        runner(**call)
    assert "a video of 128×192, 17 frames" in caught.value.found
    assert "a video of 128×128, 17 frames" in caught.value.wanted
    with pytest.raises(ArtifactSizeError, match=r"wanted .*128×192, 17 frames"):
        other(**tiny_wan.transformer_inputs())


def test_another_text_length_or_batch(runner: Runner):
    call = tiny_wan.transformer_inputs()
    with pytest.raises(ArtifactSizeError, match=r"encoder_hidden_states \[1, 7, 32\].*wanted.*\[1, 16, 32\]"):
        runner(**{**call, "encoder_hidden_states": call["encoder_hidden_states"][:, :7]})
    with pytest.raises(ArtifactSizeError, match=r"hidden_states \[2, 4, 5, 16, 16\]"):
        runner(**tiny_wan.transformer_inputs(batch=2))


def test_calls_that_no_export_could_serve(runner: Runner):
    call = tiny_wan.transformer_inputs()
    with pytest.raises(InputError, match="found torch.float64; wanted torch.float32"):
        runner(**{**call, "hidden_states": call["hidden_states"].double()})
    with pytest.raises(InputError, match="encoder_hidden_states_image"):
        runner(**call, encoder_hidden_states_image=torch.zeros(1, 257, 32))
    with pytest.raises(InputError, match="attention_kwargs"):
        runner(**call, attention_kwargs={"scale": 0.5})
    with pytest.raises(DeviceError, match="a move to meta"):
        runner.to("meta")


def test_integer_timesteps_name_the_same_step(original: Path):
    one, other = (haste_compile.load(original, trust=True) for _ in range(2))
    call = tiny_wan.transformer_inputs()
    integer = {**call, "timestep": call["timestep"].long()}
    assert torch.equal(one(**call)[0], other(**integer)[0])


def test_a_call_returns_what_the_transformer_returns(runner: Runner):
    call = tiny_wan.transformer_inputs()
    output = runner(**{**call, "return_dict": True})
    assert output.sample.shape == call["hidden_states"].shape
    with runner.cache_context("cond", step_index=3):
        assert runner(**call)[0].shape == call["hidden_states"].shape
    assert runner.config.patch_size == [1, 2, 2] and runner.config.in_channels == 4


def test_reset_forgets_and_records_are_kept(original: Path, tmp_path: Path):
    export("torchscript", tmp_path / "recorded.ts", stats=True)
    runner = haste_compile.load(tmp_path / "recorded.ts", trust=True)
    first = denoise(runner, inputs(steps=3))
    assert [step.step for step in runner.statistics().steps] == [0, 0, 1, 1, 2, 2]
    runner.reset()
    assert runner.statistics().calls == 0
    assert torch.equal(denoise(runner, inputs(steps=3)), first)


def test_bad_requests_are_refused_before_anything_is_traced(tmp_path: Path):
    with pytest.raises(OptionError, match="wanted one of 'aoti'"):
        export("flash", tmp_path / "x")
    with pytest.raises(OptionError, match="option height"):
        export("torchscript", tmp_path / "x", height=0)
    with pytest.raises(OptionError, match="top_q"):
        export("torchscript", tmp_path / "x", top_q=0.5)
    pair = tiny_wan.build_pipeline(experts=2)
    with pytest.raises(OptionError, match="wanted one of 'transformer', 'transformer_2'"):
        export("torchscript", tmp_path / "x", pair)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="wanted a folder"):
        export("torchscript", tmp_path / "file" / "x.ts")


def test_one_of_two_experts(tmp_path: Path):
    pair = tiny_wan.build_pipeline(experts=2)
    export("torchscript", tmp_path / "low.ts", pair, component="transformer_2")
    call = tiny_wan.transformer_inputs()
    found = haste_compile.load(tmp_path / "low.ts", trust=True)(**call)[0]
    expected = pair.transformer_2(**call)[0]
    assert torch.allclose(found, expected, atol=0.2)  # sparse against dense: near, and not the other expert
    assert (found - expected).norm() < (found - pair.transformer(**call)[0]).norm()


def test_the_manifest_survives_its_file(original: Path):
    found = Manifest.read(original)
    assert Manifest._from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found
