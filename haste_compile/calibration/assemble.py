"""From measured units to a profile: averages in the plan's order, budget, δ, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haste_compile import doctor
from haste_compile.calibration.drift import choose_delta
from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.calibration.plan import Plan, Unit, Video
from haste_compile.calibration.profile import CalibrationProfile, ExpertProfile
from haste_compile.calibration.scheduler import config_hash, describe_scheduler
from haste_compile.calibration.schema import OPTIONS
from haste_compile.config import threshold_row
from haste_compile.errors import ProfileError

Measured = Mapping[Unit, Mapping[str, Tensor]]


def assemble(
    pipe: Any, model: str, plan: Plan, transformers: Mapping[str, nn.Module], sites: Mapping[str, Any],
    measured: Measured, held_out: dict[str, Any] | None = None,
) -> CalibrationProfile:  # fmt: skip
    """The profile that the measured units give.

    Args:
        sites: of each expert, the rows' names and [B, H, N, D].
        measured: done units, in the plan's order; the profile is only as good as they are many.

    Raises:
        ProfileError: there is a head that no unit has measured yet.
        BudgetError: the budget cannot be met.
    """
    options = plan.config.to_options()
    return CalibrationProfile(
        model=model,
        pipeline=type(pipe).__name__,
        request={
            name: getattr(plan.request, name)
            for name in ("height", "width", "frames", "steps", "guidance", "negative_prompt")
        },
        scheduler=describe_scheduler(pipe.scheduler),
        options={name: _plain(options[name]) for name in OPTIONS},
        calibration={
            "settings": plan.to_dict()["settings"],
            "units_done": len(measured),
            "units_planned": len(plan.units()),
        },
        draws={"videos": [_draw(v) for v in plan.videos], "held_out": [_draw(v) for v in plan.held_out]},
        prompts={"count": len(plan.prompts), "sha256": plan.prompts_digest()},
        experts={
            name: _expert(plan, name, transformer, sites[name], measured)
            for name, transformer in transformers.items()
        },
        held_out=held_out,
        versions=doctor.versions(),
        device=doctor.device_name(next(next(iter(transformers.values())).parameters()).device),
    )


def _expert(
    plan: Plan,
    name: str,
    transformer: Any,
    sites: tuple[tuple[str, ...], tuple[int, ...]],
    measured: Measured,
) -> ExpertProfile:
    settings, expert = plan.settings, plan.experts[name]
    mine = {unit: tensors for unit, tensors in measured.items() if unit.expert == name}
    L, H = len(expert.layers), expert.heads
    products: np.ndarray | None = None
    if settings.method == "gradient":
        if not mine:
            raise _incomplete(name)
        stacked = torch.stack([tensors["products"] for tensors in mine.values()])
        products = stacked.flatten(0, 1).numpy()
        errors = np.square(products, dtype=np.float64).mean(0)
        sparsities = _ordered_mean([tensors["sparsity"].numpy() for tensors in mine.values()])
    else:
        errors, sparsities = (_by_layer(mine, table, L, name) for table in ("errors", "sparsity"))
    names, shape = sites
    profile = ExpertProfile(
        config_hash=config_hash(transformer.config),
        fingerprint=Fingerprint.of(transformer.parameters()),
        sites=names,
        tokens=shape[2],
        head_dim=shape[3],
        steps=expert.steps,
        states=len({unit.state for unit in mine}),
        candidates=np.array(settings.measured),
        errors=errors,
        sparsities=sparsities,
        top_p=np.full((L, H), settings.measured[0]),
        delta=_delta(plan, L, H, mine, errors),
        products=products,
        assigned=np.array(expert.assigned, np.int64) if expert.assigned else None,
    )
    allocated = profile.allocated(settings.budget, settings.allocator)
    if not settings.keep_products:
        allocated = allocated.without_products()
    return allocated


def _delta(plan: Plan, L: int, H: int, mine: Measured, errors: np.ndarray) -> np.ndarray:
    settings = plan.settings
    if settings.delta == "keep":
        rows = [threshold_row("delta", plan.config.delta, i, L, H) for i in range(L)]
        return np.array(rows, np.float64)
    # [states, A, L, H]; an age that reaches back before the first step is NaN there and left out.
    stale = np.stack([np.square(t["stale"].numpy(), dtype=np.float64).mean(0) for t in mine.values()])
    drift = np.stack([t["drift"].numpy().astype(np.float64) for t in mine.values()])
    reached = np.isfinite(stale).any((0, 2, 3))
    if not reached.any():
        return np.zeros((L, H))
    stale, drift = stale[:, reached], drift[:, reached]
    fresh = errors[..., len(settings.measured) // 2]
    return choose_delta(np.nanmean(drift, 0), np.nanmean(stale, 0), fresh, tolerance=settings.tolerance)


def _by_layer(mine: Measured, table: str, L: int, name: str) -> np.ndarray:
    """Means over the states of every head, [L, H, K]; a unit holds NaN for heads that are not its own."""
    rows = []
    for layer in range(L):
        seen = [tensors[table].numpy() for unit, tensors in mine.items() if unit.layer == layer]
        if not seen or not np.isfinite(np.stack(seen)).any(0).all():
            raise _incomplete(name)
        rows.append(np.nanmean(np.stack(seen), axis=0))
    return np.stack(rows)


def _ordered_mean(tables: list[np.ndarray]) -> np.ndarray:
    return np.stack(tables).mean(0)


def _draw(video: Video) -> dict[str, Any]:
    steps = {name: list(drawn) for name, drawn in video.steps.items()}
    return {"prompt": video.prompt, "seed": video.seed, "steps": steps}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _incomplete(name: str) -> ProfileError:
    return ProfileError(
        found=f"heads of {name} that no finished unit measured",
        wanted="every head measured at least once",
        where="calibration",
        fix="Repeat the command with more time; it goes on where it stopped.",
    )
