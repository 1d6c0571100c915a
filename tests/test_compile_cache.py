"""A second process compiles nothing: counted by Inductor's cache and by the compiler's own invocations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import haste_compile
from haste_compile.errors import OptionError, OutputPathError

_PROCESS = """
import dataclasses, json, sys, torch, graph_capture, haste_compile
haste_compile.warm_start(sys.argv[1])
options = {"block_size": 64, "stride": 8, "min_tokens": 64, "top_p": 0.7}
model = torch.compile(graph_capture.toy({}), backend="haste", dynamic=False, options=options)
with torch.no_grad():
    torch.save(model(graph_capture.tokens()), sys.argv[2])
print(json.dumps(dataclasses.asdict(haste_compile.cache_counts())))
"""

#: A compiler that writes down every file it compiles, and then compiles it.
_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
exec {real} "$@"
"""


def run(folder: Path, result: Path, compiler: Path) -> dict[str, int]:
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n" + _PROCESS
    environment = {**os.environ, "CXX": str(compiler)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(result)],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path: Path):
    log, compiler = tmp_path / "compiled", tmp_path / "g++"
    compiler.write_text(_COMPILER.format(log=log, real=os.environ.get("CXX", "g++")))
    compiler.chmod(0o755)
    folder = tmp_path / "cache" / "haste"

    assert run(folder, tmp_path / "cold.pt", compiler) == {"hits": 0, "misses": 1, "bypassed": 0}
    assert " -c " in log.read_text() or ".cpp" in log.read_text()
    kept = {path for path in folder.rglob("*") if path.suffix == ".so"}
    assert kept
    log.unlink()

    assert run(folder, tmp_path / "warm.pt", compiler) == {"hits": 1, "misses": 0, "bypassed": 0}
    compiled = [line for line in (log.read_text().splitlines() if log.exists() else []) if ".cpp" in line]
    assert compiled == []
    assert {path for path in folder.rglob("*") if path.suffix == ".so"} == kept
    assert torch.equal(torch.load(tmp_path / "cold.pt"), torch.load(tmp_path / "warm.pt"))


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError, match="wanted a folder that can be written"):
        haste_compile.warm_start(tmp_path / "file" / "cache")


def test_caches_that_are_switched_off(tmp_path: Path):
    with torch._inductor.config.patch(fx_graph_cache=False), pytest.raises(OptionError, match="switched off"):
        haste_compile.warm_start(tmp_path)
