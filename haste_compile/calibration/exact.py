"""The paper's form: the model once more for every head and candidate, that head sparse, all others dense.

The layers before the probed one compute what they computed in the dense run, so the model is re-run from
the probed layer on: (L + 1) / 2L of the work on average. Within the probed layer all its heads are attended
sparse once for each candidate, and then exchanged one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.calibration import objective, states
from haste_compile.calibration.intercept import Interception, attend_dense
from haste_compile.calibration.plan import Plan, Unit
from haste_compile.predictors import get_predictor


def measure(interception: Interception, plan: Plan, unit: Unit, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Error and sparsity of the heads of one layer that drew this unit's video.

    Returns:
        ``errors`` and ``sparsity``, fp64 [H, K]; NaN for heads that drew another video.
    """
    device = next(interception.transformer.parameters()).device
    expert, candidates = plan.experts[unit.expert], plan.settings.measured
    assert unit.layer is not None
    block = expert.layers[unit.layer]
    mine = [h for h, video in enumerate(expert.assigned[unit.layer]) if video == unit.video]
    inputs = states.state_inputs(kept, unit, device)
    dense = interception.record(inputs, unit.state)

    probed = _ProbedLayer(plan, block)
    errors = torch.full((expert.heads, len(candidates)), float("nan"), dtype=torch.float64)
    sparsity = errors.clone()
    for head in mine:
        for k in range(len(candidates)):
            probed.head, probed.candidate = head, k
            output = interception.run_from(block, inputs, probed.attend)
            difference = output.float() - dense.float()
            errors[head, k] = objective.weighted_error(difference, dense, plan.settings.weights)
            sparsity[head, k] = probed.sparsity[k][head]
    return {"errors": errors, "sparsity": sparsity}


class _ProbedLayer:
    """Attention in which one head of one block is sparse.

    Attributes:
        head, candidate: which head, and which threshold.
        sparsity: of every candidate, fp64 [H]; filled at the first call.
    """

    def __init__(self, plan: Plan, block: int) -> None:
        self.plan, self.block = plan, block
        self.head = self.candidate = 0
        self.sparsity: list[Tensor] = []
        self._dense: Tensor | None = None
        self._sparse: list[Tensor] = []

    def attend(self, block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if block != self.block:
            return attend_dense(block, q, k, v, scale)
        if self._dense is None:  # the same queries, keys and values reach this layer every time
            self._dense = attend_dense(block, q, k, v, scale)
            self._attend_sparse(q, k, v)
        out = self._dense.clone()
        out[:, self.head] = self._sparse[self.candidate][:, self.head]
        return out

    def _attend_sparse(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        predictor = get_predictor(self.plan.config.predictor)
        for top_p in self.plan.settings.measured:
            heads = torch.full((q.shape[1],), top_p, device=q.device)
            out, pairs = predictor.attend_once(q, k, v, heads, self.plan.config)
            self._sparse.append(out)
            self.sparsity.append(1.0 - pairs.sum(0).double().cpu() / (q.shape[0] * q.shape[2] ** 2))
