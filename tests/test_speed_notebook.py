"""The notebook's commands are ones that the scripts take, and its figures those of the record."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
NOTEBOOK = (ROOT / "docs/speed-notebook.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"^```sh\n(.*?)^```", NOTEBOOK, re.M | re.S) for line in block.splitlines()
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken(command: str) -> None:
    python, dash_m, module, *arguments = shlex.split(command)
    assert (python, dash_m) == ("python", "-m")
    if module == "pytest":
        paths = [argument for argument in arguments if argument.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    importlib.import_module(module).parse(arguments)


def test_refresh_and_reuse_are_the_recorded_ones() -> None:
    record = json.loads((ROOT / "benchmarks/results/attention-h100.json").read_text(encoding="utf-8"))
    share: dict[tuple[str, int], float] = {}
    for tokens in (32760, 75600):
        rows = [row for row in record["rows"] if row["tokens"] == tokens]
        dense = [row["milliseconds"] for row in rows if row["what"] == "dense SDPA"]
        for word in ("rebuilds", "reuses"):
            row = next(row for row in rows if row["what"].endswith(word))
            share[word, tokens] = 100 * row["milliseconds"] / dense[0]  # as in the README
    assert f"| {share['rebuilds', 32760]:.1f} %, {share['rebuilds', 75600]:.1f} % |" in NOTEBOOK
    reuse = f"{share['reuses', 32760]:.1f} % at 32,760, {share['reuses', 75600]:.1f} % at 75,600"
    assert reuse in NOTEBOOK


def test_the_share_of_flash_attention_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks/results/attention-h100.json").read_text(encoding="utf-8"))
    for tokens, text in ((32760, "at 32,760 tokens"), (75600, "at 75,600")):
        rows = [row for row in record["rows"] if row["tokens"] == tokens]
        pairs = zip(_named(rows, "haste kernel"), _named(rows, "FlashAttention-4 sparse"), strict=True)
        shares = [ours["tflops"] / flash["tflops"] for ours, flash in pairs]
        assert f"{min(shares):.2f}–{max(shares):.2f}× {text}" in NOTEBOOK


def test_the_variants_ranges_are_the_recorded_ones() -> None:
    record = json.loads(
        (ROOT / "benchmarks/results/attention-variants-h100.json").read_text(encoding="utf-8")
    )
    rates: dict[tuple[str, int], list[float]] = {}
    for row in record["rows"]:
        what = "haste gluon" if row["what"] == "haste kernel" else row["what"]  # one kernel, timed twice
        rates.setdefault((what, row["tokens"]), []).append(row["tflops"] or 0.0)

    def span(what: str, tokens: int) -> str:
        return f"{min(rates[what, tokens]):.0f}–{max(rates[what, tokens]):.0f}"

    assert f"{span('haste gluon', 75600)} TFLOP/s at 75,600 tokens" in NOTEBOOK
    assert f"{span('haste gluon', 32760)} at 32,760" in NOTEBOOK
    for what in ("gluon, no turns", "gluon, 3 stages", "triton, descriptors made on the device"):
        assert f"| {span(f'haste {what}', 75600)} and {span(f'haste {what}', 32760)}: " in NOTEBOOK
    for tokens, text in ((75600, "1.11–1.18×"), (32760, "1.09–1.16×")):
        ours = [row for row in record["rows"] if row["tokens"] == tokens]
        ratios = []
        for name in ("haste kernel", "haste gluon"):
            pairs = zip(_named(ours, name), _named(ours, "haste triton"), strict=True)
            ratios += [new["tflops"] / old["tflops"] for new, old in pairs]
        assert f"{min(ratios):.2f}–{max(ratios):.2f}×" == text and text in NOTEBOOK


def test_uneven_rows_cost_what_is_recorded() -> None:
    even, uneven = (
        json.loads((ROOT / f"benchmarks/results/attention-{name}-h100.json").read_text(encoding="utf-8"))
        for name in ("variants", "masks")
    )

    def rate(record: dict[str, Any], mask: str, tokens: int, density: float) -> float:
        return next(
            row["tflops"]
            for row in _named(record["rows"], "haste kernel")
            if (row["mask"], row["tokens"]) == (mask, tokens) and abs(row["density"] - density) < 0.01
        )

    def loss(tokens: int, density: float) -> float:
        return 100 * (rate(even, "even", tokens, density) / rate(uneven, "uneven", tokens, density) - 1)

    assert (
        f"{loss(75600, 0.25):.1f} % at 75,600 tokens and density .25, {loss(75600, 0.5):.1f} % at .5"
        in NOTEBOOK
    )
    assert f"{loss(32760, 0.25):.1f} % and none at 32,760" in NOTEBOOK and loss(32760, 0.5) < 0


def test_the_forward_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks/results/forward-480p-h100.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    text = f"{row['speedup']:.2f}× at 480p, {100 * row['speedup'] / row['bound']:.0f} % of the bound"
    assert text in NOTEBOOK


def _named(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] == what]


def test_compile_times_are_the_recorded_ones() -> None:
    record = json.loads((ROOT / "benchmarks/results/compile-time-cpu.json").read_text(encoding="utf-8"))
    whole, blocks = record["rows"]
    text = " ".join(NOTEBOOK.split())
    assert record["environment"]["torch"] in text
    assert f"CPU: {whole['cpu_ratio']:.2f}× whole, {blocks['cpu_ratio']:.2f}× blocks" in text
    assert f"whole model {whole['dense_cpu_s']:.1f} dense and {whole['haste_cpu_s']:.1f} haste" in text
    assert f"blocks {blocks['dense_cpu_s']:.1f} and {blocks['haste_cpu_s']:.1f}" in text
    assert f"Wall time, {whole['wall_ratio']:.2f}× and {blocks['wall_ratio']:.2f}×" in text
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
    results = ROOT / "benchmarks/results"
    timed = json.loads((results / "svg2-720p-h100.json").read_text(encoding="utf-8"))
    parts = json.loads((results / "svg2-parts-h100.json").read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in timed["geometries"]["1.3B 720p"]["0.5"]}
    dense = rows["dense SDPA"]["milliseconds"]
    rebuild, reuse = (rows[f"refresh, every head {word}"]["milliseconds"] for word in ("rebuilds", "reuses"))
    assert f"a rebuild {rebuild:.1f} ms, {100 * rebuild / dense:.1f} % of dense" in NOTEBOOK
    replayed = parts["reuse_ms"]["replayed"]
    assert f"{reuse:.2f} ms with Python's part, {replayed:.2f} as a graph" in NOTEBOOK
    assert f"{100 * reuse / dense:.1f} % and {100 * replayed / dense:.2f} % of dense" in NOTEBOOK
    rates = [rows[f"svg2 attention{form}"]["tflops"] for form in ("", ", gluon", ", gluon, 1 GB of lists")]
    fixed = rows["fixed blocks, equal density"]["tflops"]
    shares = [f"{100 * rate / fixed:.0f}" for rate in rates]
    assert f"{shares[0]}–{shares[1]} % ({rates[0]:.0f}–{rates[1]:.0f} of {fixed:.0f} TFLOP/s)" in NOTEBOOK
    assert f"| {shares[2]} % ({rates[2]:.0f}) |" in NOTEBOOK
    before = parts["kmeans"]["1 program, unfolded"]
    longest = {name: most for name, _, most in before["phases"]}
    assert f"assign {longest['assign'] / 1000:.2f} ms, place {longest['place'] / 1000:.2f}" in NOTEBOOK
    assert (
        f"update {longest['update'] / 1000:.2f}" in NOTEBOOK and f"{before['iteration_ms']} ms;" in NOTEBOOK
    )
    folded = parts["kmeans"]["2 programs of 8 warps"]
    assert f"{folded['phases'][1][2] / 1000:.2f} ms; an iteration {folded['iteration_ms']:.2f} ms" in NOTEBOOK
    rate = {name: tflops for name, (_, tflops) in parts["attention"].items()}
    assert f"alone does {rate['real']} TFLOP/s" in NOTEBOOK
    assert f"{rate['full tiles, real keys']} where all row tiles are full" in NOTEBOOK
    lists = parts["refresh"]["attention"]["key_lists_kernel"] / 1000
    assert (
        f"| {lists:.1f} ms, {100 * 1000 * lists / sum(parts['refresh']['attention'].values()):.0f} % of"
        in NOTEBOOK
    )
