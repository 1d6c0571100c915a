"""The rewritten graph: what stands in it, and that it computes what dense attention computes."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
import torch.nn.functional as F
from graph_capture import SMALL, Rewriting, capture, export, rewrite, tokens, toy
from tiny_wan import build_transformer, transformer_inputs

from haste_compile import _torch
from haste_compile.config import HasteConfig
from haste_compile.errors import GraphContractError
from haste_compile.kernels.layout import Counter
from haste_compile.passes.rewrite_self_attention import unbound_state
from haste_compile.predictors.xattention import ATTENTION, REFRESH

aten = torch.ops.aten

REBUILT_ONCE = [[1, 1], [1, 1]]  # REFRESHES of 2 sites × 2 heads


def refreshes(rewriting: Rewriting) -> list[list[int]]:
    return [counters[0, 0, :, Counter.REFRESHES].tolist() for counters in rewriting.counters()]


@pytest.mark.parametrize("dialect", ["dynamo", "export"])
def test_ops_take_the_site_and_the_options(dialect):
    config = HasteConfig(
        block_size=64, stride=8, min_tokens=0, reuse="interval:3", max_age=5, gate=(0.2, 0.7),
        relative_drift=True,
    )  # fmt: skip
    gm = (capture if dialect == "dynamo" else export)(toy({"scale": 0.25}), tokens())
    ctx = rewrite(gm, config, dialect)
    (site,) = ctx.rewritten
    refresh, attention, out = site.inserted
    (ctl,) = [n for n in gm.graph.nodes if n.name == "haste_ctl"]
    state = {
        n.name.removeprefix("haste_0_"): n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")
    }
    assert refresh.target is REFRESH and attention.target is ATTENTION and out.target is operator.getitem
    assert refresh.args == (
        site.q, site.k, state["top_p"], state["delta"], ctl,
        state["mask"], state["anchors"], state["counters"],
    )  # fmt: skip
    assert refresh.kwargs == {
        "block": 64, "stride": 8, "reuse": "interval", "interval": 3, "max_age": 5, "gate_low": 0.2,
        "gate_high": 0.7, "relative": True,
    }  # fmt: skip
    assert attention.args == (site.q, site.k, site.v, state["mask"], ctl)
    assert attention.kwargs == {"block": 64, "scale": 0.25}


def test_the_attention_node_is_replaced_by_three_nodes():
    gm = capture(toy({}), tokens())
    before = [n.name for n in gm.graph.nodes if n.op != "placeholder"]
    rewrite(gm)
    after = [n.name for n in gm.graph.nodes if n.op != "placeholder"]
    at = before.index("out")
    assert after == before[:at] + ["haste_0_refresh", "haste_0_attention", "haste_0_out"] + before[at + 1 :]


def test_new_nodes_keep_the_owner_of_the_old_one():
    gm = capture(build_transformer(), **transformer_inputs())
    (first, _) = rewrite(gm).rewritten
    assert all(n.meta["nn_module_stack"] == first.node.meta["nn_module_stack"] for n in first.inserted)


def test_output_gets_back_the_layout_that_its_users_were_traced_with():
    model, x = toy({}), tokens(batch=2)
    gm = capture(model, x)
    (node,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    old = _torch.fake_value(node)
    # What CUDA's math backend does: the answer is contiguous though the queries are not.
    _torch.set_fake_value(node, _torch.empty_fake(old, tuple(old.shape), old.dtype), "dynamo")
    ctx = rewrite(gm)
    (site,) = ctx.rewritten
    assert [n.target for n in site.inserted[3:]] == [
        aten.permute.default,
        aten.clone.default,
        aten.permute.default,
    ]
    assert _torch.fake_value(site.out).is_contiguous()
    assert not old.is_contiguous()
    assert site.expected.stride() == _torch.fake_value(site.out).stride()


def test_output_in_the_layout_of_the_queries_is_not_copied():
    gm = capture(build_transformer(), **transformer_inputs())
    assert [len(site.inserted) for site in rewrite(gm).rewritten] == [3, 3]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_full_masks_equal_dense_attention_on_wan(inner):
    transformer, inputs = build_transformer(), transformer_inputs()
    rewriting = Rewriting(SMALL, inner)
    torch._dynamo.reset()
    compiled = torch.compile(transformer, backend=rewriting, fullgraph=True)
    with torch.no_grad():
        dense = transformer(**inputs)[0]
        torch.testing.assert_close(compiled(**inputs)[0], dense, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(**inputs)[0], dense, rtol=1e-4, atol=1e-5)
    assert refreshes(rewriting) == REBUILT_ONCE  # the second call reused the masks: state is mutated in place


def test_sparse_masks_change_the_output():
    transformer, inputs = build_transformer(), transformer_inputs()
    rewriting = Rewriting(dataclasses.replace(SMALL, top_p=0.3))
    torch._dynamo.reset()
    with torch.no_grad():
        sparse = torch.compile(transformer, backend=rewriting)(**inputs)[0]
        dense = transformer(**inputs)[0]
    kept = rewriting.counters()[0][0, 0, :, Counter.KEPT]
    assert (kept < 320 * 320).all() and (kept > 0).all()
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.cosine_similarity(sparse.flatten(), dense.flatten(), dim=0) > 0.8


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_other_grad_modes(mode):
    transformer, inputs = build_transformer(), transformer_inputs()
    rewriting = Rewriting(SMALL, "aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(transformer, backend=rewriting, fullgraph=True)
    with mode():
        torch.testing.assert_close(compiled(**inputs)[0], transformer(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert refreshes(rewriting) == REBUILT_ONCE


def test_symbolic_sizes_share_one_graph():
    model = toy({}, {})
    rewriting = Rewriting(SMALL, "aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewriting, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (200, 330, 65):
            torch.testing.assert_close(compiled(tokens(count)), model(tokens(count)), rtol=1e-4, atol=1e-5)
    assert len(rewriting.contexts) == 1
    assert len(rewriting.states[0]) == 3


def test_exported_graph_equals_dense_attention():
    transformer, inputs = build_transformer(), transformer_inputs()
    gm = export(transformer, **inputs)
    rewrite(gm, dialect="export")
    with torch.no_grad():
        dense = transformer(**inputs)[0]
        for _ in range(2):
            torch.testing.assert_close(gm(**inputs)[0], dense, rtol=1e-4, atol=1e-5)
    counters = [buffer for name, buffer in gm.named_buffers() if name.endswith("counters")]
    assert [c[0, 0, :, Counter.REFRESHES].tolist() for c in counters] == REBUILT_ONCE
    assert [c[0, 0, :, Counter.CALLS].tolist() for c in counters] == [[2, 2], [2, 2]]


def test_rewritten_exported_graph_can_be_exported_again():
    model, x = toy({}, {}), tokens()
    gm = export(model, x)
    rewrite(gm, dialect="export")
    with torch.no_grad():
        torch.testing.assert_close(export(gm, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_state_name_that_runs_unbound_says_so():
    with pytest.raises(GraphContractError, match="'mask' of site 3"):
        unbound_state(3, "mask")
