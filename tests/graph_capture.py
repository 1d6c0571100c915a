"""For graph tests: capture a module's graph, run the passes on it, run the result with state made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.config import HasteConfig
from haste_compile.kernels.layout import Ctl
from haste_compile.passes import BufferBinding, PassContext, PlaceholderBinding, run_passes
from haste_compile.token_order import ORDER_FIELDS, Grid, order_tensor

#: Options under which a test-sized model is worth rewriting; every mask keeps everything.
SMALL = HasteConfig(block_size=64, min_tokens=0, top_p=1.0)


def capture(module: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    """A copy of the Dynamo graph of one call."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(_torch.copy_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=keep, fullgraph=True)(*args, **kwargs)
    (graph,) = graphs
    return graph


def export(module: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The unlifted graph module of one exported call."""
    with torch.no_grad():
        return torch.export.export(module, args, kwargs).module()


def rewrite(
    gm: fx.GraphModule, config: HasteConfig = SMALL, dialect: _torch.Dialect = "dynamo"
) -> PassContext:
    """Run all passes on ``gm``, in place."""
    binding = PlaceholderBinding() if dialect == "dynamo" else BufferBinding()
    ctx = PassContext(config, dialect, binding)
    run_passes(gm, ctx)
    return ctx


def make_state(
    binding: PlaceholderBinding,
    config: HasteConfig,
    size: Callable[[Any], int] = int,
    grid: Grid | None = None,
) -> list[Tensor]:
    """Fresh tensors for a rewritten graph's state inputs: first video, slot 0, thresholds as configured."""
    state = []
    for node, wanted in zip(binding.nodes, binding.inputs, strict=True):
        fake = _torch.fake_value(node)
        tensor = torch.zeros([size(n) for n in fake.shape], dtype=fake.dtype)
        if wanted.field == "ctl":
            tensor[Ctl.EPOCH] = 1
        elif wanted.field == "top_p":
            tensor.fill_(config.top_p)
        elif wanted.field == "delta":
            tensor.fill_(config.delta)
        elif wanted.field in ORDER_FIELDS and grid is not None:
            tensor.copy_(order_tensor(wanted.field, config.token_order, grid, config.block_size))
        state.append(tensor)
    return state


class Rewriting:
    """A Dynamo backend that runs the passes and then ``inner``, with state of its own for each size.

    Attributes:
        contexts: of each compiled graph.
        states: of each compiled graph, by the values of its symbolic sizes: field tensors in input order.
    """

    def __init__(self, config: HasteConfig = SMALL, inner: str = "eager") -> None:
        self.config, self.inner = config, inner
        self.contexts: list[PassContext] = []
        self.states: list[dict[tuple[int, ...], list[Tensor]]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = _torch.copy_graph(gm)
        ctx = rewrite(graph, self.config)
        assert isinstance(binding := ctx.binding, PlaceholderBinding)
        sizes, states = _torch.SizeReader(gm), {}
        self.contexts.append(ctx)
        self.states.append(states)
        fakes = [_torch.fake_value(node) for node in binding.nodes]
        compiled = _torch.inner_compiler(self.inner, None)(graph, [*inputs, *fakes])

        def run(*args: Any) -> Any:
            key = sizes.symbols(args)
            if key not in states:
                states[key] = make_state(binding, self.config, lambda n: sizes.size(n, args), ctx.order.grid)
            return compiled(*args, *states[key])

        return run

    def counters(self, graph: int = 0) -> list[Tensor]:
        """[S, B, H, 8] of every site of the only size that a graph ran with."""
        assert isinstance(binding := self.contexts[graph].binding, PlaceholderBinding)
        (state,) = self.states[graph].values()
        return [t for t, wanted in zip(state, binding.inputs, strict=True) if wanted.field == "counters"]


class ToyAttention(nn.Module):
    """Projections, ``scaled_dot_product_attention``, output projection; ``options`` go to the attention call.

    Args:
        heads, kv_heads, dim: heads of queries, heads of keys and values, head dim.
        context: keys and values come from ``forward``'s second argument.
    """

    def __init__(
        self,
        *,
        heads: int = 2,
        kv_heads: int | None = None,
        dim: int = 64,
        context: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        self.heads, self.kv_heads, self.dim, self.context, self.options = (
            heads,
            kv_heads,
            dim,
            context,
            options,
        )
        self.to_q = nn.Linear(heads * dim, heads * dim)
        self.to_k = nn.Linear(heads * dim, kv_heads * dim)
        self.to_v = nn.Linear(heads * dim, kv_heads * dim)
        self.to_out = nn.Linear(heads * dim, heads * dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = context if self.context else x
        assert source is not None
        q = self.to_q(x).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k = self.to_k(source).unflatten(-1, (self.kv_heads, self.dim)).transpose(1, 2)
        v = self.to_v(source).unflatten(-1, (self.kv_heads, self.dim)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.to_out(out.transpose(1, 2).flatten(2))


class ToyModel(nn.Module):
    """Residual blocks, so that each attention has a module path: ``blocks.0``, ``blocks.1``, …"""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x, *context)
        return x


def toy(*attention_options: dict[str, Any]) -> ToyModel:
    """A model of ``ToyAttention`` blocks in eval mode with fixed weights, one for each set of options."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyModel(*(ToyAttention(**options) for options in attention_options)).eval()


class ToyVideo(nn.Module):
    """A video transformer in small: patch embedding, positions, attention blocks, unpatchify.

    Args:
        inside: runs on the tokens [B, N, C] between the two blocks.
    """

    def __init__(self, inside: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 128, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.first, self.second = toy({}), toy({})
        self.out = nn.Linear(128, 16)
        self.positions = nn.Parameter(torch.randn(1, 300, 128))
        self.inside = inside

    def forward(self, latents: Tensor) -> Tensor:
        grid = self.patch(latents)
        batch, _, *sides = grid.shape
        x = grid.flatten(2).transpose(1, 2).contiguous()
        x = self.first(x + self.positions[:, : x.shape[1]])
        if self.inside is not None:
            x = self.inside(x)
        y = self.out(self.second(x)).reshape(batch, *sides, 1, 2, 2, 4)
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def toy_video(inside: Callable[[Tensor], Tensor] | None = None) -> ToyVideo:
    """A ``ToyVideo`` in eval mode with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyVideo(inside).eval()


def latents(frames: int = 4, height: int = 12, width: int = 20, *, batch: int = 1) -> Tensor:
    """Random input of a ``ToyVideo``; the default has 4×6×10 = 240 tokens: four blocks of 64, one ragged."""
    shape = (batch, 4, frames, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(count: int = 200, features: int = 128, *, batch: int = 1, seed: int = 0) -> Tensor:
    """Random activations [batch, count, features]."""
    return torch.randn(batch, count, features, generator=torch.Generator().manual_seed(seed))
