from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention, attention_problems, attention_sides
from benchmarks.attention_problems import Problem, WrongResultError
from benchmarks.attention_sides import Side
from benchmarks.interleaving import balanced_rounds, measure, paired_ratio

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no CUDA device" in printed.err


def small_problem(mask: str = "even") -> Problem:
    """200 tokens, two heads, on the CPU, half of the blocks kept."""
    return attention_problems.make_problem(200, 2, 0.5, mask, device="cpu")


def masked_sdpa(problem: Problem) -> Tensor:
    of_token = torch.arange(problem.tokens) // attention_problems.BLOCK
    kept = problem.kept[:, :, of_token][..., of_token]
    return F.scaled_dot_product_attention(problem.q, problem.k, problem.v, attn_mask=kept)


def test_a_wrong_output_is_refused() -> None:
    problem = small_problem().full()
    out = F.scaled_dot_product_attention(problem.q, problem.k, problem.v)
    assert attention_problems.check("SDPA", out, problem) <= 2
    out[0, 1, 150, 7] += 0.1
    with pytest.raises(WrongResultError, match="head 1, query block 1"):
        attention_problems.check("SDPA", out, problem)
    out[0, 1, 150, 7] = float("nan")
    with pytest.raises(WrongResultError, match="error nan"):
        attention_problems.check("SDPA", out, problem)


def test_sides_are_checked_first_and_timed_in_one_table() -> None:
    problem = small_problem()
    dense = problem.full()
    stubs = [
        Side("dense", lambda: F.scaled_dot_product_attention(dense.q, dense.k, dense.v), dense),
        Side("theirs, wrong", lambda: torch.zeros_like(problem.q), problem),
        Side("ours", lambda: masked_sdpa(problem), problem, ours=True),
    ]
    left_out: dict[str, str] = {}
    seen: list[Any] = []

    def timer(call: Any) -> float:
        seen.append(call)
        return 2.0

    rows = attention.compare(stubs, "even", 3, left_out, timer=timer)
    assert [r.what for r in rows] == ["dense", "ours"]
    assert list(left_out) == ["theirs, wrong"] and "error" in left_out["theirs, wrong"]
    assert set(seen) == {stubs[0].call, stubs[2].call}
    assert rows[0].density == 1 and rows[0].flops == 4 * 128 * 2 * 200**2
    assert rows[1].flops == 4 * 128 * problem.pairs() and rows[1].bytes == problem.bytes()
    assert rows[1].tflops == pytest.approx(rows[1].flops / 2e-3 / 1e12)
    assert "ours" in attention.line(rows[1]) and "even" in attention.line(rows[1])


@pytest.mark.parametrize(
    ("rounds", "first", "last"),
    # Tables of the sign test: P(at most 3 heads of 16) = .011, 4: .038; 6 of 24: .011, 7: .032.
    [(3, 1, 3), (5, 1, 5), (6, 1, 6), (16, 4, 13), (24, 7, 18)],
)
def test_a_ratio_s_interval_is_that_of_the_sign_test(rounds: int, first: int, last: int) -> None:
    over = [2.0 * place for place in range(rounds, 0, -1)]
    assert paired_ratio(over, [2.0] * rounds) == ((rounds + 1) / 2, first, last)


def test_ours_is_compared_with_flash_attention_round_by_round() -> None:
    problem = small_problem()
    stubs = [
        Side(attention.FLASH_SPARSE, lambda: masked_sdpa(problem), problem),
        Side("ours", lambda: masked_sdpa(problem), problem, ours=True),
    ]
    rounds = {id(stub.call): 0 for stub in stubs}

    def timer(call: Any) -> float:
        rounds[id(call)] += 1
        slower = 1.5 if call is stubs[0].call else 1.0
        return slower * 10.0 ** rounds[id(call)]  # the card gets slower from round to round, for both alike

    flash, ours = attention.compare(stubs, "even", 8, {}, timer=timer)
    assert flash.over_flash is None and ours.over_flash == pytest.approx((1.5, 1.5, 1.5))
    assert "1.500 [1.500, 1.500]" in attention.line(ours)


def test_a_wrong_kernel_of_ours_stops_everything() -> None:
    problem = small_problem()
    stub = Side("ours", lambda: torch.zeros_like(problem.q), problem, ours=True)

    def timer(call: Any) -> float:
        pytest.fail("timed although it is wrong")

    with pytest.raises(WrongResultError, match="ours"):
        attention.compare([stub], "even", 3, {}, timer=timer)


def test_an_output_that_depends_on_dropped_keys_is_refused() -> None:
    def clean(problem: Problem) -> Tensor:
        finite = [torch.where(x.isfinite(), x, 0) for x in (problem.k, problem.v)]
        return masked_sdpa(Problem(problem.q, *finite, problem.kept))

    def problem() -> Problem:
        return attention_problems.make_problem(600, 1, 0.5, device="cpu")

    attention_problems.check_poison("clean", clean, problem())
    with pytest.raises(WrongResultError, match="leaky"):
        attention_problems.check_poison("leaky", masked_sdpa, problem())


def test_a_row_counts_kept_pairs_and_bytes() -> None:
    q = torch.zeros(1, 2, 200, 128, dtype=torch.bfloat16)
    problem = Problem(q, q, q, torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2))
    pairs = problem.pairs()
    assert pairs == 2 * (128**2 + 72**2)
    found = attention.row("ours", problem, [3.0, 1.0, 2.0], "even", 1.0)
    assert found.density == pairs / (2 * 200**2)
    assert (found.milliseconds, found.spread) == (2.0, 2.0)
    assert found.tflops == pytest.approx(4 * 128 * pairs / 2e-3 / 1e12)
    # q, k, v, out in two bytes, lse in four, a count a row and an index a kept block.
    assert found.bytes == 4 * (2 * 200 * 128) * 2 + 2 * 200 * 4 + (4 + 4) * 4
    assert attention.row("predictor", problem, [1.0]).flops is None


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_every_side_follows_every_other_equally_often(count: int) -> None:
    orders = balanced_rounds(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert len(set(Counter(order[place] for order in orders).values())) == 1
    followers = Counter(pair for order in orders for pair in pairwise(order))
    assert len(followers) == count * (count - 1)
    assert len(set(followers.values())) <= 1


def test_rounds_are_whole_balanced_passes_after_a_warm_up() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}

    def timer(call: Any) -> float:
        call()
        return float(len(called))

    times = measure(calls, 7, timer=timer)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 12)
    assert called[:6] == list("abcabc")
    assert len({tuple(called[i : i + 3]) for i in range(6, len(called), 3)}) == 6


@pytest.mark.parametrize("mask", attention_problems.MASKS)
@pytest.mark.parametrize("density", [0.1, 0.25])
def test_masks_have_the_density_asked_for(mask: str, density: float) -> None:
    problem = attention_problems.make_problem(8190, 8, density, mask, device="cpu")
    measured = problem.pairs() / (8 * 8190**2)
    assert measured == pytest.approx(density, rel=0.2)
    assert problem.kept.diagonal(dim1=2, dim2=3).all()


def test_uneven_rows_spread_tenfold_and_structured_columns_come_in_runs() -> None:
    counts, runs = {}, {}
    for mask in attention_problems.MASKS:
        kept = attention_problems.make_problem(8190, 8, 0.25, mask, device="cpu").kept
        lengths = kept.sum(-1).float().flatten()
        counts[mask] = (lengths.quantile(0.95) / lengths.quantile(0.05)).item()
        runs[mask] = (kept[..., 1:] & kept[..., :-1]).float().sum().item() / kept.float().sum().item()
    assert counts["uneven"] >= 10 and counts["even"] < 3
    assert runs["structured"] > 1.5 * runs["even"]


def test_an_absent_package_is_a_reason() -> None:
    with pytest.raises(attention_sides.LeftOutError, match="flash-attn-4 is not installed"):
        attention_sides.flash_sparse(small_problem())


def _answer(argument: str) -> None:
    if argument != "right":
        raise ValueError(f"{argument}\nand more")


def _hang(argument: str) -> None:
    time.sleep(600)


def test_a_child_that_hangs_or_fails_is_a_reason() -> None:
    assert attention_sides.in_child(_answer, "right", 60) is None
    assert attention_sides.in_child(_answer, "wrong", 60) == "ValueError: wrong"
    started = time.monotonic()
    reason = attention_sides.in_child(_hang, "", 1)
    assert reason is not None and "hangs" in reason
    assert time.monotonic() - started < 30


def _record(name: str) -> dict[str, Any]:
    path = ROOT / f"benchmarks/results/{name}-h200.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert record["environment"]["replay"]
    return record


def _groups(record: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The rows of one case after the other, by what was timed."""
    groups: list[dict[str, dict[str, Any]]] = []
    for row in record["rows"]:
        if row["what"] == "dense SDPA":
            groups.append({})
        groups[-1][row["what"]] = row
    assert len(groups) == 8
    return groups


def test_the_readme_gives_the_recorded_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def cell(row: dict[str, Any]) -> str:
        return f"{row['milliseconds']:.2f} ± {row['spread'] / 2:.2f}"

    few = _record("attention-12-heads")
    for name in ("gpu", "torch", "triton", "flash-attn-4", "date"):
        assert few["environment"][name] in readme
    for group in _groups(few):
        dense, flash, ours = (
            group[what] for what in ("dense SDPA", "FlashAttention-4 sparse", "haste kernel")
        )
        median, low, high = ours["over_flash"]
        cells = [f"{ours['tokens']:,}", f"{ours['density']:.2f}", cell(dense), cell(flash), cell(ours)]
        cells += [f"{ours['tflops']:.0f}", f"{dense['milliseconds'] / ours['milliseconds']:.2f}×"]
        cells += [f"{median:.3f}× [{low:.3f}, {high:.3f}]"]
        assert f"| {' | '.join(cells)} |" in readme
    ratios = [group["haste kernel"]["over_flash"] for group in _groups(_record("attention-40-heads"))]
    medians = [median for median, _, _ in ratios]
    assert f"With 40 heads it is {min(medians):.2f}–{max(medians):.2f}× FlashAttention-4" in readme
    ratios += [group["haste kernel"]["over_flash"] for group in _groups(few)]
    assert "no interval of the sixteen lies below 1" in readme and min(high for *_, high in ratios) >= 1

    all_sides = _groups(_record("attention"))
    flex = [g["FlexAttention"]["milliseconds"] / g["haste kernel"]["milliseconds"] for g in all_sides]
    assert f"the same masks took {min(flex):.2f}–{max(flex):.2f} times as long as our kernel" in readme
    shown = 0
    for group in all_sides:
        for what, row in group.items():
            if what.startswith("refresh_mask_"):
                dense = next(g["dense SDPA"] for g in all_sides if g["dense SDPA"]["tokens"] == row["tokens"])
                share = 100 * row["milliseconds"] / dense["milliseconds"]
                assert f"{cell(row)} ({share:.2f}% of dense)" in readme
                shown += 1
    assert shown == 4


def test_the_readme_gives_the_recorded_forwards() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = 0
    for name, file in (("1.3B 480p", "480p"), ("1.3B 720p", "720p"), ("14B 720p", "14b-720p")):
        path = f"benchmarks/results/forward-{file}-h200.json"
        record = json.loads((ROOT / path).read_text(encoding="utf-8"))
        assert "H200" in record["environment"]["gpu"]
        for row in record["rows"]:
            cells = f"{row['dense_ms']:.0f} | {row['haste_mean_ms']:.0f} | **{row['speedup']:.2f}×**"
            if row["bound"] is not None:
                cells += f", {100 * row['speedup'] / row['bound']:.0f} % of the bound"
            assert f"| {name}, {row['compile']} ([record]({path})) | {cells} |" in readme
            assert 0.25 <= row["density"] < 0.265 and 0.2 <= row["refresh_rate"] < 0.21
            shown += 1
    assert readme.count("/forward-") == shown == 4


def test_the_readme_compares_uneven_rows() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = {
        (row["tokens"], row["mask"]): row
        for row in _record("attention-masks")["rows"]
        if row["what"] == "haste kernel"
    }
    more = [100 * (rows[n, "even"]["tflops"] / rows[n, "uneven"]["tflops"] - 1) for n in (32760, 75600)]
    text = f"a pair costs {-more[0]:.0f} % less at 32,760 tokens and {more[1]:.0f} % more at 75,600"
    assert text in readme
    ratios = ["{:.3f}× [{:.3f}, {:.3f}]".format(*rows[n, "uneven"]["over_flash"]) for n in (32760, 75600)]
    assert "it is {} and {} FlashAttention-4 there".format(*ratios) in readme
