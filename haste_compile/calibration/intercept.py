"""Step into a transformer's self-attention: every block a graph of its own, the attention node a function.

Calibration has to look at queries, keys and values, to exchange the attention of one head, to start again in
the middle of the model and to send gradients back through it, on any Wan transformer and without a copy of
its forward. So each of its repeated blocks is compiled by a backend of ours: the same passes as the live
backend find the attention site and decide whether it is eligible; the node becomes a call of ``_attend``; the
graph then runs as it is, in eager mode.

Two freedoms follow, since the callable that a backend returns is ours:

* a block may be answered from a recording instead of being run, which re-runs a model from the middle;
* a recorded block may be run again under autograd, one block at a time, so that the memory of a backward pass
  is that of one block, whatever the model's depth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

from haste_compile import _torch
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, StateError
from haste_compile.loading import repeated_blocks
from haste_compile.passes import PassContext, PlaceholderBinding, check_eligibility, find_attention_sites
from haste_compile.passes.base import AttentionSite

#: (block, q, k, v, scale) -> attention output; q, k, v and output are [B, H, N, D].
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

#: Kernels of dense attention under autograd. Of the fused ones only FlashAttention's can sum gradients in one
#: order; it takes no float32.
_BY_REPRODUCIBILITY = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]

#: (q, k, v, dense attention output) -> nothing; all without gradient.
Observe = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def attend_dense(_block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Interception:
    """A transformer whose blocks run through here, until ``detach``.

    Args:
        transformer: a diffusers transformer that names its ``_repeated_blocks``; its weights and its forward
            stay as they are.
        config: block size and least number of tokens decide which sites are eligible.
        name: for messages, "transformer" or "transformer_2".

    Attributes:
        default: computes the attention of every eligible site where a method below does not say otherwise.
        calls: the recorded call of every block.
        recorded: name of the state that ``calls`` and ``output`` are of; None without a recording.
        output: what the recorded run put out.
        blocks_run: blocks computed so far, a measure of cost.
        sites: of every block, path of the module that attends and [B, H, N, D]; None before the first call.

    Raises:
        StateError: the transformer is compiled already.
        OptionError: it names no repeated blocks.
    """

    def __init__(self, transformer: nn.Module, config: HasteConfig, name: str = "transformer") -> None:
        self.transformer, self.config, self.name = transformer, config, name
        self.blocks = repeated_blocks(transformer, f"calibration, {name}")
        for module in (transformer, *self.blocks):
            if _torch.is_compiled(module):
                raise StateError(
                    found="a transformer that is compiled already",
                    wanted="one that is not",
                    where=f"calibration, {name}",
                    fix="Call restore() on the handle, or calibrate before compiling.",
                )
        self.default: Attend = attend_dense
        self._attend: Attend | None = None
        self.calls: list[BlockCall | None] = [None] * len(self.blocks)
        self.recorded: str | None = None
        self.output: Tensor | None = None
        self.blocks_run = 0
        self.sites: list[Site | None] = [None] * len(self.blocks)
        paths = {module: path for path, module in transformer.named_modules()}
        self._paths = [paths[block] for block in self.blocks]
        self._recording = False
        self._answers: dict[int, Any] = {}
        self._entered = 0
        # Which layers stay dense is the plan's to know: a block's graph cannot tell its number.
        compiler = _compiler(dataclasses.replace(config, dense_layers=()))
        for index, block in enumerate(self.blocks):
            for parameter in block.parameters():
                _intercepted[parameter] = (weakref.ref(self), index)
            block.compile(backend=compiler, dynamic=False)

    def detach(self) -> None:
        """Make the transformer what it was."""
        for block in self.blocks:
            _torch.undo_compile(block)
            for parameter in block.parameters():
                _intercepted.pop(parameter, None)

    def __enter__(self) -> Interception:
        return self

    def __exit__(self, *_error: object) -> None:
        self.detach()

    @torch.no_grad()
    def run(self, inputs: dict[str, Any], attend: Attend = attend_dense) -> Tensor:
        """One forward."""
        return self._forward(inputs, attend)

    @torch.no_grad()
    def record(self, inputs: dict[str, Any], name: str) -> Tensor:
        """One dense forward whose block calls are kept; nothing is run if it is the recorded one."""
        if self.recorded != name or self.output is None:
            self.forget()
            self._recording = True
            try:
                self.output = self._forward(inputs, attend_dense)
            finally:
                self._recording = False
            self.recorded = name
        return self.output

    def forget(self) -> None:
        """Give the recording's memory back."""
        self.calls = [None] * len(self.blocks)
        self.recorded = self.output = None

    @torch.no_grad()
    def run_from(self, first: int, inputs: dict[str, Any], attend: Attend) -> Tensor:
        """One forward in which the blocks before ``first`` are answered from the recording."""
        self._answers = {index: self._recorded(index).output for index in range(first)}
        try:
            return self._forward(inputs, attend)
        finally:
            self._answers = {}

    def output_gradients(self, inputs: dict[str, Any], probes: Sequence[Tensor]) -> list[Tensor]:
        """⟨probe, output⟩ differentiated by the last block's output, for every probe; runs no block."""
        last = len(self.blocks) - 1
        calls = [self._recorded(index) for index in range(len(self.blocks))]
        leaf = calls[last].hidden_output.detach().requires_grad_()
        self._answers = {index: call.output for index, call in enumerate(calls)}
        self._answers[last] = calls[last].with_output(leaf)
        try:
            with torch.enable_grad():
                output = self._forward(inputs, attend_dense)
        finally:
            self._answers = {}
        return [torch.autograd.grad(output, leaf, p.to(output.dtype), retain_graph=True)[0] for p in probes]

    def block_gradients(
        self, index: int, gradients: Sequence[Tensor], observe: Observe
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients by a block's attention output and by its input, from those by its output.

        The recorded call is run again under autograd; nothing of it outlives this method.

        Args:
            index: the block.
            gradients: by its output, one for each probe.
            observe: sees what the block's attention reads and puts out.

        Returns:
            by attention output [B, H, N, D], and by the block's input; the latter empty for block 0.
        """
        call = self._recorded(index)
        seen: list[Tensor] = []

        def watch(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            seen.append(attend_dense(block, q, k, v, scale))
            with torch.no_grad():
                observe(q.detach(), k.detach(), v.detach(), seen[0].detach())
            return seen[0]

        with torch.enable_grad(), sdpa_kernel(_BY_REPRODUCIBILITY, set_priority=True):
            hidden = call.hidden_input.detach().requires_grad_()
            output = call.run_again(hidden, watch, self)
            wanted = (seen[0],) if index == 0 else (seen[0], hidden)
            found = _reproducibly(
                lambda: [torch.autograd.grad(output, wanted, g, retain_graph=True) for g in gradients], hidden
            )
        return [g[0] for g in found], [g[1] for g in found if index > 0]

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around calls of the transformer: Dynamo keeps all their graphs, and every block came through here.

        Raises:
            StateError: Dynamo ran blocks as they are.
        """
        calls = 0

        def count(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            nonlocal calls
            calls += 1

        before = self._entered
        handle = self.transformer.register_forward_pre_hook(count)
        try:
            with _torch.many_graphs():
                yield
        finally:
            handle.remove()
        entered, wanted = self._entered - before, calls * len(self.blocks)
        if entered != wanted:
            raise StateError(
                found=f"{entered} of {wanted} calls of blocks that ran as compiled graphs",
                wanted="all of them",
                where=f"calibration, {self.name}",
                fix="Call torch.compiler.reset() first: Dynamo keeps few graphs of a function.",
            )

    def _forward(self, inputs: dict[str, Any], attend: Attend) -> Tensor:
        self._attend = attend
        try:
            with self.calling():
                output = self.transformer(**inputs)
        finally:
            self._attend = None
        return output[0] if isinstance(output, tuple) else output.sample

    def _recorded(self, index: int) -> BlockCall:
        call = self.calls[index]
        if call is None:
            raise StateError(
                found=f"no recorded call of block {index}",
                wanted="a recording",
                where=f"calibration, {self.name}",
                fix="Call record() first.",
            )
        return call

    def enter(self, index: int, graph: fx.GraphModule, site: Site, args: tuple[Any, ...]) -> Any:
        """What the compiled block ``index`` does when the transformer calls it."""
        self._entered += 1
        self.sites[index] = Site(f"{self._paths[index]}.{site.name}", site.shape)
        if index in self._answers:
            return self._answers[index]
        output = self.compute(index, graph, args)
        if self._recording:
            self.calls[index] = BlockCall(
                index, graph, args, output, self.calls[index - 1] if index else None
            )
        return output

    def compute(
        self, index: int, graph: fx.GraphModule, args: tuple[Any, ...], attend: Attend | None = None
    ) -> Any:
        self.blocks_run += 1
        with _running(attend or self._attend or self.default, index):
            return graph(*args)


@dataclasses.dataclass(frozen=True)
class Site:
    """An eligible attention site: path of its module, and [B, H, N, D] of its queries."""

    name: str
    shape: tuple[int, ...]


class BlockCall:
    """One call of a block's graph: enough to run it again.

    Attributes:
        output: as the graph returned it.
        hidden_output: the one tensor in it.
        hidden_input: the argument that the block before put out; block 0's largest activation.
    """

    def __init__(
        self, index: int, graph: fx.GraphModule, args: tuple[Any, ...], output: Any, before: BlockCall | None
    ) -> None:
        self.index, self.graph, self.args, self.output = index, graph, args, output
        tensors = [x for x in output if isinstance(x, Tensor)]
        if len(tensors) != 1:
            raise StateError(
                found=f"a block with {len(tensors)} outputs",
                wanted="one, the hidden states",
                where=f"calibration, block {index}",
                fix="Calibrate a Wan transformer.",
            )
        self.hidden_output = tensors[0]
        self.hidden_position = self._find_input(before)

    @property
    def hidden_input(self) -> Tensor:
        return self.args[self.hidden_position]

    def with_output(self, hidden: Tensor) -> Any:
        """The recorded output with another tensor in it."""
        return type(self.output)(hidden if x is self.hidden_output else x for x in self.output)

    def run_again(self, hidden: Tensor, attend: Attend, interception: Interception) -> Tensor:
        """The block's output for another input, with gradients only by that input."""
        # Parameters without gradient: their inputs need not be kept for a backward pass.
        args = [x.detach() if isinstance(x, Tensor) else x for x in self.args]
        args[self.hidden_position] = hidden
        output = interception.compute(self.index, self.graph, tuple(args), attend)
        return next(x for x in output if isinstance(x, Tensor))

    def _find_input(self, before: BlockCall | None) -> int:
        for position, value in enumerate(self.args):
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                continue
            if before is not None and value is before.hidden_output:
                return position
            if before is None and value.shape == self.hidden_output.shape:
                return position
        raise StateError(
            found="a block that does not read the output of the one before",
            wanted="blocks in a row",
            where=f"calibration, block {self.index}",
            fix="Calibrate a Wan transformer.",
        )


_intercepted: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (Interception, index of its block)


def _reproducibly(work: Callable[[], list[Any]], hidden: Tensor) -> list[Any]:
    """FlashAttention sums gradients in one order only where that is demanded; what cannot is let be."""
    half = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
    if not (half and torch.is_deterministic_algorithms_warn_only_enabled()):
        return work()
    torch.use_deterministic_algorithms(True)
    try:
        return work()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return work()


_active: list[tuple[Attend, int]] = []  # the blocks being computed, innermost last


@contextlib.contextmanager
def _running(attend: Attend, index: int) -> Iterator[None]:
    _active.append((attend, index))
    try:
        yield
    finally:
        _active.pop()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Stands in the graph where dense attention stood."""
    attend, index = _active[-1]
    return attend(index, q, k, v, scale)


@functools.cache
def _compiler(config: HasteConfig) -> Callable[..., Any]:
    # One object for equal options: Dynamo shares graphs only between calls with the same backend object.
    return functools.partial(_compile_block, config=config)


def _compile_block(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: HasteConfig
) -> Callable[..., Any]:
    graph = _torch.copy_graph(gm)
    context = PassContext(config=config, dialect="dynamo", binding=PlaceholderBinding())
    find_attention_sites(graph, context)
    check_eligibility(graph, context)
    sites = [site for site in context.sites if site.status == "eligible"]
    if len(sites) != 1:
        reasons = "; ".join(f"{site.label}: {site.reason}" for site in context.sites if site.reason)
        error = OptionError(
            found=f"{len(sites)} eligible self-attention sites in a block ({reasons})",
            wanted="one",
            where="calibration",
            fix="Choose a larger video, or a smaller block_size or min_tokens.",
        )
        raise _torch.through_dynamo(error)
    _replace(graph, sites[0])
    site = Site(sites[0].label, tuple(map(int, sites[0].shape)))
    anchor = next(i for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter))

    def call(*args: Any) -> Any:
        reference, index = _intercepted[args[anchor]]
        return reference().enter(index, graph, site, args)

    return call


def _replace(graph: fx.GraphModule, site: AttentionSite) -> None:
    with graph.graph.inserting_before(site.node):
        node = graph.graph.call_function(_attend, (site.q, site.k, site.v, site.scale))
    node.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(node)
    graph.graph.erase_node(site.node)
    graph.recompile()
