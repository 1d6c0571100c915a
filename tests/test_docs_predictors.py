"""docs/predictors.md: its tables are whole, its links and commands lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

from haste_compile.config import HasteConfig
from haste_compile.predictors import PREDICTORS

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs/predictors.md").read_text(encoding="utf-8")

#: Every command, and the test that runs it.
RUN_ELSEWHERE = {
    "haste demo --predictor svg2": "tests/test_demo.py, on the tiny pipeline",
    "timeout 240 python -m benchmarks.svg2 --quick": "tests/test_benchmark_svg2.py, but for the timing",
    "python -m benchmarks.hosts --seeds 0 --frames 17 --steps 8 -o dense_steps=1 "
    "--top-p 0.8 0.9 0.97 0.99 --deltas --json hosts.json": "tests/test_benchmark_hosts.py, in the small",
    'python -m benchmarks.svg2 --geometry "1.3B 720p" "14B 720p" "1.3B 480p" "14B 480p" --top-p 0.5 '
    "--json svg2.json": "the same",
    "python -m benchmarks.token_order --json benchmarks/results/token-order-nano-wan.json": (
        "tests/test_benchmark_token_order.py, on the tiny pipeline"
    ),
}


def test_every_predictor_stands_in_the_table_with_its_delta() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`.* \| (\d+) \|$", DOC, re.M))
    assert rows == {name: f"{HasteConfig.from_options({'predictor': name}).delta:g}" for name in PREDICTORS}


def test_every_kernel_of_the_table_exists() -> None:
    kernels = re.findall(r"^\| \[`(\w+)`\]\((.+?)\)", DOC, re.M)
    assert [name for name, _ in kernels] == [
        "kmeans",
        "cluster_order",
        "cluster_map",
        "variable_block_attention",
    ]
    links = re.findall(r"\]\(([^)]+)\)", DOC)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_commands_are_those_that_tests_run() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", DOC, re.M | re.S)
    commands = [line for block in blocks for line in block.splitlines()]
    pytest_command = next(command for command in commands if "pytest" in command)
    assert set(commands) - {pytest_command} == set(RUN_ELSEWHERE)
    files = [word for word in pytest_command.split() if word.startswith("tests/")]
    assert len(files) == 5
    for file in files:
        assert "@pytest.mark.gpu" in (ROOT / file).read_text(encoding="utf-8"), file


def test_clusters_and_memory_are_as_stated() -> None:
    svg2, config = PREDICTORS["svg2"], HasteConfig(predictor="svg2")
    assert svg2.blocks(2304, config) == (144, 288) and "get 144 and 288" in DOC
    shape, dtype = svg2.state(2304, 64, config)["order"]
    assert shape == (2, 2304) and 2 * dtype.itemsize == 8 and "takes 8·N bytes" in DOC


def test_the_costs_on_a_gpu_are_the_recorded_ones() -> None:
    def read(name: str) -> dict[str, dict[str, dict[str, float]]]:
        record = json.loads((ROOT / f"benchmarks/results/{name}-h200.json").read_text(encoding="utf-8"))
        sites = record["geometries"].items()
        return {site: {row["what"]: row for row in rows["0.5"]} for site, rows in sites}

    ships, fixed = "svg2 attention, gluon, no tail", "fixed blocks, equal density"
    sites = read("svg2")
    assert len(sites) == 4
    for site, rows in sites.items():
        time = {what: row["milliseconds"] for what, row in rows.items()}
        shares = {what: 100 * ms / time["dense SDPA"] for what, ms in time.items()}
        refreshes = [f"refresh, every head {word}" for word in ("rebuilds", "reuses")]
        if "720p" in site:
            assert shares[f"{refreshes[0]}, replayed"] <= 6 and shares[f"{refreshes[1]}, replayed"] <= 1
        two, fifty = (time[f"cluster, {count} iterations"] for count in (2, 50))
        rate = rows[ships]["tflops"]
        cells = [
            site,
            f"{time['dense SDPA']:.1f}",
            *(f"{shares[f'{what}, replayed']:.2f} % ({shares[what]:.2f} %)" for what in refreshes),
            f"{two:.2f}; {fifty:.1f}",
            f"{time['order']:.2f}",
            f"{time['map']:.2f}",
            f"{time[ships]:.2f}",
            f"{rate / rows[fixed]['tflops']:.2f} ({rate:.0f} TFLOP/s, density {rows[ships]['density']:.3f})",
        ]
        assert f"| {' | '.join(cells)} |" in DOC
    (rows,) = read("svg2-density25").values()
    ours, theirs = rows[ships], rows[fixed]["tflops"]
    share = f"{ours['tflops'] / theirs:.2f} at {ours['density']:.3f}"
    text = f"{share}, {ours['tflops']:.0f} of {theirs:.0f} TFLOP/s"
    assert text in " ".join(DOC.split())
    record = json.loads((ROOT / "benchmarks/results/svg2-schedules-h200.json").read_text(encoding="utf-8"))
    rates = [row["tflops"] for row in record["rows"][:3]]
    sparse, fuller, many = (f"{r['ships'] / r['fixed blocks, equal density']:.2f}" for r in rates)
    assert sparse == fuller
    text = f"{sparse} of their rate at 1.3B 720p, at both densities, {many} at 14B 720p"
    assert text in " ".join(DOC.split())


def test_the_comparison_on_nano_wan_is_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/hosts-cpu.json").read_text(encoding="utf-8"))
    assert list(recorded["rows"]) == ["never"] and set(recorded["rows"]["never"]) == set(PREDICTORS)
    for host, rows in recorded["rows"]["never"].items():
        for row in rows:
            cells = f"| `{host}` | {row['top_p']:g} | {row['density']:.3f} | {row['psnr_mean']:.2f} |"
            assert cells in DOC
    points = recorded["at_equal_density"]["never"]
    assert points
    for point in points:
        cells = f"| {point['density']:.3f} | {point['xattention']:.2f} | {point['svg2']:.2f} |"
        assert cells in DOC
    assert f"{recorded['size']['frames']} frames and {recorded['steps']} steps" in DOC
    assert recorded["options"]["svg2"]["dense_steps"] == 1
