"""The notebook's and the README's benchmark commands are what the scripts take; figures are the records'."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
NOTEBOOK = (ROOT / "docs/speed-notebook.md").read_text(encoding="utf-8")
MODELS = ("1.3B", "14B")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", NOTEBOOK, re.M | re.S) for line in block.splitlines()
] + [" ".join(command.split()) for command in re.findall(r"`(python -m benchmarks[^`]+)`", README)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken(command: str) -> None:
    python, dash_m, module, *arguments = shlex.split(command)
    assert (python, dash_m) == ("python", "-m")
    if module == "pytest":
        paths = [argument for argument in arguments if argument.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    importlib.import_module(module).parse(arguments)


def _record(name: str, gpu: str = "h100") -> dict[str, Any]:
    path = ROOT / f"benchmarks/results/{name}-{gpu}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_attention_meets_flash_attention_as_recorded() -> None:
    def ratios(name: str) -> list[list[float]]:
        return [row["over_flash"] for row in _named(_record(name, "h200")["rows"], "haste kernel")]

    few, many = ratios("attention-12-heads"), ratios("attention-40-heads")
    spans = []
    for found in (few, many):
        medians = [median for median, *_ in found]
        mean = statistics.geometric_mean(medians)
        spans.append(f"{min(medians):.3f}–{max(medians):.3f}×, {mean:.3f}×")
    assert "12 heads {} on average; 40 heads {}; replayed".format(*spans) in NOTEBOOK
    short = [(median, high) for median, _, high in few + many if median < 1]
    assert f"1.0 met in {16 - len(short)} of 16 cases; the intervals of the two others hold 1" in NOTEBOOK
    assert len(few + many) == 16 and len(short) == 2 and all(high >= 1 for _, high in short)


def test_what_today_s_schedule_brought_is_recorded() -> None:
    first, *later = _record("attention-forms", "h200")["runs"]
    last = later[-1]
    assert first["first"] == last["first"] == "before"

    def span(run: dict[str, Any], form: str, over: str, digits: int = 3) -> str:
        found = [case["forms"][form][over][0] for case in run["cases"]]
        return f"{min(found):.{digits}f}–{max(found):.{digits}f}"

    given_back, today = "every thread, K with V", "every thread, K with V, K a block ahead, V after Q·Kᵀ"
    assert f"| {span(first, given_back, 'first_over_it')}× the form before |" in NOTEBOOK
    gain, flash = span(last, today, "first_over_it"), span(last, today, "flash_over_it")
    assert f"{gain}× the form before, {flash}× FlashAttention-4. The default |" in NOTEBOOK
    parts = [
        case["forms"][form]["first_over_it"][0]
        for run in (first, last)
        for case in run["cases"]
        for form in case["forms"]
        if form not in (today, "FlashAttention-4 sparse")
    ]
    assert f"alone or two at a time, brought {100 * (max(parts) - 1):.1f} % at most, or nothing" in NOTEBOOK
    text = " ".join(NOTEBOOK.split())
    registers = [
        case["forms"][f"{form}, queries in registers"]["first_over_it"][0]
        for case in first["cases"]
        for form in ("K with V", given_back)
    ]
    assert f"busy 55 % of the time: {min(registers):.3f}–{max(registers):.3f} of the speed" in text
    behind = "every thread, K and V given back behind the next products"
    waits, trees = f"{given_back}, P·V waited for before the exponentials", f"{given_back}, maxima in a"
    others = later[1]
    assert f"300 cycles later: {span(others, behind, 'first_over_it')}." in text
    assert f"as FlashAttention-4 does: {span(others, waits, 'first_over_it')}." in text
    twos, fours = (span(others, f"{trees} tree of {n}", "first_over_it") for n in ("twos", "fours"))
    assert twos == fours and f"instead of a chain of 31: {twos}, of twos as of fours" in text


def test_the_launches_are_the_recorded_ones() -> None:
    rates: dict[str, list[str]] = {}
    for row in _record("attention-launches", "h200")["rows"]:
        rates.setdefault(row["what"], []).append(f"{row['tflops']:.0f}")
    both = {what: " and ".join(found) for what, found in rates.items()}
    text = " ".join(NOTEBOOK.split())
    assert f"{both['TMA, 8 warps, 2 stages']} TFLOP/s with its choice" in text
    assert f"{both['TMA, 8 warps, 3 stages']} with 3 stages" in text
    assert f"{both['TMA, 4 warps, 2 stages']} with 4 warps" in text
    assert f"{both['pointers, 8 warps, 2 stages']} through pointers" in text


def test_nothing_differed_beside_other_processes() -> None:
    tallies = _record("contention", "h200")["tallies"]
    assert len(tallies) == 12 and all(not tally["differing"] for tally in tallies.values())
    launches = {tally["launches"] for tally in tallies.values()}
    assert f"with 810 and {launches.pop()} launches of each of twelve kernels" in " ".join(NOTEBOOK.split())
    assert not launches


def test_refresh_and_reuse_are_the_recorded_ones() -> None:
    def share(name: str, word: str, tokens: int) -> str:
        rows = [row for row in _record(name, "h200")["rows"] if row["tokens"] == tokens]
        dense = _named(rows, "dense SDPA")[0]["milliseconds"]  # as in the README
        return f"{100 * milliseconds(name, word, tokens) / dense:.2f} %"

    def milliseconds(name: str, word: str, tokens: int) -> float:
        rows = (row for row in _record(name, "h200")["rows"] if row["tokens"] == tokens)
        return next(float(row["milliseconds"]) for row in rows if row["what"].endswith(word))

    replayed, eager, busy = "attention", "attention-eager", "attention-eager-busy"
    few, many = 32760, 75600
    for tokens in (few, many):
        shares = share(replayed, "rebuilds", tokens), share(eager, "rebuilds", tokens)
        assert "| {} replayed; {} from Python | met |".format(*shares) in NOTEBOOK
    reuses = share(replayed, "reuses", few), share(replayed, "reuses", many)
    assert "| {} at 32,760, {} at 75,600, replayed | met |".format(*reuses) in NOTEBOOK
    text, readme = " ".join(NOTEBOOK.split()), " ".join(README.split())
    assert f"it is {milliseconds(replayed, 'reuses', few):.3f} ms" in text
    with_tests = share(busy, "rebuilds", few), share(busy, "rebuilds", many)
    assert f"a refresh {with_tests[0][:-2]} and {with_tests[1]} of dense" in text

    def host_part(name: str) -> list[float]:
        calls = [(word, tokens) for word in ("rebuilds", "reuses") for tokens in (few, many)]
        return [milliseconds(name, *call) - milliseconds(replayed, *call) for call in calls]

    alone = f"{min(host_part(eager)):.1f}–{max(host_part(eager)):.1f} ms a refresh"
    assert f"the host's part of its launches, {alone};" in text
    assert f"takes {alone[:3]} to {alone[4:7]} ms more" in readme
    most = f"up to {max(host_part(busy)):.1f}"
    assert f"{most} ms and a refresh" in text and f"{most} on a host that does other work" in readme


def test_the_tail_s_gains_are_the_recorded_ones() -> None:
    rows = _record("attention-tail", "h200")["rows"]

    def gain(tokens: int, mask: str) -> str:
        without, *ours = (
            next(r["milliseconds"] for r in _named(rows, what) if (r["tokens"], r["mask"]) == (tokens, mask))
            for what in ("haste gluon, no tail", "haste kernel", "haste gluon")  # the last two are one kernel
        )
        return "{:.2f}–{:.2f}×".format(*sorted(without / time for time in ours))

    text = "{} at 75,600 even, {} uneven, {} structured; {}, {}, {} at 32,760"
    found = [gain(tokens, mask) for tokens in (75600, 32760) for mask in ("even", "uneven", "structured")]
    assert text.format(*found) in NOTEBOOK


def test_the_forms_of_attention_are_the_recorded_ones() -> None:
    cases: dict[tuple[int, float], dict[str, float]] = {}
    for row in _record("attention-forms")["rows"]:
        if row["replay"]:
            cases.setdefault((row["tokens"], row["density"]), {})[row["what"]] = row["milliseconds"]
    sums = "gluon, lane sums, no turns"
    lags, exact = f"{sums}, maximum lags", f"{sums}, rescaled where a maximum grew"
    flash, before = "FlashAttention-4 sparse", "gluon, before"

    def gains(form: str, over: str) -> list[float]:
        return [case[over] / case[form] for case in cases.values()]

    def span(form: str, over: str) -> str:
        return f"{min(gains(form, over)):.2f}–{max(gains(form, over)):.2f}×"

    def mean(form: str, over: str) -> str:
        return f"{statistics.geometric_mean(gains(form, over)):.2f}×"

    assert f"| {span('triton', flash)} replayed; what other shapes get on Hopper |" in NOTEBOOK
    assert f"from Python; {span(before, flash)} replayed |" in NOTEBOOK
    assert f"| {span(sums, before)} the form before |" in NOTEBOOK
    assert f"| {mean(lags, sums)} lane sums alone on average; error" in NOTEBOOK
    assert (
        f"| {mean(exact, lags)} the lagging one ({span(exact, lags)}), {mean(exact, sums)} lane sums alone, "
        f"{mean(exact, before)} the form before ({span(exact, before)}). The default |" in NOTEBOOK
    )
    turns = gains(lags, "gluon, lane sums, in turns, maximum lags")
    loss = f"{100 * (min(turns) - 1):.1f}–{100 * (max(turns) - 1):.1f} %"
    assert f"Turns of the two consumers: {loss} slower with a lagging maximum, in all six cases" in NOTEBOOK


def test_the_variants_ranges_are_the_recorded_ones() -> None:
    rates: dict[tuple[str, int], list[float]] = {}
    for row in _record("attention-variants")["rows"]:
        what = "haste gluon" if row["what"] == "haste kernel" else row["what"]  # one kernel, timed twice
        rates.setdefault((what, row["tokens"]), []).append(row["tflops"] or 0.0)

    def span(what: str, tokens: int) -> str:
        return f"{min(rates[what, tokens]):.0f}–{max(rates[what, tokens]):.0f}"

    both = f"{span('haste gluon', 75600)} TFLOP/s at 75,600 tokens, {span('haste gluon', 32760)} at 32,760"
    assert both in NOTEBOOK
    made = "haste triton, descriptors made on the device"
    assert f"| {span(made, 75600)} and {span(made, 32760)}: " in NOTEBOOK


def test_uneven_rows_cost_what_is_recorded() -> None:
    rates: dict[int, dict[str, float]] = {}
    for row in _named(_record("attention-masks", "h200")["rows"], "haste kernel"):
        rates.setdefault(row["tokens"], {})[row["mask"]] = row["tflops"]
    few, many = (100 * (rates[tokens]["even"] / rates[tokens]["uneven"] - 1) for tokens in (32760, 75600))
    assert f"| {few:.1f} % (uneven) at 32,760 tokens, {many:.1f} % at 75,600, density .25 | met |" in NOTEBOOK
    assert max(few, many) <= 5


def test_the_forwards_are_the_recorded_ones() -> None:
    small, whole = _record("forward-480p", "h200")["rows"]
    (large,), (huge,) = (_record(f"forward-{name}", "h200")["rows"] for name in ("720p", "14b-720p"))
    assert [row["compile"] for row in (small, whole, large, huge)] == ["blocks", "whole", "blocks", "blocks"]
    shares = [f"{100 * row['speedup'] / row['bound']:.0f} %" for row in (small, large, whole)]
    text = (
        f"{small['speedup']:.2f}× at 480p, {large['speedup']:.2f}× at 720p: {shares[0]} and {shares[1]} of "
        f"the bound; 480p compiled whole {whole['speedup']:.2f}×, {shares[2]} | met |"
    )
    assert text in NOTEBOOK
    assert f"| ≥ 1.9× | {huge['speedup']:.2f}× | met |" in NOTEBOOK
    assert f"| {huge['state_bytes'] / 1e6:.0f} MB; " in NOTEBOOK
    # Why a forward can pass the bound: 30 sites, 4·N²·D·H products, the time of all kernels of a kind.
    products = 30 * 4 * 75600**2 * 128 * 12 / 1e9
    dense, haste = large["dense_parts"], large["haste_parts"]
    theirs = products / (dense["dense attention"] - haste["dense attention"])
    ours = products * large["density"] / haste["sparse attention"]
    text = " ".join(NOTEBOOK.split())
    assert f"{theirs:.0f} TFLOP/s at 720p; our kernel makes {ours:.0f} of them" in text


def test_svg2_s_goals_are_judged_by_the_record() -> None:
    sites = {
        site: {row["what"]: row for row in rows["0.5"]}
        for site, rows in _record("svg2", "h200")["geometries"].items()
    }
    (dense_rows,) = _record("svg2-density25", "h200")["geometries"].values()
    fuller = {row["what"]: row for row in dense_rows["0.5"]}
    ships, tail, fixed = "svg2 attention, gluon, no tail", "svg2 attention", "fixed blocks, equal density"

    def share(site: str, word: str) -> str:
        rows = sites[site]
        part = rows[f"refresh, every head {word}, replayed"]["milliseconds"]
        return f"{100 * part / rows['dense SDPA']['milliseconds']:.2f} %"

    found = [f"{share(f'{model} 720p', 'rebuilds')}, {share(f'{model} 720p', 'reuses')}" for model in MODELS]
    assert f"| 1.3B {found[0]}; 14B {found[1]} | met |" in NOTEBOOK

    def ratio(rows: dict[str, dict[str, float]]) -> str:
        return f"{rows[ships]['tflops'] / rows[fixed]['tflops']:.2f}"

    ratios = [ratio(rows) for rows in (fuller, sites["1.3B 720p"], sites["14B 720p"])]
    schedules = _record("svg2-schedules", "h200")["rows"]
    rates_now = [row["tflops"] for row in schedules]
    now = [f"{rate['ships'] / rate['fixed blocks, equal density']:.2f}" for rate in rates_now]
    assert [row["heads"] for row in schedules] == [12, 12, 40, 12] and schedules[1]["density"] > 0.25
    today = f"in another run, of today's fixed blocks, {now[1]}, {now[0]} and {now[2]}"
    assert "| {} at .26; {} at .15, with 40 heads {}; {} | missed |".format(*ratios, today) in NOTEBOOK
    tried = [row["tried_over_ships"][0] for row in schedules]
    assert f"| {min(tried):.2f}–{max(tried):.2f} of the speed, and wrong" in NOTEBOOK
    fixed_now = [rate["fixed blocks, equal density"] for rate in rates_now]
    assert f"today's: {min(fixed_now):.0f}–{max(fixed_now):.0f} TFLOP/s" in NOTEBOOK
    rates = [
        f"{rows[tail]['tflops']:.0f} instead of {rows[ships]['tflops']:.0f}"
        for rows in (sites[f"{model} {size}"] for size in ("720p", "480p") for model in MODELS)
    ]
    text = "{} TFLOP/s at 1.3B 720p, {} at 14B 720p, {} and {} at 480p: taken out".format(*rates)
    assert text in NOTEBOOK


def _named(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] == what]


def test_compile_times_are_the_recorded_ones() -> None:
    record = json.loads((ROOT / "benchmarks/results/compile-time-cpu.json").read_text(encoding="utf-8"))
    whole, blocks = record["rows"]
    text, readme = " ".join(NOTEBOOK.split()), " ".join(README.split())
    assert record["environment"]["torch"] in text
    alone, twice, now = (
        _record(name, "h200")["rows"]
        for name in ("compile-time-one-process", "compile-time-twice", "compile-time")
    )
    assert [row["compile"] for row in now] == ["whole", "blocks", "blocks"]
    walls = [f"{row['wall_ratio']:.2f}×" for row in now]
    ratios = [f"{row['cpu_ratio']:.2f}×" for row in (*alone, whole, blocks)]
    goal = (
        "H200, wall time: whole {}, blocks {} and, in another run, {}; all in one process, CPU seconds: "
        "{} and {}. CPU: {} and {} | met |"
    )
    assert goal.format(*walls, *ratios) in text
    seconds = [
        f"{row['dense_cpu_s']:.1f} dense and {row['haste_cpu_s']:.1f} haste" for row in (whole, alone[0])
    ]
    assert f"whole model {seconds[0]}" in text and f"whole model {seconds[1]}, {ratios[0]}" in text
    before = alone[1]
    assert (
        f"blocks {before['dense_cpu_s']:.1f} and {before['haste_cpu_s']:.1f}, {ratios[1]}; in wall time "
        f"{before['dense_wall_s']:.1f} and {before['haste_wall_s']:.1f}" in text
    )
    pairs = [
        f"{row['wall_ratio']:.2f}×, {row['dense_wall_s']:.1f} and {row['haste_wall_s']:.1f}" for row in twice
    ]
    assert (
        f"on an H200 blocks {pairs[1]} s, and whole {pairs[0][:5]} (one round) of dense's wall time" in text
    )
    pairs = [
        f"{row['wall_ratio']:.2f}×, {row['dense_wall_s']:.1f} and {row['haste_wall_s']:.1f}" for row in now
    ]
    assert f"whole {walls[0]}, blocks {pairs[1]} s, and in another run {pairs[2]} s. The default" in text
    haste, dense = ([f"{row[f'{side}_wall_s']:.1f}" for row in now] for side in ("haste", "dense"))
    pairs = [f"({mine} instead of {theirs} s" for mine, theirs in zip(haste[:2], dense[:2], strict=True)]
    assert haste[2] == dense[2]
    assert (
        f"{walls[0]} as long as dense `torch.compile` for the whole model {pairs[0]}, two rounds)" in readme
    )
    assert (
        f"block by block {walls[1]} {pairs[1]}) in one run and {walls[2]} ({dense[2]} s both) in another"
        in readme
    )
    assert [len(row["wall_s"]["haste"]) for row in now] == [2, 5, 5] and "of five rounds each" in readme
    spread = sorted(seconds for row in now[1:] for seconds in row["wall_s"]["dense"])
    assert f"dense times lie between {spread[0]:.1f} and {spread[-1]:.1f} s" in readme
    assert max(row["wall_ratio"] for row in now) <= 1.15
    assert round(before["haste_cpu_s"] - before["dense_cpu_s"]) == 9 and "they add nine seconds" in readme
    assert f"blocks {blocks['dense_cpu_s']:.1f} and {blocks['haste_cpu_s']:.1f}" in text
    assert f"Wall time: {whole['wall_ratio']:.2f}× and {blocks['wall_ratio']:.2f}×" in text
    assert max(whole["cpu_ratio"], blocks["cpu_ratio"]) <= 1.15


def test_compile_times_are_summarised_by_medians() -> None:
    compile_time = importlib.import_module("benchmarks.compile_time")
    times = {
        "dense": [{"cpu": 10.0, "wall": 5.0}, {"cpu": 20.0, "wall": 9.0}, {"cpu": 12.0, "wall": 4.0}],
        "haste": [{"cpu": 15.0, "wall": 6.0}, {"cpu": 9.0, "wall": 6.0}, {"cpu": 99.0, "wall": 7.0}],
    }
    row = compile_time.summarise("whole", times)
    assert (row["dense_cpu_s"], row["haste_cpu_s"], row["cpu_ratio"]) == (12.0, 15.0, 1.25)
    assert (row["dense_wall_s"], row["haste_wall_s"], row["wall_ratio"]) == (5.0, 6.0, 1.2)


def test_what_clusters_cost_is_what_was_recorded() -> None:
    parts = _record("svg2-parts")
    rows = {row["what"]: row for row in _record("svg2-720p")["geometries"]["1.3B 720p"]["0.5"]}
    later = {row["what"]: row for row in _record("svg2-density25")["geometries"]["1.3B 720p"]["0.5"]}
    time = {what: row["milliseconds"] for what, row in rows.items()}
    dense = time["dense SDPA"]
    rebuild, reuse = (time[f"refresh, every head {word}, replayed"] for word in ("rebuilds", "reuses"))
    shares = f"{100 * rebuild / dense:.1f} %", f"{100 * reuse / dense:.2f} %"
    assert f"a rebuild {rebuild:.2f} ms replayed, {shares[0]} of dense, and" in NOTEBOOK
    assert f"and {time['refresh, every head rebuilds']:.2f} from Python" in NOTEBOOK
    assert f"a reuse {reuse:.2f} ms replayed, {shares[1]} |" in NOTEBOOK
    assert (
        f"2 iterations {time['cluster, 2 iterations']:.2f} ms ({time['cluster, 1 program']:.2f} with one "
        f"program a multiprocessor), 50 iterations {time['cluster, 50 iterations']:.1f} ms" in NOTEBOOK
    )
    assert f"| {time['map']:.2f} ms from Python" in NOTEBOOK

    def rate(found: dict[str, Any], form: str) -> float:
        return float(found[f"svg2 attention, gluon{form}"]["tflops"])

    fixed, fixed_later = (found["fixed blocks, equal density"]["tflops"] for found in (rows, later))
    plain, copied, large = (rate(later, form) for form in ("", ", lists copied", ", 1 GB of lists"))
    assert f"{100 * plain / fixed_later:.0f} % ({plain:.0f} of {fixed_later:.0f} TFLOP/s)" in NOTEBOOK
    assert f"| {plain:.0f} instead of {copied:.0f} |" in NOTEBOOK
    assert f"{100 * large / fixed_later:.0f} % ({large:.0f}); with" in NOTEBOOK
    turns, little, none = (rate(rows, form) for form in ("", ", 256 MB of lists", ", no turns"))
    assert f"at .15, {turns:.0f} instead of {little:.0f} |" in NOTEBOOK
    share = f"{100 * none / fixed:.0f} % ({none:.0f} of {fixed:.0f})"
    assert f"{share} instead of {100 * turns / fixed:.0f} % ({turns:.0f})" in NOTEBOOK
    assert (
        f"{parts['reuse_ms']['call']:.2f} ms with Python's part, {parts['reuse_ms']['replayed']:.2f} as"
        in NOTEBOOK
    )
    before = parts["kmeans"]["1 program, unfolded"]
    longest = {name: most for name, _, most in before["phases"]}
    assert f"assign {longest['assign'] / 1000:.2f} ms, place {longest['place'] / 1000:.2f}" in NOTEBOOK
    assert f"update {longest['update'] / 1000:.2f}" in NOTEBOOK
    assert f"| {before['iteration_ms']} ms |" in NOTEBOOK
    folded = parts["kmeans"]["2 programs of 8 warps"]
    assert f"{folded['phases'][1][2] / 1000:.2f} ms; an iteration {folded['iteration_ms']:.2f} ms" in NOTEBOOK
    alone = {name: tflops for name, (_, tflops) in parts["attention"].items()}
    assert f"alone does {alone['real']} TFLOP/s" in NOTEBOOK
    assert f"{alone['full tiles, real keys']} where all row tiles are full" in NOTEBOOK
    lists = parts["refresh"]["attention"]["key_lists_kernel"] / 1000
    share = f"{100 * 1000 * lists / sum(parts['refresh']['attention'].values()):.0f} % of"
    assert f"| {lists:.1f} ms, {share}" in NOTEBOOK
