"""The command line: exit codes, messages without traceback, JSON alone on stdout, nothing half-written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_wan

import haste_compile
from haste_compile import cli, doctor
from haste_compile.errors import DeviceError, OutputPathError
from haste_compile.loading import load_pipeline, pick_device, transformer_structures
from haste_compile.output import new_file, new_folder

SMALL = ["--height", "128", "--width", "128", "--frames", "17", "--steps", "2"]
OPTIONS = ["-o", "block_size=64", "-o", "min_tokens=64", "-o", "inner=eager"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def haste(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["haste", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("command", "teaches"),
    [
        ((), "Start with haste demo"),
        (("demo",), "compare.html"),
        (("generate",), "--dense"),
        (("explain",), "no weights"),
        (("calibrate",), "--dry-run"),
        (("doctor",), "what will run where"),
    ],
)
def test_help_teaches(haste, command: tuple[str, ...], teaches: str) -> None:
    code, out, _ = haste(*command, "--help")
    assert code == 0
    assert teaches in re.sub(r"[\s│]+", " ", out)


def test_version(haste) -> None:
    assert haste("--version")[:2] == (0, f"haste_compile {haste_compile.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["demo", "-o", "topp=0.5"], "OptionError", "Did you mean 'top_p'"),
        (["demo", "-o", "top_p=1.5"], "ThresholdError", "(0, 1]"),
        (["demo", "-o", "top_p=[[0.5],[0]]"], "ThresholdError", "site 1, head 0"),
        (["demo", "-o", "top_p"], "OptionError", "NAME=VALUE"),
        (["demo", "--frames", "16"], "OptionError", "a multiple of 4, plus 1"),
        (["demo", "--width", "100"], "OptionError", "multiple of 16"),
        (["demo", "--device", "tpu"], "DeviceError", "cpu or cuda"),
        (["demo", "--model", "/no/such/model"], "ModelPathError", "model_index.json"),
        (["explain", "--model", "/no/such/model"], "ModelPathError", "/no/such/model"),
        (["explain", "-o", "block_size=100"], "OptionError", "64, 128"),
        (["generate", "--prompt", "x", "--model", "/no/such/model"], "ModelPathError", "nothing there"),
        (["generate", "--prompt", "x", "--dense", "-o", "top_p=0.5"], "OptionError", "one of the two"),
        (["export", "--out", "x.pt2", "--format", "flash"], "OptionError", "'torchscript'"),
        (["export", "--out", "x.pt2", "--model", "/no/such/model"], "ModelPathError", "nothing there"),
    ],
)
def test_bad_input(haste, tmp_path: Path, monkeypatch, arguments: list[str], error: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = haste(*arguments)
    assert code == 2
    assert out == ""
    assert err.lstrip().startswith(error), err
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_unknown_flag(haste) -> None:
    code, _, err = haste("demo", "--stepz", "3")
    assert code == 2 and "--stepz" in err


def test_folder_that_is_no_pipeline(haste, tmp_path: Path) -> None:
    code, _, err = haste("explain", "--model", tmp_path)
    assert code == 2 and "a folder without model_index.json" in err
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    code, _, err = haste("explain", "--model", tmp_path)
    assert code == 2 and "a pipeline of class FluxPipeline" in err
    (tmp_path / "model_index.json").write_text("{")
    code, _, err = haste("explain", "--model", tmp_path)
    assert code == 2 and "not JSON" in err


@pytest.mark.parametrize("command", ["demo", "generate"])
def test_unwritable_output_is_refused_before_the_work(haste, tmp_path: Path, command: str) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    prompt = ["--prompt", "x"] if command == "generate" else []
    code, _, err = haste(
        command, *prompt, "--model", "/no/such/model", "--out", blocker / "below" / "out.mp4"
    )
    assert code == 2 and err.lstrip().startswith("OutputPathError"), (
        err
    )  # the output was looked at before the model
    assert blocker.read_text() == "in the way"


def test_generate(haste, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "video.mp4"
    code, text, _ = haste(
        "generate", "--model", model, "--prompt", "a circle", "--out", out, "--json", *SMALL, *OPTIONS
    )
    assert code == 0
    facts = json.loads(text)
    assert facts["statistics"]["transformer"]["calls"] == 2 * 2 * 2 * 2
    assert facts["seconds"] > 0
    assert [path.name for path in out.parent.iterdir()] == ["video.mp4"]
    from haste_compile.evaluation.video import read_mp4

    assert read_mp4(out).shape == (17, 128, 128, 3)


def test_generate_refuses_an_image_for_text_to_video(haste, model: Path, tmp_path: Path) -> None:
    code, _, err = haste(
        *("generate", "--model", model, "--prompt", "a circle", "--image", "x.png"),
        *("--out", tmp_path / "new" / "video.mp4", *SMALL, *OPTIONS),
    )
    assert code == 2 and "image-to-video" in err
    assert list(tmp_path.iterdir()) == []  # not even the folder that --out named


def test_generate_from_an_image(haste, tmp_path: Path) -> None:
    from PIL import Image

    tiny_wan.build_image_pipeline().save_pretrained(tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    arguments = ["generate", "--model", tmp_path / "model", "--prompt", "a circle", *SMALL, *OPTIONS]
    arguments += ["--out", tmp_path / "video.mp4", "--json"]
    code, _, err = haste(*arguments)
    assert code == 2 and "Give --image" in err
    code, out, _ = haste(*arguments, "--image", tmp_path / "first.png")
    assert code == 0
    assert json.loads(out)["statistics"]["transformer"]["calls"] == 2 * 2 * 2 * 2
    assert (tmp_path / "video.mp4").stat().st_size > 1000


def test_strict_names_the_site_that_does_not_fit(haste, model: Path, tmp_path: Path) -> None:
    code, out, err = haste(
        *("generate", "--model", model, "--prompt", "a circle", "--out", tmp_path / "video.mp4"),
        *(*SMALL, "-o", "strict=true", "-o", "inner=eager", "-o", "min_tokens=1000"),
    )
    assert (code, out) == (2, "")
    assert "UnsupportedSiteError" in err and "320 tokens" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_explain(haste, model: Path) -> None:
    code, out, _ = haste("explain", "--model", model, *SMALL[:6], *OPTIONS)
    assert code == 0
    assert "2 rewritten, 2 skipped" in out and "cross-attention (320 queries, 512 keys)" in out
    code, out, _ = haste("explain", "--model", model, "--device", "cuda", "--json", *SMALL[:6], *OPTIONS)
    assert code == 0
    found = json.loads(out)["transformer"]
    assert found["tokens"] == 320 and found["blocks"] == 5
    assert {site["dtype"] for site in found["report"]["sites"]} == {"bfloat16"}
    assert all(site["device"].startswith("cuda") for site in found["report"]["sites"])
    assert 1 < found["ceiling"]["0.5"] < found["ceiling"]["0.25"] < found["ceiling"]["0.0"]


def test_explain_takes_a_predictor_by_name(haste, model: Path) -> None:
    code, out, _ = haste("explain", "--model", model, "--predictor", "svg2", *SMALL[:6], *OPTIONS)
    assert code == 0 and "tokens 320 in 20 × 40 blocks" in out
    code, _, err = haste("explain", "--model", model, "--predictor", "svg9")
    assert code == 2 and "'xattention', 'svg2'" in err


def test_the_commands_load_without_torch() -> None:
    code = "import sys, haste_compile.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_structures_hold_no_weights(model: Path) -> None:
    import torch

    (transformer,) = transformer_structures(model, dtype=torch.bfloat16).values()
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.scale_shift_table.dtype == torch.float32  # as from_pretrained keeps it


def test_loaded_pipeline_has_a_float32_vae(model: Path) -> None:
    import torch

    pipe = load_pipeline(model, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (pipe.vae.dtype, pipe.transformer.blocks[0].attn1.to_q.weight.dtype) == (
        torch.float32,
        torch.bfloat16,
    )


def test_doctor(haste) -> None:
    code, out, _ = haste("doctor", "--json")
    facts = json.loads(out)
    found = {check["name"]: check for check in facts["checks"]}
    assert code == (0 if facts["ok"] else 1)
    assert found["torch"]["verdict"] == "ok" and found["python"]["verdict"] == "ok"
    assert found["CPU"]["verdict"] == "ok"
    code, out, _ = haste("doctor")
    assert "torch" in out and "CPU" in out


def test_doctor_fails_on_an_unsupported_version(haste, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "versions", lambda: {"python": "3.11.7", "torch": "2.9.1", "numpy": "2.4.6"})
    code, out, _ = haste("doctor", "--json")
    verdicts = {check["name"]: check["verdict"] for check in json.loads(out)["checks"]}
    assert code == 1
    assert (verdicts["torch"], verdicts["numpy"], verdicts["diffusers"]) == ("wrong", "ok", "missing")


def test_doctor_misses_the_compiler(haste, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, _ = haste("doctor", "--json")
    (check,) = [c for c in json.loads(out)["checks"] if c["name"] == "C++ compiler"]
    assert check["verdict"] == "missing" and "aot_eager" in check["note"]
    assert code == 0  # the package works without


def test_doctor_knows_what_pyproject_says() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = {}
    for line in [*project["dependencies"], *extras["demo"], *extras["gpu"]]:
        name, least, _, beyond = re.fullmatch(r"([\w-]+)>=([\d.]+)(,<([\d.]+))?", line).groups()
        required[name] = (least, beyond)
    least, beyond = re.fullmatch(r">=([\d.]+),<([\d.]+)", project["requires-python"]).groups()
    required["python"] = (least, beyond)
    assert {name: required[name] for name in doctor.SUPPORTED} == {
        name: (least, beyond) for name, (least, beyond, _) in doctor.SUPPORTED.items()
    }


def test_cuda_without_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        assert pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(DeviceError, match="--device cpu"):
            pick_device("cuda")


def test_module_runs_as_the_command(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "haste_compile", "demo", "--model", "/no/such/model"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lstrip().startswith("ModelPathError") and "Traceback" not in done.stderr


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"
    with new_folder(target) as folder:  # again: same names are replaced, others stay
        (target / "other").write_text("mine")
        (folder / "one").write_text("2")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"one": "2", "other": "mine"}


def test_new_folder_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "one").write_text("1")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "a" / "c.mp4") as path:
        path.write_text("1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_output_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for context in (new_folder(tmp_path / "file"), new_file(tmp_path)):
        with pytest.raises(OutputPathError), context:
            pytest.fail("the block ran")


def test_entry_points_are_declared() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for group in (project["scripts"], project["entry-points"]["torch_dynamo_backends"]):
        point = importlib.metadata.EntryPoint("haste", group["haste"], "any")
        assert callable(point.load())
