"""What the passes share: the sites they find, how state enters the graph, and the context they run in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, fx

from haste_compile import _torch
from haste_compile.config import HasteConfig, Thresholds, threshold_row
from haste_compile.kernels.layout import Ctl
from haste_compile.predictors import Predictor, get_predictor
from haste_compile.predictors.base import THRESHOLDS, Layout, Size, site_layouts
from haste_compile.token_order import ORDER_FIELDS, Grid, order_tensor


@dataclasses.dataclass(eq=False)
class AttentionSite:
    """One ``scaled_dot_product_attention`` node and what becomes of it.

    Attributes:
        node: the attention node of the graph as it came in.
        call: its arguments.
        name: path of the module it ran in, "blocks.0.attn1"; None when the graph does not say.
        kind: "self" when queries and keys are projected from the same tokens, else "cross".
        expected: fake of the node's output: the shape, strides and dtype that its users were traced with.
        status: "found", then "eligible" or "skipped"; "eligible" becomes "rewritten".
        reason: why it is skipped, for the user to read.
        index: its place among the rewritten sites, in graph order.
        inserted: what replaced the node: refresh, attention, and the nodes that lead to the output.
    """

    node: fx.Node
    call: _torch.AttentionCall
    name: str | None
    kind: Literal["self", "cross"]
    expected: Tensor
    status: Literal["found", "eligible", "skipped", "rewritten"] = "found"
    reason: str = ""
    index: int | None = None
    inserted: tuple[fx.Node, ...] = ()

    @property
    def q(self) -> fx.Node:
        return self.call.query

    @property
    def k(self) -> fx.Node:
        return self.call.key

    @property
    def v(self) -> fx.Node:
        return self.call.value

    @property
    def out(self) -> fx.Node:
        """The node that carries the attention output now."""
        return self.inserted[-1] if self.inserted else self.node

    @property
    def query(self) -> Tensor:
        """Fake of the queries."""
        return _torch.fake_value(self.q)

    @property
    def shape(self) -> tuple[Size, ...]:
        """[B, H, N, D] of the queries; symbolic where the graph serves several sizes."""
        return tuple(self.query.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale(self) -> float:
        """Factor on the logits; 1/√D where the call leaves it open."""
        return float(self.call.scale) if self.call.scale is not None else self.query.shape[-1] ** -0.5

    @property
    def label(self) -> str:
        """The name, or where there is none, the node's name in the graph."""
        return self.name if self.name is not None else f"node {self.node.name}"


@dataclasses.dataclass(frozen=True)
class PermutedTokens:
    """Where a graph's tokens change their order, set by ``permute_tokens``.

    Attributes:
        name: the order that the rewritten sites see, "raster" where nothing is permuted.
        grid: [T, H, W] of the tokens; None in raster order.
        reason: why the order asked for could not be had; empty otherwise.
        gathers: ``index_select`` nodes that bring tokens, and what belongs to each token, in that order.
        restored: the one ``index_select`` that brings the result back in raster order.
    """

    name: str = "raster"
    grid: Grid | None = None
    reason: str = ""
    gathers: tuple[fx.Node, ...] = ()
    restored: fx.Node | None = None


@dataclasses.dataclass
class PassContext:
    """What a run of the passes knows besides the graph.

    Attributes:
        config: the user's options.
        dialect: "dynamo" or "export".
        binding: how state enters the graph.
        sites: every attention site in graph order, filled by the first pass.
        order: the order of the tokens.
    """

    config: HasteConfig
    dialect: _torch.Dialect
    binding: StateBinding
    sites: list[AttentionSite] = dataclasses.field(default_factory=list)
    order: PermutedTokens = PermutedTokens()

    @property
    def predictor(self) -> Predictor:
        return get_predictor(self.config.predictor)

    @property
    def rewritten(self) -> list[AttentionSite]:
        return [site for site in self.sites if site.status == "rewritten"]

    def layouts(self, site: AttentionSite) -> dict[str, Layout]:
        """Shape and dtype of every state tensor of a site, in the order they enter the graph."""
        return site_layouts(self.predictor, site.shape, self.config)

    def layout(self, site: AttentionSite, field: str) -> Layout:
        """The same for one tensor: of the site, or of those that all sites share."""
        if field in ORDER_FIELDS:
            return (site.shape[2],), torch.int64
        return self.layouts(site)[field]


class StateBinding(Protocol):
    """How the state tensors of the rewritten sites enter a graph."""

    def bind(self, gm: fx.GraphModule, ctx: PassContext, site: AttentionSite, field: str) -> fx.Node:
        """The node that stands for ``field`` of ``site``; one for all sites if it is in ``SHARED_FIELDS``."""
        ...


#: State that belongs to no single site.
SHARED_FIELDS = ("ctl", *ORDER_FIELDS)


@dataclasses.dataclass(frozen=True)
class StateInput:
    """Which state tensor it is; ``site_index`` is None for what all sites share."""

    site_index: int | None
    field: str

    @classmethod
    def of(cls, site: AttentionSite, field: str) -> StateInput:
        return cls(None if field in SHARED_FIELDS else site.index, field)

    @property
    def name(self) -> str:
        """Name in the graph: ``haste_ctl``, ``haste_0_mask``."""
        return f"haste_{self.field}" if self.site_index is None else f"haste_{self.site_index}_{self.field}"


class PlaceholderBinding:
    """State as further inputs of a Dynamo graph, after the model's own.

    A compiled graph is shared by all instances of a module, so the caller brings the state of its instance.

    Attributes:
        inputs: what the caller appends to the model's inputs, in order.
        nodes: their placeholders; the recorded fakes give shape and dtype, symbolic where the graph is.
    """

    def __init__(self) -> None:
        self.inputs: list[StateInput] = []
        self.nodes: list[fx.Node] = []

    def bind(self, gm: fx.GraphModule, ctx: PassContext, site: AttentionSite, field: str) -> fx.Node:
        wanted = StateInput.of(site, field)
        if wanted in self.inputs:
            return self.nodes[self.inputs.index(wanted)]
        shape, dtype = ctx.layout(site, field)
        node = _torch.append_static_input(gm, wanted.name, _torch.empty_fake(site.query, shape, dtype))
        self.inputs.append(wanted)
        self.nodes.append(node)
        return node


class BufferBinding:
    """State as buffers of the unlifted module of an exported program (``ExportedProgram.module()``).

    Thresholds are filled in; ``ctl`` starts at slot 0 of a first video, and whoever runs the artifact writes
    it before each call.

    Attributes:
        inputs: which buffers were registered, in order.
    """

    def __init__(self) -> None:
        self.inputs: list[StateInput] = []
        self._nodes: dict[StateInput, fx.Node] = {}
        self._tables: Mapping[str, Thresholds] | None = None

    def bind(self, gm: fx.GraphModule, ctx: PassContext, site: AttentionSite, field: str) -> fx.Node:
        """As ``StateBinding.bind``.

        Raises:
            ThresholdError: a threshold table does not fit the rewritten sites.
            ProfileError: a profile is for other weights or other sites.
        """
        wanted = StateInput.of(site, field)
        if self._tables is None:
            self._tables = _thresholds(gm, ctx, site)
        if wanted not in self._nodes:
            gm.register_buffer(wanted.name, _initial_state(ctx, site, field, self._tables))
            first = next(iter(gm.graph.nodes)) if field in ORDER_FIELDS else site.inserted[0]
            with gm.graph.inserting_before(first):
                node = gm.graph.get_attr(wanted.name)
            shape, dtype = ctx.layout(site, field)
            _torch.set_fake_value(node, _torch.empty_fake(site.query, shape, dtype), "export")
            self._nodes[wanted] = node
            self.inputs.append(wanted)
        return self._nodes[wanted]


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal sizes, and equal strides wherever an axis has more than one element."""
    always = _torch.always
    return a.dim() == b.dim() and all(
        always(m == n) and (always(m == 1) or always(s == t))
        for m, n, s, t in zip(a.shape, b.shape, a.stride(), b.stride(), strict=True)
    )


def _thresholds(gm: fx.GraphModule, ctx: PassContext, site: AttentionSite) -> Mapping[str, Thresholds]:
    """The tables of the options, or of the profile that they name."""
    if ctx.config.profile is None:
        return {name: getattr(ctx.config, name) for name in THRESHOLDS}
    from haste_compile.calibration.use import thresholds

    return thresholds(
        ctx.config.profile,
        ctx.config.profile_checksum,
        list(gm.parameters()),
        sites=len(ctx.rewritten),
        heads=int(site.shape[1]),
        tokens=int(site.shape[2]),
    )


def _initial_state(
    ctx: PassContext, site: AttentionSite, field: str, tables: Mapping[str, Thresholds]
) -> Tensor:
    if field in ORDER_FIELDS and ctx.order.grid is not None:
        return order_tensor(field, ctx.order.name, ctx.order.grid, ctx.config.block_size).to(site.device)
    shape, dtype = ctx.layout(site, field)
    tensor = torch.zeros([int(size) for size in shape], dtype=dtype, device=site.device)
    if field == "ctl":
        tensor[Ctl.EPOCH] = 1
    elif field in THRESHOLDS and site.index is not None:
        heads = int(site.shape[1])
        row = threshold_row(field, tables[field], site.index, len(ctx.rewritten), heads)
        tensor[:heads] = torch.tensor(row)
    return tensor
