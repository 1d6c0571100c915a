"""The package as it is installed: wheel and strict editable, started in the checkout and elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

#: Run in a fresh interpreter: the backend is found by name alone, and everything imports from one place.
PROBE = """
import sys, torch
assert "haste" in torch.compiler.list_backends()
assert not [name for name in sys.modules if name.startswith("haste_compile")]

class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)
    def forward(self, x):
        q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, -1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

model, x = torch.nn.Sequential(SelfAttention()), torch.randn(1, 256, 64)
options = {"block_size": 64, "min_tokens": 1, "top_p": 1.0, "inner": "eager"}
with torch.no_grad():
    out = torch.compile(model, backend="haste", options=options)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)

import haste_compile.backend, haste_compile.passes, haste_compile.kernels.ops
(report,) = haste_compile.backend.reports(model)
assert len(report.rewritten) == 1, report
assert "passes" not in sys.modules and "kernels" not in sys.modules
print(haste_compile.__file__, haste_compile.passes.__file__, haste_compile.kernels.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what goes into the package, so that building leaves no trace here."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("haste_compile", "passes", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def _install(where: Path, *what: str | Path) -> Path:
    """A venv that sees this environment's packages, with ``what`` installed; returns its interpreter."""
    venv.create(where, with_pip=False, symlinks=True)
    python = where / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(where), "platbase": str(where)}))
    # A path in a .pth file brings packages, but no .pth files of its own: an editable install of this very
    # project in the outer environment stays outside.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _call(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        + ["--ignore-installed", "--no-build-isolation", "--no-index", *what]
    )
    return python


def _call(command: list[str | Path], **keywords: object) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, **keywords)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _call(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        + ["--wheel-dir", folder, checkout]
    )
    (path,) = folder.glob("haste_compile-*.whl")
    return path


def test_every_package_is_listed() -> None:
    """setuptools cannot search two roots, so the table is written by hand and checked here."""
    found = set()
    for root in ("haste_compile", "passes", "kernels"):
        for path in (ROOT / root).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join(parts if root == "haste_compile" else ("haste_compile", *parts)))
    assert set(SETUPTOOLS["packages"]) == found


def test_wheel_holds_code_data_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "haste_compile/passes/__init__.py",
        "haste_compile/kernels/block_sparse_attention/kernel.py",
        "haste_compile/evaluation/compare_page.html",
        "haste_compile/py.typed",
    ):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("passes", "kernels", "tests")]
    assets = ROOT / "haste_compile" / "assets"
    assert {
        f"haste_compile/{path.relative_to(ROOT / 'haste_compile')}"
        for path in assets.rglob("*")
        if path.is_file()
    } <= set(names)


def test_wheel_runs_anywhere(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    python = _install(tmp_path / "venv", wheel)
    elsewhere = _call([python, "-c", PROBE], cwd=tmp_path).split()
    assert all(Path(path).is_relative_to(tmp_path / "venv") for path in elsewhere)
    # In a checkout Python finds the checkout's package first; its passes and kernels must come along.
    inside = _call([python, "-c", PROBE], cwd=checkout).split()
    assert [Path(path).relative_to(checkout).parts[0] for path in inside] == [
        "haste_compile",
        "passes",
        "kernels",
    ]
    assert "haste_compile 0" in _call([tmp_path / "venv" / "bin" / "haste", "--version"], cwd=tmp_path)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_runs_anywhere(mode: str, checkout: Path, tmp_path: Path) -> None:
    python = _install(tmp_path / "venv", "--config-settings", f"editable_mode={mode}", "--editable", checkout)
    for folder in (checkout, tmp_path):
        for path in _call([python, "-c", PROBE], cwd=folder).split():
            assert Path(path).is_relative_to(checkout)


def test_import_is_light() -> None:
    """``import haste_compile`` must not pay for what only some uses need."""
    code = "import sys, haste_compile; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout.split()
    assert "haste_compile" in loaded
    assert not {"triton", "diffusers", "transformers", "typer", "rich", "av", "torchmetrics"} & set(loaded)


def test_first_lines_of_the_readme_are_the_two_commands() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    assert lines[1] == "```sh" and lines[2].startswith("make demo") and lines[3].startswith("make test")
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    assert {"demo", "test", "lint", "types"} <= targets


def test_ci_runs_lint_types_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make types", "make test"]
