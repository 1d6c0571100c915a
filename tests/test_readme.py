"""Every block of the README is run here, or stands in a list that says which test runs it."""

from __future__ import annotations

import dataclasses
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
from haste_compile.config import PRESETS, HasteConfig
from haste_compile.passes import PASSES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: What has to change in the README's code for the tiny pipeline on the CPU.
SMALL_TEXT = {
    '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "MODEL",
    "torch.bfloat16": "torch.float32",
    '"cuda"': '"cpu"',
    "height=480, width=832, num_frames=81": "height=128, width=128, num_frames=17",
    '{"top_p": 0.9}': '{"top_p": 0.9, "block_size": 64, "min_tokens": 64, "inner": "eager"}',
    "top_p=0.9": 'top_p=0.9, block_size=64, min_tokens=64, inner="eager"',
}
#: The same for the shell: further arguments that the tiny pipeline needs.
SMALL = "--height 128 --width 128 --frames 17"
SMALL_ARGUMENTS = {
    "doctor": "",
    "explain": f"{SMALL} -o block_size=64 -o min_tokens=64",
    "generate": f"{SMALL} --steps 1 -o block_size=64 -o min_tokens=64 -o inner=eager",
    "calibrate": f"{SMALL} --steps 1 --intervals 1 --probes 1 -o block_size=64 -o min_tokens=64",
}
#: Shell lines that another test or CI itself runs, and which.
RUN_ELSEWHERE = {
    "make demo": "tests/test_demo.py runs the command; .ci/run sets up the same environment",
    "make test": ".ci/run",
    "python -m benchmarks.drift_threshold --top-p 0.9 0.95 -o dense_steps=2 --json thresholds.json": (
        "tests/test_benchmark_drift_threshold.py"
    ),
    "pip install 'haste-compile[gpu]'": "tests/test_packaging.py installs the wheel",
    "pip install 'haste-compile[demo]'": "tests/test_packaging.py installs the wheel",
    "pip install 'haste-compile[calibrate]'": "tests/test_packaging.py installs the wheel",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def _commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def test_only_blocks_that_are_tested() -> None:
    languages = re.findall(r"^```(\w+)$", README, re.M)
    assert set(languages) <= {"sh", "python"}
    assert len(_blocks("python")) == 3


def test_python_blocks_run(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    bare, with_handle, explained = (_shrink(block) for block in _blocks("python"))
    names: dict[str, Any] = {"MODEL": str(model)}
    exec(bare, names)
    assert names["video"].shape == (17, 128, 128, 3)
    (report,) = haste_compile.backend.reports(names["pipe"].transformer)
    assert len(report.rewritten) == tiny_wan.LAYERS

    names["pipe"].transformer = names["pipe"].transformer._orig_mod  # the second block is another way
    exec(with_handle, names)
    assert "2 attention sites rewritten" in capsys.readouterr().out

    exec(explained, names)
    assert "2 rewritten, 2 skipped" in capsys.readouterr().out


def _shrink(code: str) -> str:
    for old, new in SMALL_TEXT.items():
        code = code.replace(old, new)
    return code


@pytest.mark.parametrize("command", [c for c in _commands() if c not in RUN_ELSEWHERE])
def test_shell_commands_run(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle moves left\n", encoding="utf-8")
    if "profile=profile" in command:  # the line before makes it
        (making,) = (line for line in _commands() if line.endswith("--out profile"))
        _run(making, model, monkeypatch, capsys)
    _run(command, model, monkeypatch, capsys)


def _run(command: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    program, subcommand, *arguments = shlex.split(command)
    assert program == "haste"
    arguments = [str(model) if "Wan-AI/" in argument else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["haste", subcommand, *arguments, *SMALL_ARGUMENTS[subcommand].split()])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code in (0, None), capsys.readouterr().err


def test_what_runs_elsewhere_is_still_there() -> None:
    assert set(RUN_ELSEWHERE) <= set(_commands())


def _rows(header: str) -> list[list[str]]:
    """Cells of the table whose header line begins like this."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header)) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_option_table_lists_every_option_with_its_default() -> None:
    table = {row[0].strip("`"): row[1].strip("`") for row in _rows("| option |")}
    fields = {field.name: field.default for field in dataclasses.fields(HasteConfig)}
    assert list(table) == list(fields)
    assert {name: eval(default) for name, default in table.items()} == fields
    assert all(f"`{preset}`" in README for preset in PRESETS)


def test_pass_table_lists_every_pass_in_order() -> None:
    names = []
    for cell, *_ in _rows("| pass |"):
        name, path = re.fullmatch(r"\[`(\w+)`\]\((.+)\)", cell).groups()  # type: ignore[union-attr]
        assert (ROOT / path).is_file()
        names.append(name)
    assert names == [run.__name__ for run in PASSES]


def test_error_table_lists_every_error() -> None:
    kinds = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.HasteError) and kind is not errors.HasteError
    ]
    assert sorted(row[0].strip("`") for row in _rows("| error |")) == sorted(kinds)


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_records_hold_no_path_of_a_machine() -> None:
    records = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert records
    assert [path.name for path in records if '"/' in path.read_text(encoding="utf-8")] == []


def test_demo_figures_are_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/demo-cpu.json").read_text(encoding="utf-8"))
    assert all(recorded["checks"].values())
    section = README.split("## Measured")[1].split("## Errors")[0]
    for figure in (
        f"torch {recorded['versions']['torch']}",
        f"{recorded['steps']} steps",
        f"{recorded['tokens']:,} tokens",
        f"Density {recorded['density']:.1%}",
        f"{recorded['refresh_rate']:.1%}",
        f"PSNR {recorded['psnr_db']:.2f} dB",
        f"SSIM {recorded['ssim']:.4f}",
        f"{recorded['dense_seconds']:.1f} s dense",
        f"{recorded['haste_seconds']:.1f} s sparse",
    ):
        assert figure in section
    on_gpu = json.loads((ROOT / "benchmarks/results/demo-h200.json").read_text(encoding="utf-8"))
    assert all(on_gpu["checks"].values())
    for figure in (f"density {on_gpu['density']:.1%}", f"{on_gpu['psnr_db']:.2f} dB"):
        assert figure in section
    held_out = json.loads((ROOT / "haste_compile/assets/nano_wan_profile/profile.json").read_text())[
        "held_out"
    ]
    worst, best = sorted(video["psnr_db"] for video in held_out["videos"])
    assert f"{best:.1f} and {worst:.1f} dB" in " ".join(section.split())
