"""docs/export.md: every command is run here or stands in a list that says which test runs it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch

import haste_compile
from haste_compile import cli, errors
from haste_compile.artifacts import FORMATS, load
from haste_compile.loading import NANO_PROFILE

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")

#: What changes in the code for the tiny pipeline on the CPU. TorchScript needs no compiler; tests/artifacts
#: has AOTInductor's turn.
SMALL_TEXT = {
    '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "MODEL",
    "torch.bfloat16": "torch.float32",
    '"cuda"': '"cpu"',
    'format="aoti"': 'format="torchscript"',
    "height=480, width=832, num_frames=81": "height=128, width=128, num_frames=17",
    "top_p=0.9": "top_p=0.9, block_size=64, min_tokens=64",
}
SMALL = "--height 128 --width 128 --frames 17 -o block_size=64 -o min_tokens=64"
SMALL_ARGUMENTS = {
    "export": f"--format torchscript {SMALL}",
    "generate": f"--model MODEL --steps 1 -o inner=eager {SMALL}",
}
RUN_ELSEWHERE = {
    "cmake": "tests/artifacts/test_aoti.py builds examples/cpp_runner",
    "build/cpp_runner/denoise": "tests/artifacts/test_aoti.py runs it",
    "python": "tests/test_benchmark_artifacts.py runs both benchmarks",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.M | re.S)


def _commands() -> list[str]:
    return [line for block in _blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_python_block_runs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (code,) = _blocks("python")
    for old, new in SMALL_TEXT.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MODEL": str(model)}
    exec(code, names)
    assert names["video"].shape == (17, 128, 128, 3)
    digest, density = capsys.readouterr().out.split()
    assert digest == names["manifest"].digest and 0 < float(density) <= 1


@pytest.mark.parametrize("command", [c for c in _commands() if c.split()[0] not in RUN_ELSEWHERE])
def test_shell_commands_run(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    program, subcommand, *arguments = shlex.split(command)
    assert program == "haste"
    monkeypatch.chdir(tmp_path)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "unused"))  # put back what it was afterwards
    extra = SMALL_ARGUMENTS[subcommand].replace("MODEL", str(model))
    arguments = [str(model) if "Wan-AI/" in argument else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["haste", subcommand, *arguments, *extra.split()])
    torch._dynamo.reset()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    shown = capsys.readouterr()
    assert exit_.value.code in (0, None), shown.err
    if subcommand == "export":
        digest = shown.out.splitlines()[-1].removeprefix("sha256 ")
        assert load(tmp_path / "wan.pt2", sha256=digest).manifest.size.height == 128
    else:
        assert (tmp_path / "compiled").is_dir() and (tmp_path / "outputs" / "video.mp4").is_file()


def test_measured_figures_are_the_recorded_run() -> None:
    record = json.loads((ROOT / "benchmarks/results/artifact-parity-cpu.json").read_text(encoding="utf-8"))
    section = DOCS.split("## Measured")[1]
    assert f"torch {record['torch']}" in section
    for row in record["rows"]:
        assert row["relative_error"] <= row["tolerance"] and row["repeats"] and row["same_masks"]
        assert f"{row['steps']} steps" in section
        megabytes = f"{row['bytes'] / 1e6:.1f} MB"
        assert f"| `{row['format']}` | {row['relative_error']:.1e} | yes | {megabytes} |" in section
        if row["format"] == "onnx":
            assert "latents within 2e-5 |" in DOCS and row["relative_error"] <= 2e-5


def test_every_format_kept_the_live_share_of_pairs_as_the_page_says() -> None:
    record = json.loads((ROOT / "benchmarks/results/artifact-parity-cpu.json").read_text(encoding="utf-8"))
    assert {row["artifact_density"] for row in record["rows"]} == {row["density"] for row in record["rows"]}
    assert "All keep the same share of pairs" in DOCS
    assert "the demo's calibration profile" in DOCS
    assert ROOT / record["options"]["profile"] == NANO_PROFILE and "top_p" not in record["options"]


def test_every_format_and_every_named_thing_is_there() -> None:
    rows = re.findall(r"^\| `(\w+)`", DOCS.split("## Formats")[1].split("## The manifest")[0], re.M)
    assert set(rows) == set(FORMATS)
    for name in re.findall(r"`(\w+Error)`", DOCS):
        assert issubclass(getattr(errors, name), errors.HasteError)
    for name in re.findall(r"`haste_compile\.(\w+)\(", DOCS):
        assert callable(getattr(haste_compile, name))
    links = [target for target in re.findall(r"\]\(([^)]+)\)", DOCS) if "://" not in target]
    assert links and all((ROOT / "docs" / link).exists() for link in links)
