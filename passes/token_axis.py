"""Follow the axis of the video tokens through a graph: which operations let tokens change places.

An operation lets them if permuting its operands along their token axes, all alike, permutes its result alike
along one axis (or leaves it as it is: attention over permuted keys). ``follow`` tells that axis. It knows the
operations below and proves nothing about any other, which then counts as one that needs raster order.

    pointwise, casts, copies          the token axis, aligned as broadcasting does
    reshapes                          the axis of as many tokens with as many elements before and behind
    permute, transpose                where the axis goes
    indexing by slices, None, ints    where the axis goes, if it is taken whole
    split, chunk, unbind, cat, stack  the same axis, if they work along another
    layer_norm, rms_norm, softmax, mean, sum, linear, if they work along another axis
    scaled_dot_product_attention      that of the queries; keys and values in any order, but both in the same
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx

from haste_compile import _torch
from haste_compile._torch import always, op_name
from haste_compile.predictors.base import Size


@dataclasses.dataclass(frozen=True)
class Followed:
    """What an operation makes of permuted operands.

    Attributes:
        axis: the token axis of the result; None where it holds no tokens, or does not depend on their order.
        alike: operands in raster order that have to be permuted too, with their token axis. If there are any,
            ``axis`` holds once they are.
    """

    axis: int | None
    alike: Mapping[fx.Node, int] = dataclasses.field(default_factory=dict)


Axes = Mapping[fx.Node, int]


def follow(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    """The token axis of a node's result, given those of its permuted operands.

    Args:
        node: an operation with an operand in ``axes``.
        axes: permuted nodes and their token axis; of a tuple, that of each element.
        count: N, the number of tokens.

    Returns:
        None if the operation depends on the order of its tokens, or may.
    """
    name = op_name(node)
    if name in _METADATA:
        return Followed(None)
    rule = _RULES.get(name, _pointwise if _torch.is_pointwise(name) else None)
    if rule is None or "out" in node.kwargs:
        return None
    return rule(node, axes, count)


def written_to(node: fx.Node) -> fx.Node | None:
    """The operand that an in-place operation writes to."""
    name = op_name(node)
    in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return node.all_input_nodes[0] if in_place and node.all_input_nodes else None


def sizes(node: fx.Node) -> tuple[Size, ...] | None:
    """The shape of a node's tensor, or of the first of its tuple of tensors; None for anything else."""
    fake = _torch.fake_value(node)
    if isinstance(fake, (tuple, list)) and fake:
        fake = fake[0]
    return tuple(fake.shape) if isinstance(fake, Tensor) else None


def reshaped_axis(
    before: Sequence[Size], after: Sequence[Size], axes: Sequence[int], count: Size
) -> int | None:
    """Where adjacent ``axes`` of ``count`` elements end up in a reshape that keeps or merges them."""
    for axis, size in enumerate(after):
        if (
            always(size == count)
            and always(math.prod(after[:axis]) == math.prod(before[: axes[0]]))
            and always(math.prod(after[axis + 1 :]) == math.prod(before[axes[-1] + 1 :]))
        ):
            return axis
    return None


def moved_axes(node: fx.Node, axes: Sequence[int], dims: int) -> list[int] | None:
    """Where axes go in a permute or transpose; None for another operation."""
    if op_name(node) == "permute":
        given = node.args[1:] if isinstance(_argument(node, 1, "dims"), int) else _argument(node, 1, "dims")
        order = [dim % dims for dim in cast(Sequence[int], given)]
    elif op_name(node) in ("transpose", "swapaxes"):
        order = list(range(dims))
        first, second = (_argument(node, i, name) % dims for i, name in ((1, "dim0"), (2, "dim1")))
        order[first], order[second] = second, first
    else:
        return None
    return [order.index(axis) for axis in axes]


def _pointwise(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    operands = [n for n in node.all_input_nodes if sizes(n) is not None]
    target = written_to(node)
    if target is not None and target not in axes:
        return None  # permuted values in a tensor whose other readers expect raster order
    return _aligned(operands, sizes(node), axes, count)


def _cast(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    """Only the first operand gives values; another may give a dtype or a shape."""
    first = node.all_input_nodes[0]
    return _aligned([first], sizes(node), axes, count) if first in axes else Followed(None)


def _dropout(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    idle = _argument(node, 1, "p", 0.5) == 0 or _argument(node, 2, "training", True) is False
    return _cast(node, axes, count) if idle else None


def _aligned(
    operands: Sequence[fx.Node], result: tuple[Size, ...] | None, axes: Axes, count: Size
) -> Followed | None:
    """Broadcasting: axes are counted from the last."""
    if result is None:
        return None
    shapes = {n: sizes(n) or () for n in operands}
    ends = {axes[n] - len(shapes[n]) for n in operands if n in axes}
    if len(ends) != 1 or max(map(len, shapes.values())) != len(result):
        return None
    (end,) = ends
    if not always(result[end] == count):
        return None
    rest = [n for n in operands if n not in axes and -end <= len(shapes[n])]
    alike = {n: end + len(shapes[n]) for n in rest if not always(shapes[n][end] == 1)}
    if not all(always(shapes[n][axis] == count) for n, axis in alike.items()):
        return None
    return Followed(end + len(result), alike)


def _reshape(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    source = node.all_input_nodes[0]
    before, after = sizes(source), sizes(node)
    if source not in axes or before is None or after is None:
        return None
    axis = reshaped_axis(before, after, (axes[source],), count)
    return None if axis is None else Followed(axis)


def _move(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    (source,) = node.all_input_nodes
    moved = moved_axes(node, [axes[source]], len(sizes(source) or ()))
    return Followed(moved[0]) if moved else None


def _index(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    source, index = node.args
    if not isinstance(source, fx.Node) or source not in axes:
        return None
    if isinstance(_torch.fake_value(source), (tuple, list)):
        return Followed(axes[source])
    axis = _indexed_axis(index, axes[source], len(sizes(source) or ()))
    return None if axis is None else Followed(axis)


def _indexed_axis(index: Any, axis: int, dims: int) -> int | None:
    """Where an axis goes in ``x[index]``; None if it is not taken whole, or the index holds a tensor."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, (slice, int)) for item in items):
        return None
    if any(isinstance(item, bool) for item in items):
        return None
    used = sum(isinstance(item, (slice, int)) for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * (dims - used)
    read = written = 0
    for item in items:
        if read == axis and item is not None:
            return written if item == slice(None) else None
        read += item is not None
        written += not isinstance(item, int)
    return None


def _store(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    """``x[index] = value``: the value lies on the part of x that the index takes."""
    target, index, value = node.args
    if not isinstance(target, fx.Node) or target not in axes:
        return None
    shape = sizes(target) or ()
    axis = _indexed_axis(index, axes[target], len(shape))
    if axis is None:
        return None
    if not isinstance(value, fx.Node) or sizes(value) is None:
        return Followed(axes[target])
    part = len(shape) + sum(
        (item is None) - isinstance(item, int) for item in (index if isinstance(index, tuple) else (index,))
    )
    end, given = axis - part, sizes(value) or ()
    if value in axes:
        return Followed(axes[target]) if axes[value] - len(given) == end else None
    if -end > len(given) or always(given[end] == 1):
        return Followed(axes[target])
    return Followed(axes[target], {value: end + len(given)})


def _elsewhere(position: int, keyword: str, default: int | None, drops: str = "") -> Callable[..., Any]:
    """For operations along the ``dim`` at that position: the token axis stays if it is another one.

    Args:
        drops: "always" if the dimension is gone afterwards, "unless keepdim" if that depends.
    """

    def rule(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
        source = node.all_input_nodes[0]
        given = _argument(node, position, keyword, default)
        if source not in axes or len(node.all_input_nodes) > 1 or given is None:
            return None
        dims = len(sizes(source) or ())
        along = [dim % dims for dim in (given if isinstance(given, (list, tuple)) else [given])]
        if axes[source] in along:
            return None
        keeps = not drops or (drops == "unless keepdim" and _argument(node, position + 1, "keepdim", False))
        before = 0 if keeps else sum(dim < axes[source] for dim in along)
        return Followed(axes[source] - before)

    return rule


def _join(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    """``cat`` and ``stack`` along another axis: every part holds a value for each token."""
    parts = [n for n in node.all_input_nodes if sizes(n) is not None]
    known = {axes[n] for n in parts if n in axes}
    result = sizes(node) or ()
    dim = _argument(node, 1, "dim", 0) % len(result)
    if len(known) != 1 or any(len(sizes(n) or ()) != len(sizes(parts[0]) or ()) for n in parts):
        return None
    (axis,) = known
    stacked = op_name(node) == "stack"
    if dim == axis and not stacked:
        return None
    alike = {n: axis for n in parts if n not in axes}
    return Followed(axis + (stacked and dim <= axis), alike)


def _normalise(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    source = node.all_input_nodes[0]
    inner = len(cast(Sequence[int], _argument(node, 1, "normalized_shape")))
    if set(node.all_input_nodes) & set(axes) != {source}:
        return None
    return Followed(axes[source]) if axes[source] < len(sizes(source) or ()) - inner else None


def _linear(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    source = node.all_input_nodes[0]
    if set(node.all_input_nodes) & set(axes) != {source}:
        return None
    return Followed(axes[source]) if axes[source] < len(sizes(source) or ()) - 1 else None


def _attention(node: fx.Node, axes: Axes, count: Size) -> Followed | None:
    call = _torch.attention_call(node)
    if call is None or call.attn_mask is not None or call.is_causal is not False or call.dropout_p != 0:
        return None
    operands = (call.query, call.key, call.value)
    token_axes = {n: len(sizes(n) or ()) - 2 for n in operands}
    if any(axes[n] != token_axes[n] for n in operands if n in axes):
        return None
    alike: dict[fx.Node, int] = {}
    if call.key in axes or call.value in axes:
        alike = {n: token_axes[n] for n in (call.key, call.value) if n not in axes}
    return Followed(token_axes[call.query] if call.query in axes else None, alike)


def _argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def _rules() -> Iterator[tuple[str, Callable[[fx.Node, Axes, Size], Followed | None]]]:
    for names, rule in (
        ("to _to_copy type_as float double half bfloat16 contiguous clone detach alias expand", _cast),
        ("empty_like zeros_like ones_like full_like", _cast),
        ("copy_ fill_ zero_ masked_fill_", _pointwise),
        ("dropout", _dropout),
        ("view reshape _unsafe_view flatten unflatten squeeze unsqueeze", _reshape),
        ("permute transpose swapaxes", _move),
        ("getitem", _index),
        ("setitem", _store),
        ("split split_with_sizes", _elsewhere(2, "dim", 0)),
        ("chunk", _elsewhere(2, "dim", 0)),
        ("slice", _elsewhere(1, "dim", 0)),
        ("select unbind", _elsewhere(1, "dim", 0, "always")),
        ("softmax", _elsewhere(1, "dim", None)),
        ("mean sum", _elsewhere(1, "dim", None, "unless keepdim")),
        ("cat stack", _join),
        ("layer_norm rms_norm", _normalise),
        ("linear", _linear),
        ("scaled_dot_product_attention", _attention),
    ):
        yield from ((name, rule) for name in names.split())


_RULES = dict(_rules())

#: Operations on what a tensor is, not on what it holds.
_METADATA = {"size", "dim", "numel", "stride", "sym_size", "sym_stride", "_assert_tensor_metadata"}
