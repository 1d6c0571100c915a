"""Run by ``test_interruption.py`` in a process of its own: children that are killed, and children that share.

Children are forked, so that none has to import torch and compile again. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_wan
import torch
from tiny_calibration import OPTIONS, PROMPTS, REQUEST, SMALL

import haste_compile
from haste_compile.calibration.journal import Journal

KILLS = 10


def run(pipe: Any, out: Path, method: str) -> None:
    haste_compile.calibrate(
        pipe,
        PROMPTS,
        method=method,
        request=REQUEST,
        options=OPTIONS,
        out=out,
        **{**SMALL, "videos": 2},
    )


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    return hashlib.sha256(repr(names).encode() + b"".join(p.read_bytes() for p in files)).hexdigest()


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def killed_and_resumed(pipe: Any, folder: Path, method: str, after: float) -> dict[str, Any]:
    child = fork(lambda: run(pipe, folder, method))
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    journal = folder / "journal"
    left = len(list(journal.glob("*.safetensors"))) if journal.exists() else 0
    run(pipe, folder, method)
    return {"killed": os.WIFSIGNALED(status), "left": left, "digest": digest(folder)}


def shared(pipe: Any, folder: Path, method: str, count: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        if rank:  # the first rank must not remove the journal under one that reads it late
            read = Journal.read
            Journal.read = lambda journal, name: time.sleep(0.02) or read(journal, name)
        run(pipe, folder, method)

    children = [fork(lambda rank=rank: work(rank)) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "digest": digest(folder)}


def main() -> None:
    torch.set_num_threads(1)
    pipe = tiny_wan.build_pipeline()
    generator = random.Random(sys.argv[1])
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in ("gradient", "exact"):
            run(pipe, folder / f"{method}-first", method)  # compiles, for all that are forked from here
            started = time.monotonic()
            run(pipe, folder / f"{method}-again", method)
            seconds = time.monotonic() - started
            kills = KILLS if method == "gradient" else 2
            delays = [generator.uniform(0.02, 0.98) * seconds for _ in range(kills)]
            result[method] = {
                "whole": [digest(folder / f"{method}-{which}") for which in ("first", "again")],
                "interrupted": [
                    killed_and_resumed(pipe, folder / f"{method}-{i}", method, delay)
                    for i, delay in enumerate(delays)
                ],
                "shared": shared(pipe, folder / f"{method}-shared", method, 2),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
