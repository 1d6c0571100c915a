"""The gradient form (ours): a few probes sent backwards give the error of every head and candidate at once.

Let d be the change of one head's attention output when it turns sparse, and J the Jacobian from there to the
velocity. To first order the output error is ε = J d, and E(ε) is the mean of ⟨g, J d⟩² = ⟨Jᵀ g, d⟩² over
probes g coloured by the band weights (``objective.colour``). One backward pass gives a = Jᵀ g at every head
of the model, and d is local: the same queries, keys and values attended dense and sparse. So P backward
passes replace L·H·K forwards. The products ⟨a, d⟩ of all heads also tell their joint error (``quadratic``).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from haste_compile.calibration import masks, objective, states
from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.plan import Plan, Unit
from haste_compile.predictors import get_predictor


def measure(interception: Interception, plan: Plan, unit: Unit, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that one state tells.

    Returns:
        ``products`` fp32 [P, L, H, K], inner products relative to the norm of the dense output;
        ``sparsity`` fp64 [L, H, K]; with ``delta="choose"`` also ``stale`` fp32 [P, A, L, H] and ``drift``
        fp32 [A, L, H], NaN for an age that reaches back too far.
    """
    device = next(interception.transformer.parameters()).device
    inputs = states.state_inputs(kept, unit, device)
    dense = interception.record(inputs, unit.state)
    scale = _probe_scale(dense)
    probes = [probe * scale for probe in _probes(dense, plan, unit)]
    gradients = interception.output_gradients(inputs, probes)

    layers = plan.experts[unit.expert].layers
    products, sparsity, stale = [], [], []
    for block in reversed(range(len(interception.blocks))):
        watch = _Site(interception, plan, unit, kept, layers.index(block)) if block in layers else None
        by_attention, gradients = interception.block_gradients(
            block, gradients, watch.observe if watch else _ignore
        )
        interception.calls[block] = None  # its memory
        if watch is not None:
            products.append(watch.products(by_attention, watch.changes) / scale)
            sparsity.append(watch.sparsity())
            stale.append(watch.products(by_attention, watch.stale_changes) / scale)
    interception.forget()
    measured = {
        "products": torch.stack(products[::-1], 1).cpu(),
        "sparsity": torch.stack(sparsity[::-1]).cpu(),
    }
    if plan.settings.delta == "choose":
        # [P, L, H, A] -> [P, A, L, H]
        measured["stale"] = torch.stack(stale[::-1], 1).permute(0, 3, 1, 2).contiguous().cpu()
        measured["drift"] = _drift(plan, unit, kept)
    return measured


def _probes(dense: Tensor, plan: Plan, unit: Unit) -> list[Tensor]:
    """The same on every device and rank: drawn on the host from the seed and the state's name."""
    digest = hashlib.sha256(f"{plan.settings.seed}/probes/{unit.state}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return [
        objective.colour(
            torch.randn(dense.shape, generator=generator).to(dense.device), dense, plan.settings.weights
        )
        for _ in range(plan.settings.probes)
    ]


def _probe_scale(dense: Tensor) -> float:
    """The power of two that brings a probe's entries near 1; it changes no digit of the products.

    A probe is relative to the norm of the output, so its entries are small, and gradients smaller still:
    float16 would lose them.
    """
    return 2.0 ** round(math.log2(max(float(dense.float().norm()), 1.0)))


def _ignore(_q: Tensor, _k: Tensor, _v: Tensor, _dense: Tensor) -> None:
    """A block that stays dense is not looked at."""


class _Site:
    """What one layer's heads would change in its attention output.

    Attributes:
        changes: sparse − dense, [B, H, N, D], for every candidate; ``stale_changes``: for every age.
    """

    def __init__(
        self, interception: Interception, plan: Plan, unit: Unit, kept: dict[str, Tensor], layer: int
    ) -> None:
        self.plan, self.unit, self.kept, self.layer = plan, unit, kept, layer
        self.changes: list[Tensor] = []
        self.stale_changes: list[Tensor] = []
        self.pairs: list[Tensor] = []
        self.tokens = 0

    def observe(self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> None:
        config = self.plan.config
        predictor = get_predictor(config.predictor)
        self.tokens = q.shape[2]
        for top_p in self.plan.settings.measured:
            heads = torch.full((q.shape[1],), top_p, device=q.device)
            out, pairs = predictor.attend_once(q, k, v, heads, config)
            self.changes.append(out.sub_(dense))
            self.pairs.append(pairs)
        if self.plan.settings.delta == "choose":
            for age in self.plan.settings.ages:
                mask = states.stale_masks(self.kept, self.unit, age, self.layer)
                if mask is None:
                    self.stale_changes.append(torch.full_like(dense, float("nan")))
                else:
                    self.stale_changes.append(masks.attend(mask, q, k, v, config).sub_(dense))

    def products(self, gradients: list[Tensor], changes: list[Tensor]) -> Tensor:
        """⟨a, d⟩ of every probe, head and change: fp32 [P, H, len(changes)]."""
        if not changes:
            return torch.empty(0)
        rows = [
            torch.stack([(a.float() * d.float()).sum((0, 2, 3)) for d in changes], dim=-1) for a in gradients
        ]
        return torch.stack(rows)

    def sparsity(self) -> Tensor:
        """Share of the query-key pairs that each head and candidate skips: fp64 [H, K]."""
        batch = self.pairs[0].shape[0]
        kept = torch.stack([pairs.sum(0) for pairs in self.pairs], dim=-1)
        return 1.0 - kept.double() / (batch * self.tokens**2)


def _drift(plan: Plan, unit: Unit, kept: dict[str, Tensor]) -> Tensor:
    expert = plan.experts[unit.expert]
    missing = torch.full((len(expert.layers), expert.heads), float("nan"))
    found: list[Any] = []
    for age in plan.settings.ages:
        there = f"{unit.state}.drift.{age}" in kept
        found.append(states.drift(kept, unit, age) if there else missing)
    return torch.stack(found)
