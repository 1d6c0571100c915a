"""The list of passes, HASTE_DUMP, and that the graph handed in stays as it was."""

from __future__ import annotations

import pytest
import torch
from graph_capture import SMALL, Rewriting, capture, rewrite, tokens, toy

from haste_compile.errors import OutputPathError
from haste_compile.passes import PASSES
from haste_compile.passes.dump import VARIABLE

ORDER = [
    "find_attention_sites",
    "check_eligibility",
    "permute_tokens",
    "rewrite_self_attention",
    "bind_state",
    "remove_dead_nodes",
    "verify_graph",
]


def test_the_passes_and_their_order():
    assert [run.__name__ for run in PASSES] == ORDER


def test_dump_holds_the_graph_before_and_after_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new"))
    rewrite(capture(toy({}), tokens()))
    folder = tmp_path / "new" / "graph_000"
    steps = [f"{i:02}_{name}.{when}.txt" for i, name in enumerate(ORDER, 1) for when in ("before", "after")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["00_input.txt", *steps])
    read = {path.name: path.read_text() for path in folder.iterdir()}
    assert read["00_input.txt"] == read["02_check_eligibility.after.txt"]
    assert "unbound_state(0, 'mask')" in read["04_rewrite_self_attention.after.txt"]
    dense = "scaled_dot_product_attention(q, k, v);"
    assert dense in read["06_remove_dead_nodes.before.txt"]
    last = read["07_verify_graph.after.txt"]
    assert dense not in last
    assert 'haste_0_mask: "i32[4, 1, 2, 4, 1]' in last


def test_each_graph_gets_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for _ in range(2):
        rewrite(capture(toy({}), tokens()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_000", "graph_001"]


def test_a_dump_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv(VARIABLE, str(bad))
        gm = capture(toy({}), tokens())
        before = gm.code
        with pytest.raises(OutputPathError, match=f"{VARIABLE}.*found .*file"):
            rewrite(gm)
        assert gm.code == before


def test_dynamos_own_graph_is_not_edited():
    seen = []
    rewriting = Rewriting(SMALL)

    def backend(gm, inputs):
        before = gm.print_readable(print_output=False)
        run = rewriting(gm, inputs)
        seen.append((before, gm.print_readable(print_output=False)))
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(toy({}), backend=backend)(tokens())
    ((before, after),) = seen
    assert before == after and "scaled_dot_product_attention" in after
    assert len(rewriting.contexts[0].rewritten) == 1
