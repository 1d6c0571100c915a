"""The benchmark of SVG2's kernels refuses to time what is wrong. Its timing needs a GPU and is not run."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import svg2 as benchmark  # noqa: E402
from haste_compile.kernels.variable_block_attention.variants import VARIANTS, Variant  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checks the checks, on the CPU")


@pytest.fixture
def site() -> benchmark.Site:
    site = benchmark.make_site(2, 500, 0.3, device="cpu", dtype=torch.bfloat16)
    site.refresh(first=True, first_iterations=4)
    return site


def test_right_results_pass(site: benchmark.Site) -> None:
    benchmark.check_state(site, iterations=4)
    assert benchmark.check_attention(site, site.attend()) <= 2
    assert 0 < site.pairs() < 2 * 500**2


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("order", "no permutation|out of order"),
        ("centroids", "inertia"),
        ("mask", "a map of which"),
        ("counters", "miscount"),
    ],
)
def test_wrong_state_is_named(site: benchmark.Site, field: str, message: str) -> None:
    x = site.state[field]
    if field == "order":
        x[0, 0, 1, 0, 3] = x[0, 0, 1, 0, 4]
    else:
        x[0, 0, 0] += 1
    with pytest.raises(benchmark.WrongResultError, match=message):
        benchmark.check_state(site, iterations=4)


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_output_is_named(site: benchmark.Site, wrong: float) -> None:
    out = site.attend()
    out[0, 1] += wrong
    with pytest.raises(benchmark.WrongResultError, match="head 1"):
        benchmark.check_attention(site, out)


def wrong_form(error: float, steady: bool = True) -> Variant:
    calls = iter(range(100))

    def attend(*inputs: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = VARIANTS["triton"].attend(*inputs, scale=scale)
        return out + error * (steady or next(calls) == 3), lse

    return dataclasses.replace(VARIANTS["triton"], attend=attend, confirmed=False)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("triton", None),
        (wrong_form(0.5), "beside SDPA's"),
        (wrong_form(float("nan")), "beside SDPA's"),
        (wrong_form(0.5, steady=False), "from run to run"),
    ],
    ids=["right", "wrong", "nan", "unsteady"],
)
def test_a_form_is_tried_before_it_is_timed(
    form: Variant | str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter multiplies fp16 right and bf16 wrong.
    in_fp16 = functools.partial(benchmark.make_site, dtype=torch.float16)
    monkeypatch.setattr(benchmark, "make_site", in_fp16)
    if isinstance(form, Variant):
        monkeypatch.setitem(VARIANTS, "tried", form)
    name = form if isinstance(form, str) else "tried"
    if message is None:
        benchmark.try_form(name, ((1, 80, 0.5),), "cpu")
        return
    with pytest.raises(benchmark.WrongResultError, match=message):
        benchmark.try_form(name, ((1, 80, 0.5),), "cpu")


def test_forms_that_cannot_run_are_left_out(site: benchmark.Site, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(benchmark, "probe", lambda name: "it hangs" if name == "gluon" else None)
    monkeypatch.setattr(benchmark.Site, "attend", lambda self, form=None: torch.zeros_like(self.q))
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(variant, confirmed=False))
    left_out: dict[str, str] = {}
    assert benchmark.usable_forms(site, left_out) == {}
    assert left_out["svg2 attention, gluon"] == "it hangs"
    assert "beside SDPA's" in left_out["svg2 attention, gluon, 3 stages"]
    capability = (8, 0)
    benchmark.usable_forms(site, left_out)
    assert left_out["svg2 attention, gluon"] == "needs compute capability 9, not 8.0"
    monkeypatch.setitem(VARIANTS, "triton", dataclasses.replace(VARIANTS["triton"], confirmed=True))
    with pytest.raises(benchmark.WrongResultError):
        benchmark.usable_forms(site, left_out)


def test_forms_are_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--forms", "gluon", "other"])
    assert "no form ['other']" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
