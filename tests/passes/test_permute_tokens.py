"""Where tokens change their order: found by data flow, undone once, or refused with a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_capture import (
    SMALL,
    Rewriting,
    ToyVideo,
    capture,
    export,
    latents,
    rewrite,
    tokens,
    toy,
    toy_video,
)
from tiny_wan import LATENT_CHANNELS, TEXT_DIM, TOKENS, build_transformer, transformer_inputs
from torch import Tensor

from haste_compile.errors import TokenOrderError
from haste_compile.passes import PassContext

TILES = dataclasses.replace(SMALL, token_order="tile3d", strict=True)
LENIENT = dataclasses.replace(TILES, strict=False)


def image_to_video() -> tuple[Any, dict[str, Any]]:
    changes = {"in_channels": 2 * LATENT_CHANNELS + 4, "image_dim": 32, "added_kv_proj_dim": 128}
    inputs = transformer_inputs()
    inputs["hidden_states"] = inputs["hidden_states"].repeat(1, 3, 1, 1, 1)
    inputs["encoder_hidden_states"] = torch.randn(1, 512, TEXT_DIM)  # the number that Wan takes for text
    image = {"encoder_hidden_states_image": torch.randn(1, 7, 32)}
    return build_transformer(num_layers=1, **changes), inputs | image


def own_timesteps(batch: int) -> tuple[Any, dict[str, Any]]:
    """Wan 2.2 5B: every token has a timestep, so modulation differs by token."""
    timestep = 900 * torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(0))
    return build_transformer(num_layers=1), {**transformer_inputs(batch), "timestep": timestep}


def fused() -> tuple[Any, dict[str, Any]]:
    transformer = build_transformer(num_layers=1)
    for block in transformer.blocks:
        block.attn1.fuse_projections()
    return transformer, transformer_inputs()


MODELS: list[tuple[str, str, Callable[[], tuple[Any, dict[str, Any]]], int]] = [
    ("dynamo", "two blocks", lambda: (build_transformer(), transformer_inputs(2, width=96)), 3),
    ("export", "two blocks", lambda: (build_transformer(), transformer_inputs(2, width=96)), 3),
    ("dynamo", "image to video", image_to_video, 3),
    ("dynamo", "a timestep for each token", lambda: own_timesteps(1), 4),
    ("export", "the same in a batch", lambda: own_timesteps(2), 4),
    ("dynamo", "fused projections", fused, 3),
]


@pytest.mark.parametrize(
    ("dialect", "make", "gathers"),
    [(dialect, make, gathers) for dialect, _, make, gathers in MODELS],
    ids=[f"{name}, {dialect}" for dialect, name, _, _ in MODELS],
)
def test_wan(dialect: Any, make: Callable[[], tuple[Any, dict[str, Any]]], gathers: int) -> None:
    """The tokens, two rotary tables, perhaps the modulation: permuted once for all blocks."""
    transformer, inputs = make()
    model, ctx = run_in_order(transformer, dialect, inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], transformer(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert ctx.order.name == "tile3d" and not ctx.order.reason
    assert len(ctx.order.gathers) == gathers and len(ctx.rewritten) == len(transformer.blocks)


def run_in_order(model: Any, dialect: Any, inputs: dict[str, Any]) -> tuple[Any, PassContext]:
    """The rewritten model, ready to be called with ``inputs``, and what the passes learnt."""
    if dialect == "export":
        gm = export(model, **inputs)
        return gm, rewrite(gm, TILES, "export")
    rewriting = Rewriting(TILES)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewriting, fullgraph=True)
    with torch.no_grad():
        compiled(**inputs)
    (ctx,) = rewriting.contexts
    return compiled, ctx


def test_the_graph_before_and_after() -> None:
    plain, permuted = (capture(toy_video(), latents()) for _ in range(2))
    rewrite(plain)
    ctx = rewrite(permuted, TILES)
    assert ctx.order.grid == (4, 6, 10)
    gathers = permuted.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default)
    assert [node.name for node in gathers] == ["haste_ordered_0", "haste_ordered_1", "haste_restored"]
    sources, axes, indices = zip(*(node.args for node in gathers), strict=True)
    assert axes == (1, 1, 1)
    assert [index.name for index in indices] == [
        "haste_token_order",
        "haste_token_order",
        "haste_token_order_inverse",
    ]
    # the patch embedding in memory order, the learnt positions cut to size, the output layer's result
    assert [node.target for node in sources[:1]] == ["contiguous"]
    assert [tuple(node.meta["example_value"].shape) for node in sources] == [
        (1, 240, 128),
        (1, 240, 128),
        (1, 240, 16),
    ]
    unpatchify = next(iter(gathers[-1].users))
    assert unpatchify.target == "reshape"
    new = [node.target for node in permuted.graph.nodes if node not in (*gathers, *indices)]
    assert new == [node.target for node in plain.graph.nodes], "nothing else has changed"


def test_raster_order_leaves_the_graph_alone() -> None:
    plain, asked = (capture(toy_video(), latents()) for _ in range(2))
    rewrite(plain)
    ctx = rewrite(asked, dataclasses.replace(TILES, token_order="raster"))
    assert asked.code == plain.code
    assert (ctx.order.name, ctx.order.reason, ctx.order.gathers) == ("raster", "", ())


class Flat(ToyVideo):
    """Hands one block the tokens as ``flatten`` makes them of the patch embedding."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, latents: Tensor) -> Tensor:
        return self.out(self.first(self.flatten(self.patch(latents)))).unflatten(1, (4, 6, 10))


@pytest.mark.parametrize(
    ("flatten", "source", "axis"),
    [
        # Users were traced with the strides of a transposed tensor, and get them: permuted before.
        (lambda grid: grid.flatten(2).transpose(1, 2), "flatten", 2),
        (lambda grid: grid.permute(0, 2, 3, 4, 1).reshape(1, -1, 128).contiguous(), "contiguous", 1),
    ],
    ids=["not contiguous", "channels last"],
)
def test_other_ways_to_flatten(flatten: Callable[[Tensor], Tensor], source: str, axis: int) -> None:
    model = Flat(flatten).eval()
    compiled, ctx = run_in_order(model, "dynamo", {"latents": latents()})
    (gather,) = ctx.order.gathers
    assert gather.args[0].target == source and gather.args[1] == axis
    with torch.no_grad():
        torch.testing.assert_close(compiled(latents=latents()), model(latents()), rtol=1e-4, atol=1e-5)


def _round_trip(x: Tensor) -> Tensor:
    return x + x.roll(1, 1)


def _own_order(x: Tensor) -> Tensor:
    return x[:, x.shape[1] // 2 :].repeat(1, 2, 1)


def _writes(x: Tensor) -> Tensor:
    kept = torch.zeros(3, 128)
    kept[0] = 1.0
    return x + kept.sum(0)


REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "no patch embedding": (
        lambda: (toy({}), tokens()),
        "no 3-D convolution with one output for each of the 200",
    ),
    "a block of its own": (
        lambda: (build_transformer().blocks[0], None),
        "a block that is compiled alone does not see the patch embedding",
    ),
    "raster order inside": (
        lambda: (toy_video(_round_trip), latents()),
        "2 tensors, not one, are needed in raster order: for roll in the graph, ",
    ),
    "other tokens": (
        lambda: (toy_video(_own_order), latents()),
        "second.blocks.0 attends to other tokens than those of the patch embedding",
    ),
    "never contiguous": (
        lambda: (Flat(lambda grid: grid.permute(0, 2, 3, 4, 1).reshape(1, -1, 128)), latents()),
        "the tokens of conv3d are never a contiguous tensor of their own",
    ),
    "a write": (lambda: (toy_video(_writes), latents()), "whose tokens it does not know"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(make: Callable[[], tuple[Any, Any]], reason: str) -> None:
    model, inputs = make()
    arguments = (torch.randn(1, 320, 128), torch.randn(1, 5, 128), torch.randn(1, 6, 128), None)
    arguments = arguments if inputs is None else (inputs,)
    gm = capture(model, *arguments)
    before = gm.code
    with pytest.raises(TokenOrderError) as caught:
        rewrite(gm, TILES)
    assert reason in caught.value.found
    assert gm.code == before, "a refused graph is left as it was"
    lenient, plain = gm, capture(model, *arguments)
    ctx = rewrite(lenient, LENIENT)
    rewrite(plain)
    assert reason in ctx.order.reason and ctx.order.name == "raster"
    assert lenient.code == plain.code, "it is rewritten as in raster order"


def test_symbolic_sizes_are_refused() -> None:
    rewriting = Rewriting(LENIENT)
    torch._dynamo.reset()
    model = toy_video()
    compiled = torch.compile(model, backend=rewriting, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for width in (20, 24):
            x = latents(width=width)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    (ctx,) = rewriting.contexts
    assert ctx.order.reason.startswith("symbolic token count")
    assert ctx.order.reason.endswith("compile each size with dynamic=False")


def test_nothing_to_order() -> None:
    gm = capture(toy_video(), latents())
    ctx = rewrite(gm, dataclasses.replace(LENIENT, dense_layers=(0, 1)))
    assert ctx.order.reason == "no attention site is rewritten"
