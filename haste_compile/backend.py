"""The ``haste`` backend of ``torch.compile``: graph → PASSES → inner compiler → callable with state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from haste_compile import _torch
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError, StateError
from haste_compile.kernel_compilation import compiling_kernels
from haste_compile.passes import PassContext, PlaceholderBinding, StateInput, run_passes
from haste_compile.passes.base import AttentionSite
from haste_compile.report import GraphReport
from haste_compile.state import CLOCK_INPUTS, HasteState, StateSpec, find_state, path_prefix
from haste_compile.step_hook import find_hook

logger = logging.getLogger(__name__)

_reports: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {_Record: GraphReport}
_graph_calls = threading.local()


def haste(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its self-attention made block-sparse.

    Args:
        gm: the graph; it is copied, never edited.
        example_inputs: its arguments.
        mode: a mode of ``torch.compile`` ("reduce-overhead", "max-autotune", ...) for the inner compiler.
        options: names and values of ``HasteConfig``.

    Raises:
        OptionError: bad options.
        NoAttentionSitesError: the graph holds no attention that a pass can see.
        UnsupportedSiteError: ``strict`` and a self-attention site cannot be rewritten.
        TokenOrderError: ``strict`` and the tokens cannot be put in the order asked for.
    """
    try:
        return _compile(gm, example_inputs, mode, HasteConfig.from_options(options))
    except HasteError as error:
        raise _torch.through_dynamo(error) from error.__cause__


def reports(module: nn.Module, config: HasteConfig | None = None) -> list[GraphReport]:
    """What became of the attention sites in every graph that a module ran through, oldest first.

    Args:
        module: a transformer; under regional compilation every block has a report of its own.
        config: only graphs compiled with these options.
    """
    return [
        report
        for parameter in module.parameters()
        for record, report in (_reports.get(parameter) or {}).items()
        if config is None or config == record.config
    ]


def graph_calls() -> int:
    """How many calls of graphs of this backend the present thread has made."""
    return getattr(_graph_calls, "count", 0)


def forget_reports(module: nn.Module) -> None:
    """Forget the graphs that a module ran through; those that it runs through again come back."""
    for parameter in module.parameters():
        _reports.pop(parameter, None)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, config: HasteConfig
) -> Callable[..., Any]:
    graph = _torch.copy_graph(gm)
    binding = PlaceholderBinding()
    context = PassContext(config=config, dialect="dynamo", binding=binding)
    run_passes(graph, context)

    anchor = _find_anchor(example_inputs)
    record = _Record(GraphReport.from_context(context), config)
    compile_inner = _torch.inner_compiler(config.inner, mode)
    if not record.report.rewritten:
        logger.warning(
            "haste: no attention site was rewritten, the whole graph stays dense.\n%s", record.report
        )
        unchanged = compile_inner(graph, list(example_inputs))
        return unchanged if anchor is None else record.around(unchanged, anchor)
    if context.order.reason:
        logger.warning(
            "haste: tokens stay in raster order instead of %s: %s", config.token_order, context.order.reason
        )
    if anchor is None:
        raise StateError(
            found="a graph without parameters among its inputs",
            wanted="the graph of a module, whose parameters tell one instance from another",
            where="the haste backend",
            fix="Compile the transformer module itself.",
        )
    dense: Callable[..., Any] | None = None
    host_tells = config.dense_steps > 0 and find_hook(example_inputs[anchor]) is not None
    fakes = [_torch.fake_value(node) for node in binding.nodes]
    with compiling_kernels(context):
        if host_tells and needs_dense_graph(context.rewritten[0].device):
            dense = compile_inner(_torch.copy_graph(gm), list(example_inputs))
        compiled = compile_inner(graph, [*example_inputs, *fakes])
    return record.around(_StatefulGraph(compiled, dense, gm, context, binding.inputs, anchor), anchor)


def needs_dense_graph(device: torch.device) -> bool:
    """Whether dense steps through our op run another kernel than a dense model; on the CPU it is the same."""
    return device.type != "cpu"


class _Record:
    """The report of one graph, entered for every module instance that runs it.

    Instances of equal shape share a graph, so who runs it is known at a call and not at compilation.
    """

    def __init__(self, report: GraphReport, config: HasteConfig) -> None:
        self.report, self.config = report, config

    def around(self, compiled: Callable[..., Any], anchor: int) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._enter(args[anchor])
            _graph_calls.count = graph_calls() + 1
            return compiled(*args)

        return call

    def _enter(self, parameter: Tensor) -> None:
        entries = _reports.get(parameter)
        if entries is None:
            entries = _reports[parameter] = {}
        if self not in entries:
            entries[self] = self.report.under(path_prefix(parameter))


class _StatefulGraph:
    """A compiled graph, called with the state of the module instance whose parameters it is called with.

    Launches device work and reads none of it back. Where a pipeline tells the step, dense warm-up steps run
    ``dense``, the graph as it came; elsewhere the op attends to all blocks in them.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        dense: Callable[..., Any] | None,
        gm: fx.GraphModule,
        context: PassContext,
        inputs: Sequence[StateInput],
        anchor: int,
    ) -> None:
        self._compiled, self._dense = compiled, dense
        self._inputs, self._anchor = tuple(inputs), anchor
        self._config, self._sites, self._grid = context.config, context.rewritten, context.order.grid
        self._sizes = _torch.SizeReader(gm)
        self._specs: dict[tuple[int, ...], tuple[StateSpec, ...]] = {}
        seen = _torch.argument_positions(gm, CLOCK_INPUTS)
        self._clock_inputs = tuple(seen.values()) if len(seen) == len(CLOCK_INPUTS) else None

    def __call__(self, *args: Any) -> Any:
        state = find_state(
            args[self._anchor],
            self._specs_for(args),
            self._config,
            sees_clock=self._clock_inputs is not None,
            arguments=args,
        )
        if self._clock_inputs is not None:
            state.clock.tick(*(args[position] for position in self._clock_inputs))
        if self._dense is not None and self._is_dense_step(args[self._anchor]):
            state.count_dense_call()
            output = self._dense(*args)
        else:
            output = self._compiled(*args, *self._state_tensors(state))
        if self._config.stats:
            state.record()
        return output

    def _is_dense_step(self, anchor: Tensor) -> bool:
        hook = find_hook(anchor)
        step = hook.step if hook is not None else None
        return step is not None and step < self._config.dense_steps

    def _specs_for(self, args: Sequence[Any]) -> tuple[StateSpec, ...]:
        key = self._sizes.symbols(args)
        if key not in self._specs:
            self._specs[key] = tuple(self._spec(site, args) for site in self._sites)
        return self._specs[key]

    def _spec(self, site: AttentionSite, args: Sequence[Any]) -> StateSpec:
        batch, heads, tokens, dim = (self._sizes.size(size, args) for size in site.shape)
        return StateSpec(site.label, batch, heads, tokens, dim, site.device, self._grid)

    def _state_tensors(self, state: HasteState) -> list[Tensor]:
        return [state.tensor(item.site_index, item.field) for item in self._inputs]


def _find_anchor(inputs: Sequence[Any]) -> int | None:
    """Position of the input that stands for the module instance: its first parameter."""
    return next((i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)), None)
