"""The benchmark of SVG2's kernels refuses to time what is wrong. Its timing needs a GPU and is not run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import svg2 as benchmark  # noqa: E402

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


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--quick"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
