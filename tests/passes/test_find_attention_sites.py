"""Which attention sites are found, what they are called, and which are self-attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph_capture import SMALL, Rewriting, ToyAttention, ToyModel, capture, export, tokens, toy
from tiny_wan import TEXT_DIM, TOKENS, build_transformer, transformer_inputs
from torch import Tensor, fx, nn

from haste_compile.errors import GraphContractError, NoAttentionSitesError
from haste_compile.passes import PassContext, PlaceholderBinding, find_attention_sites


def found(gm: fx.GraphModule) -> list[tuple[str | None, str]]:
    ctx = PassContext(SMALL, "dynamo", PlaceholderBinding())
    before = gm.code
    find_attention_sites(gm, ctx)
    gm.recompile()
    assert gm.code == before
    return [(site.name, site.kind) for site in ctx.sites]


WAN = [
    ("blocks.0.attn1", "self"),
    ("blocks.0.attn2", "cross"),
    ("blocks.1.attn1", "self"),
    ("blocks.1.attn2", "cross"),
]


@pytest.mark.parametrize("trace", [capture, export])
def test_text_to_video_has_one_self_attention_a_block(trace):
    inputs = transformer_inputs()
    assert found(trace(build_transformer(), **inputs)) == WAN


def test_image_to_video_has_two_cross_attentions_a_block():
    inputs = transformer_inputs() | {"encoder_hidden_states_image": torch.randn(1, 5, 16)}
    sites = found(capture(build_transformer(image_dim=16, added_kv_proj_dim=128), **inputs))
    cross = ("blocks.0.attn2", "cross")
    assert sites[:3] == [("blocks.0.attn1", "self"), cross, cross]
    assert len(sites) == 6


def test_text_as_long_as_the_video_is_still_cross_attention():
    inputs = transformer_inputs() | {"encoder_hidden_states": torch.randn(1, TOKENS, TEXT_DIM)}
    assert found(capture(build_transformer(), **inputs)) == WAN


def test_fused_projections_keep_their_kind():
    transformer = build_transformer()
    for block in transformer.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    assert found(capture(transformer, **transformer_inputs())) == WAN


def test_lora_keeps_its_kind():
    class LoraLinear(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, 4, bias=False)
            self.up = nn.Linear(4, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x)) * 0.5

    model = toy({}, {"context": True})
    for block in model.blocks:
        for name in ("to_q", "to_k"):
            setattr(block, name, LoraLinear(getattr(block, name)))
    assert found(capture(model, tokens(), tokens(seed=1))) == [("blocks.0", "self"), ("blocks.1", "cross")]


def test_a_block_compiled_alone_is_named_from_the_block():
    transformer = build_transformer()
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _inputs: object):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend=keep, fullgraph=True)
    with torch.no_grad():
        transformer(**transformer_inputs())
    assert [found(gm) for gm in graphs] == [[("attn1", "self"), ("attn2", "cross")]]


def test_separate_projected_inputs_of_one_length_count_as_self_attention():
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q = torch.randn(1, 2, 100, 64)
    assert found(capture(Bare(), q, q + 1, q + 2)) == [(None, "self")]
    assert found(capture(Bare(), q, q[:, :, :50] + 1, q[:, :, :50] + 2)) == [(None, "cross")]


def test_rotary_embedding_written_in_place_does_not_hide_the_projection():
    class Rotary(ToyAttention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            def rotate(y: Tensor) -> Tensor:
                out = torch.empty_like(y)
                out[..., 0::2] = -y[..., 1::2]
                out[..., 1::2] = y[..., 0::2]
                return out

            source = x if context is None else context
            heads = (self.heads, self.dim)
            q = rotate(self.to_q(x).unflatten(-1, heads)).transpose(1, 2)
            k = rotate(self.to_k(source).unflatten(-1, heads)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)

    model = ToyModel(Rotary())
    for trace in (capture, export):
        assert found(trace(model, tokens())) == [("blocks.0", "self")]
        assert found(trace(model, tokens(), tokens(seed=1))) == [("blocks.0", "cross")]


def test_attention_under_activation_checkpointing_is_found():
    class Checkpointed(ToyAttention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    with torch.enable_grad():
        gm = capture_with_grad(ToyModel(Checkpointed()), tokens().requires_grad_())
    assert [kind for _, kind in found(gm)] == ["self"]


def capture_with_grad(module: nn.Module, x: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _inputs: object):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=keep, fullgraph=True)(x)
    return graphs[0]


def test_no_attention_names_the_backend_to_choose():
    gm = capture(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(NoAttentionSitesError, match=r"set_attention_backend\('native'\)"):
        found(gm)


def test_a_broken_graph_may_have_pieces_without_attention():
    class Broken(ToyModel):
        def forward(self, x: Tensor, *context: Tensor) -> Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x + 1

    rewriting, model = Rewriting(), Broken(ToyAttention())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=rewriting)(tokens()), model(tokens()))
    assert [len(ctx.rewritten) for ctx in rewriting.contexts] == [0, 1, 0]


def test_flex_attention_backend_leaves_no_site():
    transformer = build_transformer()
    transformer.set_attention_backend("flex")
    try:
        gm = capture(transformer, **transformer_inputs())
    finally:
        transformer.set_attention_backend("native")  # diffusers also remembers the choice for the process
    with pytest.raises(NoAttentionSitesError, match="flex"):
        found(gm)


def test_a_graph_without_shapes_is_refused():
    gm = fx.symbolic_trace(lambda q: F.scaled_dot_product_attention(q, q, q))
    with pytest.raises(GraphContractError, match="without a recorded shape"):
        found(gm)
