"""The two forms of measuring: the gradient form must rank heads and candidates as the paper's does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from scipy.stats import spearmanr
from tiny_calibration import OPTIONS, PROMPTS, REQUEST

import haste_compile
from haste_compile.calibration import exact, gradient
from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.plan import Unit, make_plan
from haste_compile.calibration.run import make_settings
from haste_compile.calibration.states import record_video
from haste_compile.config import HasteConfig
from haste_compile.generation import NANO_OPTIONS, NANO_REQUEST
from haste_compile.loading import NANO_WAN, load_pipeline
from haste_compile.predictors import get_predictor

FORM = {"candidates": (0.3, 0.5, 0.7), "budget": "shared:0.5", "videos": 1, "intervals": 2}


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    """Profiles of both forms over the same draws, with many probes."""
    pipe = tiny_wan.build_pipeline()
    return {
        method: haste_compile.calibrate(
            pipe, PROMPTS, method=method, request=REQUEST, options=OPTIONS, probes=64, **FORM
        ).experts["transformer"]
        for method in ("gradient", "exact")
    }


def test_errors_agree(both: dict[str, Any]) -> None:
    gradient_errors, exact_errors = both["gradient"].errors, both["exact"].errors
    assert spearmanr(gradient_errors.ravel(), exact_errors.ravel()).statistic >= 0.9
    # 64 probes × 4 states: a relative deviation of some 10 %, and what is not linear.
    np.testing.assert_allclose(gradient_errors, exact_errors, rtol=0.5)


def test_sparsities_are_equal(both: dict[str, Any]) -> None:
    np.testing.assert_array_equal(both["gradient"].sparsities, both["exact"].sparsities)
    assert (np.diff(both["gradient"].sparsities, axis=-1) <= 0).all()


def test_exact_against_the_whole_model() -> None:
    """One head, one candidate, one state: the model with that head sparse, run from the start."""
    pipe = tiny_wan.build_pipeline()
    config = HasteConfig.from_options({**OPTIONS, "inner": "eager"})
    settings = make_settings(method="exact", branches="conditional", **FORM)
    plan = make_plan(pipe, PROMPTS, REQUEST, config, settings)
    with Interception(pipe.transformer, config) as interception:
        kept = record_video(pipe, {"transformer": interception}, plan, 0, lambda _step: None)
        unit = plan.units()[0]
        assert isinstance(unit.layer, int)
        found = exact.measure(interception, plan, unit, kept)
        inputs = {
            name.removeprefix(f"{unit.state}.input."): x
            for name, x in kept.items()
            if f"{unit.state}.input." in name
        }
        dense = interception.run(inputs)

        def attend(block: int, q: Any, k: Any, v: Any, scale: float) -> Any:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            if block == unit.layer:
                sparse, _ = get_predictor("xattention").attend_once(q, k, v, torch.full((2,), 0.3), config)
                out = torch.cat([out[:, :1], sparse[:, 1:]], dim=1)
            return out

        error = interception.run(inputs, attend) - dense
    spectrum = np.abs(np.fft.fftn(error.double().numpy(), axes=(2, 3, 4), norm="ortho")) ** 2
    high = [np.abs(np.fft.fftfreq(n)) >= 0.25 for n in error.shape[2:]]
    weight = np.where(high[0][:, None, None], 0.01, 1.0) * np.ones(error.shape[2:])
    weight[~high[0][:, None, None] & (high[1][:, None] | high[2])[None]] = 0.5
    wanted = (spectrum * weight).sum() / float(dense.double().square().sum())
    assert found["errors"][1, 0].item() == pytest.approx(wanted, rel=1e-3)


def test_nothing_is_linear_in_the_probes_but_their_number() -> None:
    """Probes come from the seed and the state's name alone: asked twice, measured twice the same."""
    pipe = tiny_wan.build_pipeline()
    config = HasteConfig.from_options({**OPTIONS, "inner": "eager"})
    plan = make_plan(pipe, PROMPTS, REQUEST, config, make_settings(**FORM, probes=2))
    with Interception(pipe.transformer, config) as interception:
        kept = record_video(pipe, {"transformer": interception}, plan, 0, lambda _step: None)
        unit, other = plan.units()[:2]
        once, twice = (gradient.measure(interception, plan, unit, kept)["products"] for _ in range(2))
        elsewhere = gradient.measure(interception, plan, other, kept)["products"]
        more = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, probes=3))
        three = gradient.measure(interception, more, unit, kept)["products"]
    assert torch.equal(once, twice) and not torch.equal(once, elsewhere)
    assert torch.equal(three[:2], once) and three.shape == (3, tiny_wan.LAYERS, tiny_wan.HEADS, 3)


def test_forms_agree_on_nano_wan() -> None:
    """Trained weights, a video half as long: one state, eight heads of four layers, three candidates.

    Of one state few probes are noise: eight at a time correlate by 0.85 to 0.97, 32 by 0.98.
    """
    pipe = load_pipeline(NANO_WAN, device=torch.device("cpu"), dtype=torch.float32)
    config = HasteConfig.from_options({**NANO_OPTIONS, "dense_steps": 0, "inner": "eager"})
    request = dataclasses.replace(NANO_REQUEST, steps=2, guidance=1.0, frames=17)
    settings = {"candidates": (0.6, 0.8, 0.95), "budget": "shared:0.8", "videos": 1, "intervals": 1}
    prompts = [NANO_REQUEST.prompt]
    plans = {
        method: make_plan(
            pipe, prompts, request, config,
            make_settings(method=method, branches="conditional", probes=32, **settings),
        )
        for method in ("gradient", "exact")
    }  # fmt: skip
    probed = {1: (0, 3), 4: (2, 4), 6: (1, 5), 7: (0, 2)}
    some = dataclasses.replace(
        plans["exact"].experts["transformer"],
        assigned=tuple(
            tuple(0 if h in probed.get(layer, ()) else 99 for h in range(6)) for layer in range(8)
        ),
    )
    plans["exact"] = dataclasses.replace(plans["exact"], experts={"transformer": some})
    with Interception(pipe.transformer, config) as interception:
        kept = record_video(pipe, {"transformer": interception}, plans["gradient"], 0, lambda _step: None)
        (state,) = plans["gradient"].units()
        products = gradient.measure(interception, plans["gradient"], state, kept)["products"]
        by_probes = products.square().mean(0)
        a, b = [], []
        for layer, heads in probed.items():
            unit = Unit("transformer", 0, state.step, 0, layer)
            errors = exact.measure(interception, plans["exact"], unit, kept)["errors"]
            assert errors.isfinite().any(1).nonzero().flatten().tolist() == list(heads)
            a += by_probes[layer, list(heads)].flatten().tolist()
            b += errors[list(heads)].flatten().tolist()
    assert len(a) == 24
    assert spearmanr(a, b).statistic >= 0.95
