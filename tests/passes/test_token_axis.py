"""The rules against their definition: permute the operands' tokens, and the result is permuted likewise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_capture import capture, export
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.passes.token_axis import follow, sizes

COUNT = 6
Function = Callable[[Tensor, Tensor], Tensor]


def _store(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2] * 2
    out[..., 1::2] = 0.5
    return out


def _store_for_each_token(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, 0] = y[:, :, 1]
    return out


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.mul_(2).add_(y)
    return x


#: Functions of x and y, both [2, 6, 4, 8] with their tokens on axis 1, that let tokens change places.
MOVABLE: list[Function] = [
    lambda x, y: x + y,
    lambda x, y: 1 - x * y[:, :, :1],
    lambda x, y: x + torch.ones(2, 1, 4, 8),
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, y: x.clamp(min=0).pow(2).float().type_as(y),
    lambda x, y: F.gelu(F.silu(x), approximate="tanh") / 3,
    lambda x, y: F.dropout(x, 0.5, training=False).contiguous().clone().detach(),
    lambda x, y: x.flatten(2).unflatten(-1, (2, -1)).unsqueeze(0).squeeze(0),
    lambda x, y: x.view(2, 6, 2, 16).reshape(2, 1, 6, 32),
    lambda x, y: x.permute(2, 0, 3, 1).transpose(-1, 0),
    lambda x, y: x[..., 1::2],
    lambda x, y: x[:1, None, :, -1],
    lambda x, y: x[1],
    lambda x, y: x.split([3, 5], dim=-1)[1] + x.chunk(2, 2)[0].sum(2, keepdim=True)[..., :5],
    lambda x, y: x.unbind(2)[1] + x.select(2, 0),
    lambda x, y: torch.cat([x, y], dim=-1),
    lambda x, y: torch.stack([x, y], dim=1),
    lambda x, y: torch.stack([x, y], dim=-1).flatten(-2),
    lambda x, y: F.layer_norm(x, (4, 8)) + F.rms_norm(x, (8,)),
    lambda x, y: x.softmax(-1) * x.mean((0, -1), keepdim=True) + x.mean(-1).sum(0).unsqueeze(-1),
    lambda x, y: F.linear(x, torch.eye(8)[:5], torch.ones(5)),
    lambda x, y: x[:, :, :1].expand(2, 6, 3, 8),
    _store,
    _store_for_each_token,
    _in_place,
    lambda x, y: F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (x, y, y + 1))),
    lambda x, y: F.scaled_dot_product_attention(
        x.transpose(1, 2), *torch.arange(640.0).view(2, 2, 4, 5, 8) / 99
    ),
    lambda x, y: F.scaled_dot_product_attention(torch.ones(2, 4, 5, 8), *(z.transpose(1, 2) for z in (x, y))),
]

#: Functions that do not, or whose rule does not know that they do.
FIXED: list[Function] = [
    lambda x, y: x.flatten(0, 1),
    lambda x, y: x.reshape(2, 2, 3, 4, 8),
    lambda x, y: x.reshape(2, 4, 6, 8),  # as many elements, but no longer those of a token
    lambda x, y: x[:, 1:],
    lambda x, y: x[:, 0],
    lambda x, y: x[torch.tensor([1, 0])],
    lambda x, y: torch.cat([x, y], dim=1),
    lambda x, y: x.chunk(2, dim=1)[0],
    lambda x, y: x.cumsum(1),
    lambda x, y: x.softmax(1),
    lambda x, y: x.mean(1),
    lambda x, y: x.mean(),
    lambda x, y: x.max(),
    lambda x, y: x.roll(1, 1),
    lambda x, y: x[..., :6] * x[..., :6].transpose(1, 3),
    lambda x, y: F.layer_norm(x, (6, 4, 8)),
    lambda x, y: F.linear(x.transpose(1, 3), torch.eye(6)),
    lambda x, y: F.dropout(x, 0.5, training=True),
    lambda x, y: torch.ones(2, 6, 4, 8).add_(x),
    lambda x, y: F.scaled_dot_product_attention(*(x.transpose(1, 2),) * 3, is_causal=True),
    lambda x, y: F.scaled_dot_product_attention(x, x, x),
]


class _Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, COUNT, 4, 8, generator=generator).unbind()


def _graph(function: Function, dialect: str) -> fx.GraphModule:
    return (capture if dialect == "dynamo" else export)(_Module(function), *_inputs())


def _follow_all(gm: fx.GraphModule) -> tuple[dict[fx.Node, int], bool]:
    """Token axes from both inputs on, and whether an operation was met that needs raster order."""
    axes: dict[fx.Node, int] = {}
    fixed = False
    for node in gm.graph.nodes:
        if node.op == "placeholder" and sizes(node) == (2, COUNT, 4, 8):
            axes[node] = 1
        elif node.op != "output" and any(operand in axes for operand in node.all_input_nodes):
            followed = follow(node, axes, COUNT)
            fixed |= (followed is None or bool(followed.alike)) and node.target != "_guards_fn"
            if node.target == "_guards_fn" or followed is None:
                continue
            if followed.axis is not None:
                axes[node] = followed.axis
    return axes, fixed


@pytest.mark.parametrize("dialect", ["dynamo", "export"])
@pytest.mark.parametrize("function", MOVABLE, ids=range(len(MOVABLE)))
def test_what_lets_tokens_change_places(function: Function, dialect: str) -> None:
    gm = _graph(function, dialect)
    axes, fixed = _follow_all(gm)
    assert not fixed
    x, y = _inputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expected, found = function(x, y), function(x[:, order], y[:, order])
    (output,) = gm.graph.find_nodes(op="output")
    (result,) = output.all_input_nodes
    if result in axes:
        expected = expected.index_select(axes[result], order)
    torch.testing.assert_close(found, expected)
    assert torch.equal(expected, function(x, y)) == (result not in axes), "the case would pass unpermuted"


@pytest.mark.parametrize("dialect", ["dynamo", "export"])
@pytest.mark.parametrize("function", FIXED, ids=range(len(FIXED)))
def test_what_does_not(function: Function, dialect: str) -> None:
    _, fixed = _follow_all(_graph(function, dialect))
    assert fixed


ALIKE: list[tuple[Callable[[Tensor, Tensor], Any], int]] = [
    (lambda x, y: x * y, 1),
    (lambda x, y: x[0] * y[0], 0),
    (lambda x, y: torch.cat([x, y], 2), 1),
    (lambda x, y: F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (x, x, y))), 2),
    (_store_for_each_token, 1),
]


@pytest.mark.parametrize(("function", "axis"), ALIKE, ids=range(len(ALIKE)))
def test_operands_that_have_to_be_permuted_too(function: Function, axis: int) -> None:
    gm = _graph(function, "dynamo")
    first = next(n for n in gm.graph.find_nodes(op="placeholder") if n.name.endswith("x_"))
    axes: dict[fx.Node, int] = {first: 1}
    alike: list[int] = []
    for node in gm.graph.nodes:
        if any(operand in axes for operand in node.all_input_nodes) and node.op != "output":
            followed = follow(node, axes, COUNT)
            assert followed is not None
            alike += followed.alike.values()
            if followed.axis is not None:
                axes[node] = followed.axis
    assert alike == [axis]


def test_what_is_no_operation_of_torch_is_not_known() -> None:
    @torch.library.custom_op("haste_test::add", mutates_args=())
    def add(x: Tensor) -> Tensor:
        return x + 1

    add.register_fake(torch.empty_like)
    gm = _graph(lambda x, y: add(x), "dynamo")
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.haste_test.add.default)
    assert _torch.op_name(node) == ""
    assert follow(node, {node.all_input_nodes[0]: 1}, COUNT) is None
