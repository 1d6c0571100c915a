"""A Wan transformer as a graph with explicit state: torch.export, then the passes of live graphs."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.artifacts.manifest import Size, TensorLayout
from haste_compile.config import HasteConfig
from haste_compile.errors import ArtifactError
from haste_compile.explanation import example_inputs
from haste_compile.kernels import functional, traced
from haste_compile.passes import BufferBinding, PassContext, run_passes
from haste_compile.passes.base import AttentionSite, StateInput
from haste_compile.predictors import get_predictor
from haste_compile.predictors.base import THRESHOLDS, OpCall
from haste_compile.report import GraphReport
from haste_compile.state import StateSpec

Form = Literal["live", "named", "plain", "triton"]


@dataclasses.dataclass(frozen=True)
class _Replacement:
    """What stands for a predictor's two ops in one of the forms.

    Attributes:
        refresh: takes the op's arguments; returns the new state, or nothing where it works in place.
        attention: takes the op's arguments and returns the output alone; None keeps the op.
        in_place: ``refresh`` updates its arguments.
    """

    refresh: Callable[..., Any]
    attention: Callable[..., Any] | None
    in_place: bool


#: Refresh op -> form -> what replaces it and its attention op. "live" replaces nothing.
_REPLACEMENTS: dict[Any, dict[Form, _Replacement]] = {
    torch.ops.haste.refresh_mask_.default: {
        "named": _Replacement(torch.ops.haste.refresh_mask.default, None, in_place=False),
        "plain": _Replacement(functional.refresh_mask, functional.block_sparse_attention, in_place=False),
        "triton": _Replacement(traced.refresh_mask_, traced.block_sparse_attention, in_place=True),
    }
}


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """A traced and rewritten transformer, ready for a format to write.

    Attributes:
        size: the video size that it was traced for.
        config: options.
        thresholds: "top_p" and "delta", [sites][heads], as the graph holds them: constants.
        report: what became of every attention site.
        specs: what each rewritten site needs state for.
        inputs: the transformer's tensors in the order of its signature, then ``haste_ctl``.
        state: three tensors for each site, after the inputs.
        outputs: ``sample``.
        examples: tensors for ``inputs`` and ``state``: zeros, and the state of a first call.
        transformer: its class name and its config.
        vae_scales: frames and pixels for one latent position.
        device, dtype: where and in what it runs.
    """

    size: Size
    config: HasteConfig
    thresholds: dict[str, list[list[float]]]
    report: GraphReport
    specs: tuple[StateSpec, ...]
    inputs: tuple[TensorLayout, ...]
    state: tuple[TensorLayout, ...]
    outputs: tuple[TensorLayout, ...]
    examples: tuple[Tensor, ...]
    transformer: tuple[str, dict[str, Any]]
    vae_scales: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    _live: fx.GraphModule

    def module(self, form: Form, *, operator: str | None = None) -> fx.GraphModule:
        """The graph as a module that takes inputs and state by position; see the package for the forms.

        Args:
            operator: of ``torch.ops.haste_native``, which attends in the "triton" form.

        Raises:
            ArtifactError: the predictor's ops have no such form.
        """
        if form == "live":
            return self._live
        predictor = get_predictor(self.config.predictor)
        refresh, attention = predictor.refresh(self.config, 1.0), predictor.attention(self.config, 1.0)
        replacement = _REPLACEMENTS.get(refresh.op, {}).get(form)
        if replacement is None:
            raise ArtifactError(
                found=f"predictor {self.config.predictor!r}, whose op {refresh.op} runs as an op alone",
                wanted="a predictor whose ops can be spelled out, such as 'xattention'",
                where=f"the {form!r} form of an exported graph",
                fix="Export as 'torchscript', which keeps the ops, or with another predictor.",
            )
        options = {} if operator is None else {"operator": operator}
        return _replace(self._live, refresh, attention, replacement, options)

    def program(self, form: Form, *, operator: str | None = None) -> torch.export.ExportedProgram:
        """The same as an exported program."""
        with torch.no_grad():
            return torch.export.export(self.module(form, operator=operator), self.examples)


def capture(transformer: nn.Module, size: Size, vae_scales: tuple[int, int], config: HasteConfig) -> Captured:
    """Trace a transformer for one video size, rewrite its self-attention, make its state explicit.

    Args:
        transformer: in eval mode; it stays as it is.
        size: of the video.
        vae_scales: frames and pixels for one latent position.
        config: options.

    Raises:
        ArtifactError: it cannot be traced, or nothing in it can be rewritten.
        NoAttentionSitesError: the traced graph has no attention that a pass can see.
        UnsupportedSiteError: ``strict`` and a self-attention site cannot be rewritten.
    """
    module: Any = transformer
    examples = example_inputs(
        transformer, size.latent(vae_scales), batch=size.batch, text_tokens=size.text_tokens
    )
    tensors = {name: value for name, value in examples.items() if isinstance(value, Tensor)}
    try:
        with torch.no_grad():
            graph = _torch.flat_module(torch.export.export(transformer, (), examples))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ArtifactError(
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            wanted="a transformer that torch.export can trace",
            where=type(transformer).__name__,
            fix="Export the module as diffusers made it, for a size that it can run.",
        ) from error
    context = PassContext(config=config, dialect="export", binding=BufferBinding())
    run_passes(graph, context)
    sites = context.rewritten
    report = GraphReport.from_context(context)
    if not sites:
        raise ArtifactError(
            found=f"no attention site that can be rewritten:\n{report}\n",
            wanted="at least one",
            where=type(transformer).__name__,
            fix="Change the options so that a site fits.",
        )
    refresh = context.predictor.refresh(config, 1.0)
    ctl, state = _state_as_inputs(graph, sites, refresh)
    (sample,) = (_torch.fake_value(node) for node in _outputs(graph))
    return Captured(
        size=size,
        config=config,
        thresholds={field: [_threshold_row(graph, site, field) for site in sites] for field in THRESHOLDS},
        report=report,
        specs=tuple(_spec(site) for site in sites),
        inputs=(*(TensorLayout.of(n, x) for n, x in tensors.items()), TensorLayout.of("haste_ctl", ctl)),
        state=tuple(TensorLayout.of(name, value) for name, value in state.items()),
        outputs=(TensorLayout.of("sample", sample),),
        examples=(*tensors.values(), ctl, *state.values()),
        transformer=(type(transformer).__name__, _plain(dict(module.config))),
        vae_scales=vae_scales,
        device=sites[0].device,
        dtype=sites[0].dtype,
        _live=graph,
    )


def _spec(site: AttentionSite) -> StateSpec:
    batch, heads, tokens, dim = map(int, site.shape)
    return StateSpec(site.label, batch, heads, tokens, dim, site.device)


def _threshold_row(gm: fx.GraphModule, site: AttentionSite, field: str) -> list[float]:
    return gm.get_buffer(StateInput.of(site, field).name)[: int(site.shape[1])].tolist()


def _state_as_inputs(
    gm: fx.GraphModule, sites: list[AttentionSite], refresh: OpCall
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn the buffers that change into further inputs; thresholds stay what they are, constants.

    Returns:
        ``ctl`` and the state by name, as they are at a first call.
    """
    operands = [dict(zip(refresh.fields, site.inserted[0].args[2:], strict=True)) for site in sites]
    ctl: Any = operands[0]["ctl"]
    changing: list[Any] = [fields[name] for fields in operands for name in changing_fields(refresh)]
    last = gm.graph.find_nodes(op="placeholder")[-1]
    values: dict[str, Tensor] = {}
    for buffer in [ctl, *changing]:
        name = str(buffer.target)
        values[name] = gm.get_buffer(name)
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        last.meta = dict(buffer.meta)
        buffer.replace_all_uses_with(last)
        gm.graph.erase_node(buffer)
        delattr(gm, name)
    gm.recompile()
    return values.pop(str(ctl.target)), values


def changing_fields(refresh: OpCall) -> list[str]:
    """The state of one site that enters and leaves a graph, in order: all but clock and thresholds."""
    return [field for field in refresh.fields if field != "ctl" and field not in THRESHOLDS]


def _replace(
    live: fx.GraphModule,
    refreshing: OpCall,
    attending: OpCall,
    replacement: _Replacement,
    options: dict[str, Any],
) -> fx.GraphModule:
    """A copy of the graph with other calls in place of the two ops; ``options`` go to that of attention.

    Before:
        refresh = haste.refresh_mask_(q, k, ..., haste_0_mask, haste_0_anchors, haste_0_counters)
        attention = haste.block_sparse_attention(q, k, v, haste_0_mask, haste_ctl)
        return (sample,)
    After, unless the replacement works in place:
        new = haste.refresh_mask(q, k, ..., haste_0_mask, haste_0_anchors, haste_0_counters)
        attention = haste.block_sparse_attention(q, k, v, new[0], haste_ctl)
        return (sample, new[0], new[1], new[2])
    """
    gm = _torch.copy_graph(live)
    graph, state = gm.graph, []
    for refresh in graph.find_nodes(op="call_function", target=refreshing.op):
        operands = dict(zip(refreshing.fields, refresh.args[2:], strict=True))
        read = operands[attending.fields[0]]
        (attention,) = (user for user in read.users if user.target is attending.op)
        with graph.inserting_before(refresh):
            new = graph.call_function(replacement.refresh, refresh.args, refresh.kwargs)
            if not replacement.in_place:
                for i, field in enumerate(changing_fields(refreshing)):
                    part = graph.call_function(operator.getitem, (new, i))
                    attention.replace_input_with(operands[field], part)
                    state.append(part)
        graph.erase_node(refresh)
        if replacement.attention is not None:
            _replace_attention(graph, attention, replacement.attention, options)
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], *state),)
    gm.recompile()
    return gm


def _replace_attention(
    graph: fx.Graph, attention: fx.Node, target: Callable[..., Any], options: dict[str, Any]
) -> None:
    with graph.inserting_before(attention):
        out = graph.call_function(target, attention.args, {**attention.kwargs, **options})
    for item in list(attention.users):
        item.replace_all_uses_with(out)
        graph.erase_node(item)
    graph.erase_node(attention)


def _outputs(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    return output.args[0]


def _plain(value: Any) -> Any:
    """A config as JSON holds it; diffusers' bookkeeping (names with an underscore) stays out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
