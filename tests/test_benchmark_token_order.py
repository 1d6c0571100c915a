"""The benchmark of token orders on the tiny random pipeline, and the record of nano-wan in the docs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
import torch.nn.functional as F

from benchmarks import token_order as benchmark
from haste_compile.config import TOKEN_ORDERS, HasteConfig

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "token-order-nano-wan.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("orders")
    model = tiny_wan.save_pipeline(folder / "model")
    torch._dynamo.reset()
    arguments = ["--model", model, "--prompt", "a red circle", "--steps", 2, "--at", 1, "--top-p", 0.6, 1.0]
    size = ["--height", 128, "--width", 128, "--frames", 17]
    options = ["-o", "block_size=64", "-o", "min_tokens=64", "-o", "stride=8"]
    benchmark.main([*map(str, [*arguments, *size, *options, "--json", folder / "report.json"])])
    return json.loads((folder / "report.json").read_text())


def test_every_setting_has_a_row(report: dict[str, Any]) -> None:
    assert report["grid"] == [5, 8, 8] and report["calls"] == 1
    assert len(report["rows"]) == 3 * 3 * 2
    for row in report["rows"]:
        if row["top_p"] == 1.0:
            assert row["density"] == 1.0 and row["error"] < 1e-5, "full masks are dense in every order"
        else:
            assert 0.2 < row["density"] < 0.95 and row["error"] > 1e-3


def test_the_backend_computes_what_the_sites_do(report: dict[str, Any]) -> None:
    """The first layer's masks are the same both ways; the second sees other inputs, so only nearly."""
    found = {(r["kind"], r["order"]): r["density"] for r in report["rows"] if r["top_p"] == 0.6}
    for order in TOKEN_ORDERS:
        assert found["velocity", order] == pytest.approx(found["attention", order], abs=0.05)


def test_exact_mass_is_the_softmax() -> None:
    q, k = torch.randn(2, 1, 2, 150, 64, generator=torch.Generator().manual_seed(0)).unbind()
    mass = benchmark.exact_mass(q, k, 64)
    whole = torch.softmax(q @ k.transpose(2, 3) / 8, -1)
    assert mass.shape == (1, 2, 3, 3)
    torch.testing.assert_close(mass[0, 1, 2, 0], whole[0, 1, 128:, :64].sum())
    torch.testing.assert_close(mass.sum(3), torch.tensor([64.0, 64.0, 22.0]).expand(1, 2, 3))


def test_density_at_equal_error() -> None:
    """A curve that reaches every error with 0.8 of the density has a ratio of 0.8 throughout."""
    errors = (0.4, 0.2, 0.1, 0.05)
    rows = [benchmark.Row("exact", "raster", 1 - e, 0.5 - e, e) for e in errors]
    rows += [benchmark.Row("exact", "tile3d", 1 - e, 0.8 * (0.5 - e), e) for e in errors]
    found = list(benchmark.at_equal_error(rows))
    assert [f["error"] for f in found] == list(errors)
    assert all(math.isclose(f["ratio"], 0.8) for f in found)
    far = benchmark.Row("exact", "raster", 0.1, 0.1, 0.9)
    assert len(list(benchmark.at_equal_error([*rows, far]))) == 4, "nothing is extrapolated"


def test_only_self_attention_is_recorded() -> None:
    q, k = torch.randn(1, 2, 10, 64), torch.randn(1, 2, 7, 64)
    with benchmark.SelfAttention() as recorder:
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, k, k)
    ((kept, _, _, _),) = recorder.sites
    assert kept is q


def test_the_documentation_shows_the_record() -> None:
    record = json.loads(RECORD.read_text())
    text = (ROOT / "docs" / "predictors.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\d\.\d\d) \|(.+)\|$", text, re.M)
    assert table
    for kind, top_p, cells in table:
        wanted = []
        for order in TOKEN_ORDERS:
            (row,) = (
                r
                for r in record["rows"]
                if (r["kind"], r["order"]) == (kind, order) and r["top_p"] == float(top_p)
            )
            wanted.append(f"{row['density']:.3f} / {row['error']:.3f}")
        assert [cell.strip() for cell in cells.split("|")] == wanted
    assert len(table) == len(record["rows"]) / len(TOKEN_ORDERS)
    for kind, order in (
        ("attention", "tile3d"),
        ("attention", "hilbert"),
        ("velocity", "tile3d"),
        ("exact", "tile3d"),
    ):
        ratios = [r["ratio"] for r in record["at_equal_error"] if (r["kind"], r["order"]) == (kind, order)]
        assert f"{min(ratios):.2f} to {max(ratios):.2f}" in text
    assert HasteConfig().token_order == "raster"  # the best by these figures
