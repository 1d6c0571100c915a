"""The report on a graph, as a table and as plain data."""

from __future__ import annotations

import json

from graph_capture import capture, rewrite, tokens, toy

from haste_compile.report import GraphReport

TABLE = """\
3 attention sites: 1 rewritten, 2 skipped
site      status     shape       dtype    device  reason
blocks.0  rewritten  1×2×200×64  float32  cpu
blocks.1  skipped    1×2×200×64  float32  cpu     cross-attention (200 queries, 30 keys)
blocks.2  skipped    1×2×200×64  float32  cpu     causal attention"""


def report() -> GraphReport:
    model = toy({}, {"context": True}, {"is_causal": True})
    return GraphReport.from_context(rewrite(capture(model, tokens(), tokens(30))))


def test_table():
    assert str(report()) == TABLE


def test_plain_data():
    data = json.loads(json.dumps(report().to_dict()))
    assert (data["sites_rewritten"], data["sites_skipped"]) == (1, 2)
    assert data["sites"][1] == {
        "name": "blocks.1",
        "kind": "cross",
        "status": "skipped",
        "reason": "cross-attention (200 queries, 30 keys)",
        "shape": [1, 2, 200, 64],
        "dtype": "float32",
        "device": "cpu",
    }
