"""The predictor interface: a third predictor is one file, the class below, and one line in PREDICTORS."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny_wan
import torch
import torch.nn.functional as F
from graph_capture import SMALL, capture, export, rewrite, tokens, toy
from torch import Tensor

from haste_compile import explain, optimize
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError
from haste_compile.kernels.block_mask import pack_bits, token_pairs
from haste_compile.kernels.drift_gate.reference import decide
from haste_compile.kernels.layout import Counter, Ctl
from haste_compile.predictors import PREDICTORS
from haste_compile.predictors.base import Layout, OpCall, Predictor, Size
from haste_compile.predictors.xattention import ATTENTION
from haste_compile.state import states_of

OPTIONS = {"block_size": 64, "stride": 8, "min_tokens": 64, "top_p": 0.7, "inner": "eager"}


@torch.library.custom_op("haste_test::keep_diagonal_", mutates_args=("mask", "counters"))
def keep_diagonal_(q: Tensor, k: Tensor, ctl: Tensor, mask: Tensor, counters: Tensor, block: int) -> None:
    slot, blocks = int(ctl[Ctl.SLOT]), mask.shape[3]
    nothing = torch.zeros(*q.shape[:2], 1)
    rebuild, _, counters[slot] = decide(
        nothing, nothing, torch.zeros(q.shape[1]), ctl, torch.zeros(*q.shape[:2], 2, 1), counters[slot],
        tokens=q.shape[2], reuse="freeze", interval=0, max_age=0, gate_low=0.0, gate_high=1.0, relative=False,
    )  # fmt: skip
    place = torch.arange(blocks)
    bits = pack_bits((place - place[:, None]).abs() <= 1)
    mask[slot][rebuild] = bits
    for column in (Counter.KEPT, Counter.KEPT_SUM):
        counters[slot, ..., column] += rebuild * token_pairs(bits, q.shape[2], block)


@keep_diagonal_.register_fake
def _(q: Tensor, k: Tensor, ctl: Tensor, mask: Tensor, counters: Tensor, block: int) -> None: ...


class Diagonal(Predictor):
    """Keeps a query block's own keys and those of its two neighbours."""

    def blocks(self, tokens: Size, config: HasteConfig) -> tuple[Size, Size]:
        return (blocks := -(-tokens // config.block_size)), blocks

    def why_not(self, tokens: Size, config: HasteConfig) -> str | None:
        return None

    def state(self, tokens: Size, dim: Size, config: HasteConfig) -> dict[str, Layout]:
        rows, columns = self.blocks(tokens, config)
        return {"mask": ((rows, -(-columns // 32)), torch.int32)}

    def refresh(self, config: HasteConfig, scale: float) -> OpCall:
        op = torch.ops.haste_test.keep_diagonal_.default
        return OpCall(op, ("ctl", "mask", "counters"), {"block": config.block_size})

    def attention(self, config: HasteConfig, scale: float) -> OpCall:
        return OpCall(ATTENTION, ("mask", "ctl"), {"block": config.block_size, "scale": scale})


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICTORS, "diagonal", Diagonal())


@pytest.mark.usefixtures("third")
def test_a_third_predictor_generates() -> None:
    torch._dynamo.reset()
    pipe = tiny_wan.build_pipeline()
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    with optimize(pipe, predictor="diagonal", **OPTIONS) as handle:
        generator = torch.Generator().manual_seed(0)
        video = pipe("a red circle", num_inference_steps=4, generator=generator, output_type="latent", **size)
        assert video.frames.isfinite().all()
        found = handle.statistics()["transformer"]
        said = handle.explain(**size)["transformer"]
    assert found.sites == ("blocks.0.attn1", "blocks.1.attn1")
    assert found.density == pytest.approx(13 / 25)  # of five blocks of 64: two rows of two, three of three
    assert found.refresh_rate == pytest.approx(1 / 4)
    assert (said.blocks, said.key_blocks) == (5, 5)
    assert len(said.report.rewritten) == tiny_wan.LAYERS


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("name", ["xattention", "svg2", "diagonal"])
def test_attend_once_is_the_first_step_of_a_video(name: str) -> None:
    config = HasteConfig(predictor=name, block_size=64, stride=8)
    q, k, v = torch.randn(3, 2, 3, 333, 64, generator=torch.Generator().manual_seed(0)).unbind()
    top_p = torch.tensor([0.3, 0.6, 1.0])
    out, pairs = PREDICTORS[name].attend_once(q, k, v, top_p, config)
    assert pairs.shape == (2, 3) and pairs.dtype == torch.int64
    if name == "diagonal":
        block = torch.arange(333) // 64
        kept = (block - block[:, None]).abs() <= 1
        assert (pairs == kept.sum()).all()
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    else:
        assert (pairs[:, 0] < pairs[:, 1]).all() and (pairs[:, 2] == 333**2).all()
        out, wanted = out[:, 2], F.scaled_dot_product_attention(q, k, v)[:, 2]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_unknown_predictors_are_refused_by_name() -> None:
    for wrong in ("svg9", None, ["xattention"]):
        with pytest.raises(OptionError, match=r"option predictor: found .* wanted one of 'xattention'"):
            HasteConfig.from_options({"predictor": wrong})


@pytest.mark.parametrize(
    ("tokens", "clusters"),
    [(75_600, (300, 1000)), (32_760, (300, 1000)), (8000, (300, 1000)), (2304, (144, 288)), (17, (2, 3))],
)
def test_svg2_makes_fewer_clusters_of_fewer_tokens(tokens: int, clusters: tuple[int, int]) -> None:
    config = HasteConfig.from_options({"predictor": "svg2"})
    svg2 = PREDICTORS["svg2"]
    assert svg2.blocks(tokens, config) == clusters and svg2.why_not(tokens, config) is None
    few = HasteConfig.from_options({"predictor": "svg2", "clusters": [2, 5]})
    assert svg2.blocks(tokens, few) == (2, min(5, clusters[1]))
    assert config.delta == 8.0 and HasteConfig().delta == 30.0


def test_svg2_leaves_a_site_of_one_cluster_dense() -> None:
    reason = PREDICTORS["svg2"].why_not(16, HasteConfig(predictor="svg2"))
    assert reason == "16 tokens are a single cluster of queries"


@pytest.mark.parametrize("dialect", ["dynamo", "export"])
def test_svg2_enters_either_dialect_of_graphs(dialect: Any) -> None:
    config = dataclasses.replace(SMALL, predictor="svg2", cluster_iterations=(3, 1), top_p=0.5)
    model, x = toy({}, {}), tokens(200)
    dense = model(x)
    gm = capture(model, x) if dialect == "dynamo" else export(model, x)
    binding = rewrite(gm, config, dialect).binding
    own = ("top_p", "delta", "centroids", "order", "offsets", "mask", "anchors", "counters")
    assert [item.name for item in binding.inputs] == [
        "haste_ctl",
        *(f"haste_{i}_{f}" for i in (0, 1) for f in own),
    ]
    refreshes = [node for node in gm.graph.nodes if node.target is torch.ops.haste.refresh_clusters_.default]
    assert [node.name for node in refreshes] == ["haste_0_refresh", "haste_1_refresh"]
    if dialect == "export":
        with torch.no_grad():
            out = gm(x)
        assert 0 < (out - dense).abs().max() < 0.5
        assert dict(gm.named_buffers())["haste_1_counters"][0, ..., Counter.KEPT].min() > 0


def test_svg2_serves_several_sizes_with_one_graph() -> None:
    """Where the number of clusters follows the tokens, the state's sizes are expressions of theirs."""
    torch._dynamo.reset()
    transformer = tiny_wan.build_transformer(num_layers=1)
    options = {**OPTIONS, "predictor": "svg2", "top_p": 1.0}
    model = torch.compile(transformer, backend="haste", dynamic=None, options=options)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for width in (128, 192, 256):
        inputs = tiny_wan.transformer_inputs(width=width)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs)[0], transformer(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2
    found = [
        (spec.N, state.tensor(0, "mask").shape[3]) for state in states_of(transformer) for spec in state.specs
    ]
    assert found == [(5 * 8 * 8, 20), (5 * 8 * 12, 30), (5 * 8 * 16, 40)]


def test_svg2s_first_state_is_explained() -> None:
    size = {"height": 128, "width": 128, "num_frames": 17}
    said = explain(tiny_wan.build_transformer(), **size, predictor="svg2", min_tokens=64)["transformer"]
    assert (said.tokens, said.blocks, said.key_blocks) == (320, 20, 40)
    assert "tokens 320 in 20 × 40 blocks" in str(said)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": 300},
        {"clusters": (300, 1)},
        {"clusters": (300, 1000, 3)},
        {"cluster_iterations": (50, 0)},
        {"cluster_iterations": (50.0, 2)},
        {"cluster_tolerance": -1},
        {"cluster_tolerance": float("inf")},
        {"cluster_floor": 1.1},
        {"cluster_floor": "0.1"},
    ],
    ids=str,
)
def test_cluster_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option {next(iter(wrong))}: found .* wanted "):
        HasteConfig.from_options(wrong)


@pytest.mark.usefixtures("third")
def test_a_predictors_defaults_yield_to_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diagonal, "defaults", {"delta": 8.0})
    assert HasteConfig.from_options({"predictor": "diagonal"}).delta == 8.0
    assert HasteConfig.from_options({"predictor": "diagonal", "delta": 3.0}).delta == 3.0
    plain = HasteConfig.from_options({})
    assert plain.predictor == "xattention" and dataclasses.replace(plain, predictor="diagonal").delta == 30.0
