"""The hunt for kernels that other processes disturb, on the CPU with stand-ins."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks import contention  # noqa: E402
from benchmarks.sanitize import cases  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert contention.main(["--seconds", "1"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_launch_that_differs_is_counted_and_described() -> None:
    wanted = torch.randn(1, 2, 200, 8), torch.randn(1, 2, 200)
    others_run = False
    launches = 0

    def right() -> Sequence[Tensor]:
        return wanted

    def disturbed() -> Sequence[Tensor]:
        nonlocal launches
        out = wanted[0].clone()
        if others_run:
            launches += 1
            if launches == 2:
                out[0, 0, 70:75, 3] = float("nan")  # in one piece of 64 rows
                out[0, 1, 199] += 1.0  # in another
        return out, wanted[1]

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        nonlocal others_run
        others_run = True
        yield
        others_run = False

    names = {"right": True, "disturbed": False}
    tallies = contention.watch({"right": right, "disturbed": disturbed}, names, begin, 0.2)
    assert not others_run and tallies["right"].launches == tallies["disturbed"].launches >= 3
    assert tallies["right"].ours and not tallies["right"].differing
    ((_, nan, pieces),) = tallies["disturbed"].differing
    assert (nan, pieces) == (5, 2)


def test_a_wrong_second_output_counts_too() -> None:
    first, second = torch.zeros(4, 8), itertools.count()
    call = lambda: (first, torch.full((2,), float(next(second))))  # noqa: E731
    tallies = contention.watch({"x": call}, {"x": True}, contextlib.nullcontext, 0.05)
    assert len(tallies["x"].differing) == tallies["x"].launches


def test_what_the_others_run_exists() -> None:
    # The Gluon kernel's case exists on a Hopper GPU alone; its name is that of a variant.
    from haste_compile.kernels.block_sparse_attention.variants import VARIANTS

    known = {*cases("cpu"), *(f"attention, {name}" for name in VARIANTS)}
    assert set(contention.SANITIZED) <= known
    options = contention.parse([])
    assert options.loads == list(contention.LOADS) and options.cases == list(contention.SANITIZED)


def test_the_others_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention.time, "sleep", lambda seconds: None)
    begun: list[contention.subprocess.Popen[bytes]] = []
    popen = contention.subprocess.Popen

    def sleeping(command: list[str], **options: object) -> contention.subprocess.Popen[bytes]:
        begun.append(popen(["sleep", "60"], **options))
        return begun[-1]

    monkeypatch.setattr(contention.subprocess, "Popen", sleeping)
    with pytest.raises(KeyError), contention.others(["product"], ["attention, gluon"]):
        assert len(begun) == 2 and all(process.poll() is None for process in begun)
        raise KeyError
    assert all(process.returncode == -contention.signal.SIGKILL for process in begun)
