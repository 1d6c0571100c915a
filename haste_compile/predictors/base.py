"""What a mask predictor has to say, so that passes, state and statistics serve every predictor alike.

A predictor is two ops and the state between them. The first op brings the state of one site up to date, or
leaves it where temporal mask reuse says so; the second attends with it:

    refresh(q, k, <fields>, <options>)          mutates fields, returns nothing
    attention(q, k, v, <fields>, <options>)     pure, returns a tuple that begins with the output

Every site has the shared fields ``ctl``, ``top_p``, ``delta`` and ``counters``
(``haste_compile.kernels.layout``). The refresh op keeps the counters, where density and refresh rate are
read. A predictor adds fields of its own, each with a row for every slot, sample and head.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from haste_compile._torch import guarded
from haste_compile.config import HasteConfig
from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Counter, Ctl

Size: TypeAlias = "int | torch.SymInt"
Layout: TypeAlias = tuple[tuple[Size, ...], torch.dtype]

#: Fields that options of the same name fill, one value a head.
THRESHOLDS = ("top_p", "delta")

#: The ops' name for each rule of ``HasteConfig.reuse``; "after:k" has the clock force the first k steps.
RULES = {"tmr": "drift", "never": "never", "always": "freeze", "interval": "interval", "after": "freeze"}


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call of one of the two ops.

    Attributes:
        op: the overload.
        fields: state tensors, in the order in which they follow q, k (and v) as arguments.
        options: keyword arguments.
    """

    op: torch._ops.OpOverload
    fields: tuple[str, ...]
    options: dict[str, Any]


class Predictor(abc.ABC):
    """What decides which keys a query attends to. Keeps nothing: its answers follow from the options.

    Attributes:
        defaults: options that are other than ``HasteConfig``'s where the user gives none.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    @abc.abstractmethod
    def blocks(self, tokens: Size, config: HasteConfig) -> tuple[Size, Size]:
        """Rows and columns of a head's mask: blocks of queries and of keys."""

    @abc.abstractmethod
    def why_not(self, tokens: Size, config: HasteConfig) -> str | None:
        """Why a site of so many tokens has to stay dense, or None; may guard the graph on the answer."""

    @abc.abstractmethod
    def state(self, tokens: Size, dim: Size, config: HasteConfig) -> dict[str, Layout]:
        """The predictor's own fields: shape for one head of one sample in one slot, and dtype."""

    @abc.abstractmethod
    def refresh(self, config: HasteConfig, scale: float) -> OpCall:
        """How the state is brought up to date; ``scale``: the site's factor on q·k."""

    @abc.abstractmethod
    def attention(self, config: HasteConfig, scale: float) -> OpCall:
        """How attention reads the state; its fields are among those of the refresh."""

    def attend_once(
        self, q: Tensor, k: Tensor, v: Tensor, top_p: Tensor, config: HasteConfig
    ) -> tuple[Tensor, Tensor]:
        """What a site computes at the first step of a video, with fresh state that is then forgotten.

        Args:
            q, k, v: [B, H, N, D]; the scale is 1/√D.
            top_p: fp32 [H].

        Returns:
            out, like q; computed query-key pairs, int64 [B, H].
        """
        alone = dataclasses.replace(config, slots=1)
        state = {
            field: torch.zeros(tuple(map(int, shape)), dtype=dtype, device=q.device)
            for field, (shape, dtype) in site_layouts(self, tuple(q.shape), alone).items()
        }
        state["ctl"][Ctl.EPOCH] = 1
        state["top_p"][: top_p.numel()] = top_p
        scale = q.shape[3] ** -0.5
        refresh, attention = self.refresh(config, scale), self.attention(config, scale)
        refresh.op(q, k, *(state[field] for field in refresh.fields), **refresh.options)
        out = attention.op(q, k, v, *(state[field] for field in attention.fields), **attention.options)[0]
        return out, state["counters"][0, ..., Counter.KEPT]


def site_layouts(predictor: Predictor, shape: tuple[Size, ...], config: HasteConfig) -> dict[str, Layout]:
    """Shape and dtype of every state tensor of one site, in the order they enter a graph.

    Args:
        shape: [B, H, N, D] of the site's queries.
    """
    batch, heads, tokens, dim = shape
    leading = (config.slots, batch, heads)
    # AOTInductor folds mutable buffers of one element as constants: thresholds have two even for one head.
    thresholds = heads if guarded(heads > 1) else 2
    own = predictor.state(tokens, dim, config)
    return {
        "ctl": ((CTL_COLUMNS,), torch.int32),
        "top_p": ((thresholds,), torch.float32),
        "delta": ((thresholds,), torch.float32),
        **{field: ((*leading, *of_head), dtype) for field, (of_head, dtype) in own.items()},
        "counters": ((*leading, COUNTER_COLUMNS), torch.int64),
    }


def reuse_options(config: HasteConfig) -> dict[str, Any]:
    """The refresh op's options that say when a mask is reused (``kernels.drift_gate``)."""
    rule, k = config.reuse_rule
    return {
        "reuse": RULES[rule],
        "interval": k if rule == "interval" else 0,
        "max_age": config.max_age,
        "gate_low": config.gate[0],
        "gate_high": config.gate[1],
        "relative": config.relative_drift,
    }
