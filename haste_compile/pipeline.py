"""``optimize``: compile a pipeline's transformers in place with the haste backend, and undo it."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from haste_compile import _torch, backend, state
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, StateError
from haste_compile.explanation import Explanation, explain
from haste_compile.loading import find_transformers, repeated_blocks
from haste_compile.report import GraphReport, SiteRecord
from haste_compile.state import Attachment, Statistics
from haste_compile.step_hook import StepHook

logger = logging.getLogger(__name__)


def optimize(
    pipe_or_transformer: Any,
    *,
    compile: Literal["whole", "blocks"] = "whole",
    mode: str | None = None,
    dynamic: bool | None = False,
    **options: Any,
) -> Handle:
    """Compile the self-attention of a pipeline's transformers to adaptive block-sparse attention, in place.

    The pipeline keeps its modules and its type: only ``Module.compile`` is used, so LoRA, offloading,
    schedulers and callbacks go on working. Compilation itself happens at the first call.

    Args:
        pipe_or_transformer: a diffusers pipeline (``transformer``, and ``transformer_2`` for Wan 2.2), or
            one transformer module.
        compile: "whole" traces each transformer as one graph. "blocks" compiles one block and reuses it for
            all: the first call is much faster, later calls a little slower.
        mode: mode of ``torch.compile`` for the inner compiler, such as "reduce-overhead".
        dynamic: as in ``torch.compile``; False compiles once for each video size.
        options: fields of ``HasteConfig``.

    Returns:
        A handle to look at the result and to undo it; also a context manager that undoes it at the end.

    Raises:
        OptionError: an unknown or bad option, or nothing to compile in the argument.
        StateError: a transformer is compiled already, by ``optimize`` or otherwise.
        ProfileError: ``profile`` is damaged, or calibrated for other weights.
    """
    config = HasteConfig.from_options(options)
    if compile not in ("whole", "blocks"):
        raise OptionError(
            found=repr(compile),
            wanted="'whole' or 'blocks'",
            where="option compile",
            fix="Correct the value.",
        )
    transformers = find_transformers(pipe_or_transformer)
    targets = {
        name: [transformer]
        if compile == "whole"
        else repeated_blocks(transformer, f"optimize(compile='blocks'), {name}")
        for name, transformer in transformers.items()
    }
    for name, transformer in transformers.items():
        modules = [transformer, *targets[name]]
        if any(_torch.is_compiled(module) for module in modules):
            raise StateError(
                found="a transformer that is compiled already",
                wanted="one that is not",
                where=f"optimize(), {name}",
                fix="Call restore() on the earlier handle, or do not compile it yourself.",
            )
    if config.profile is not None:
        from haste_compile.calibration.use import check_pipeline

        check_pipeline(pipe_or_transformer, transformers, config.profile)
    compiler = _backend(config, mode)
    attachments: list[Attachment | StepHook] = []
    for name, transformer in transformers.items():
        backend.forget_reports(transformer)  # of an earlier handle, as are the figures
        state.reset(transformer)
        if compile == "blocks":
            attachments.append(Attachment(transformer, targets[name], config))
        if config.dense_steps and hasattr(transformer, "cache_context"):
            attachments.append(StepHook(transformer))
    compiled = [module for modules in targets.values() for module in modules]
    handle = Handle(pipe_or_transformer, config, transformers, compiled, attachments)
    for module in compiled:
        module.compile(backend=compiler, dynamic=dynamic)
        _torch.watch_compiled(module, handle._never_silently_dense)
    return handle


class Handle:
    """What ``optimize`` returns: the state of the compiled transformers, and the way back.

    Attributes:
        config: the options, validated and complete.
        transformers: component name -> module.
    """

    def __init__(
        self,
        target: Any,
        config: HasteConfig,
        transformers: dict[str, nn.Module],
        compiled: list[nn.Module],
        attachments: list[Attachment | StepHook],
    ) -> None:
        self.config, self.transformers = config, transformers
        self._target, self._compiled, self._attachments = target, compiled, attachments
        self._uncompiled_calls = 0

    def reports(self) -> dict[str, list[GraphReport]]:
        """What became of the attention sites of each graph that ran so far: none before the first call."""
        return {name: backend.reports(module, self.config) for name, module in self.transformers.items()}

    def sites(self) -> dict[str, tuple[SiteRecord, ...]]:
        """Every attention site once, as the newest graph that holds it treats it; none before a call."""
        return {name: _newest_sites(reports) for name, reports in self.reports().items()}

    def statistics(self) -> dict[str, Statistics]:
        """Densities and refresh rates of the videos still remembered. Reads the device."""
        return {
            name: state.statistics_of(s for s in state.states_of(module) if s.config == self.config)
            for name, module in self.transformers.items()
        }

    def explain(self, *, height: int, width: int, num_frames: int) -> dict[str, Explanation]:
        """What a video of that size would become under these options; see ``haste_compile.explain``."""
        options = self.config.to_options()
        return explain(self._target, height=height, width=width, num_frames=num_frames, **options)

    def summary(self) -> str:
        """Sites, density and refresh rate of each transformer, as text for people. Reads the device."""
        lines = []
        statistics = self.statistics()
        for name, sites in self.sites().items():
            if not sites:
                lines.append(f"{name}: not called yet, nothing is compiled")
                continue
            reasons = sorted(site.reason for site in sites if site.status == "skipped")
            lines.append(f"{name}: {len(sites) - len(reasons)} attention sites rewritten")
            lines += [f"  left dense {reasons.count(reason)} × {reason}" for reason in dict.fromkeys(reasons)]
            orders = (line for report in self.reports()[name] for line in report.order_lines())
            lines += [f"  {line}" for line in dict.fromkeys(orders)]
            figures = statistics[name]
            if figures.calls:
                lines.append(
                    f"  density {figures.density:.1%} of query-key pairs, masks rebuilt in "
                    f"{figures.refresh_rate:.1%} of {figures.calls} head calls"
                )
        if self._uncompiled_calls:
            lines.append(f"dense, because Dynamo ran them uncompiled: {self._uncompiled_calls} calls")
        return "\n".join(lines)

    def _never_silently_dense(self, call: Callable[[], Any]) -> Any:
        """Make a call of a compiled module and tell whether Dynamo ran it uncompiled, hence dense.

        It does so without an error once a module has as many graphs as ``recompile_limit`` allows.

        Raises:
            StateError: it did, and the options say ``strict``.
        """
        before = backend.graph_calls()
        result = call()
        if backend.graph_calls() != before:
            return result
        dense = StateError(
            found="a call that Dynamo ran uncompiled, so with dense attention",
            wanted=f"a graph; {torch._dynamo.config.recompile_limit} are kept of each module",
            where="optimize()",
            fix="Raise torch._dynamo.config.recompile_limit above the number of video sizes in one process.",
        )
        if self.config.strict:
            raise dense
        if not self._uncompiled_calls:
            logger.warning("haste: %s", dense)
        self._uncompiled_calls += 1
        return result

    def reset(self) -> None:
        """Forget every mask. Not needed between videos: they are told apart without help."""
        for module in self.transformers.values():
            state.reset(module)

    def restore(self) -> None:
        """Make the transformers what they were: eager and dense. A second call does nothing."""
        for module in self._compiled:
            _torch.undo_compile(module)
        for attachment in self._attachments:
            attachment.detach()
        self._compiled, self._attachments = [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _newest_sites(reports: list[GraphReport]) -> tuple[SiteRecord, ...]:
    found: dict[tuple[str, int], SiteRecord] = {}
    for report in reports:
        met = collections.Counter[str]()
        for site in report.sites:  # one module may attend twice: image-to-video's, to text and to the image
            found[site.name, met[site.name]] = site
            met[site.name] += 1
    return tuple(found.values())


@functools.cache
def _backend(config: HasteConfig, mode: str | None) -> Callable[..., Any]:
    # One object for equal options: Dynamo shares graphs only between calls with the same backend object.
    return functools.partial(backend.haste, mode=mode, options=config.to_options())
