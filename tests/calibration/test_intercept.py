"""Into the middle of a real transformer: nothing changes, gradients are right, and out again."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_wan
import torch
from torch import Tensor

from haste_compile import _torch
from haste_compile.calibration.intercept import Interception, _reproducibly, attend_dense
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, StateError
from haste_compile.predictors import get_predictor

CONFIG = HasteConfig(block_size=64, min_tokens=64, stride=8)
INPUTS = tiny_wan.transformer_inputs()


@pytest.fixture(scope="module")
def dense() -> Tensor:
    with torch.no_grad():
        return tiny_wan.build_transformer()(**INPUTS)[0]


@pytest.fixture(scope="module")
def interception() -> Iterator[Interception]:
    torch._dynamo.reset()
    with Interception(tiny_wan.build_transformer(), CONFIG) as interception:
        interception.record(INPUTS, "state")
        yield interception


def test_intercepted_is_dense_bit_for_bit(interception: Interception, dense: Tensor) -> None:
    assert interception.output is not None and torch.equal(interception.output, dense)
    assert torch.equal(interception.run(INPUTS), dense)
    assert [site.name for site in interception.sites if site] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert interception.sites[0] is not None and interception.sites[0].shape == (1, 2, 320, 64)


def test_a_recording_is_not_run_twice(interception: Interception) -> None:
    before = interception.blocks_run
    interception.record(INPUTS, "state")
    assert interception.blocks_run == before


@pytest.mark.parametrize("first", [0, 1, 2])
def test_run_from_the_middle(interception: Interception, dense: Tensor, first: int) -> None:
    before = interception.blocks_run
    assert torch.equal(interception.run_from(first, INPUTS, attend_dense), dense)
    assert interception.blocks_run - before == tiny_wan.LAYERS - first


def test_attention_is_exchanged_where_asked(interception: Interception, dense: Tensor) -> None:
    seen: list[int] = []

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append(block)
        return attend_dense(block, q, k, v, scale) * (2.0 if block == 1 else 1.0)

    assert not torch.allclose(interception.run(INPUTS, attend), dense)
    assert seen == [0, 1]


def test_gradients_against_finite_differences(interception: Interception) -> None:
    """⟨a, d⟩ of every head against central differences through the whole model, within 2 %."""
    generator = torch.Generator().manual_seed(3)
    probes = [torch.randn(1, 4, 5, 16, 16, generator=generator) for _ in range(2)]
    gradients = interception.output_gradients(INPUTS, probes)
    top_p = torch.full((2,), 0.4)
    checked = 0
    for block in (1, 0):
        change: list[Tensor] = []

        def observe(q: Tensor, k: Tensor, v: Tensor, out: Tensor, change: list[Tensor] = change) -> None:
            assert not q.requires_grad and not out.requires_grad
            sparse, _ = get_predictor("xattention").attend_once(q, k, v, top_p, CONFIG)
            change.append(sparse - out)

        by_attention, gradients = interception.block_gradients(block, gradients, observe)
        for head in range(2):
            predicted = torch.stack([(a[:, head] * change[0][:, head]).sum() for a in by_attention])
            outputs = []
            for step in (0.05, -0.05):

                def attend(
                    index: int, q: Tensor, k: Tensor, v: Tensor, scale: float, head: int = head,
                    by: Tensor = step * change[0], block: int = block,
                ) -> Tensor:  # fmt: skip
                    out = attend_dense(index, q, k, v, scale).clone()
                    if index == block:
                        out[:, head] += by[:, head]
                    return out

                outputs.append(interception.run_from(block, INPUTS, attend))
            slope = (outputs[0] - outputs[1]) / 0.1
            measured = torch.stack([(slope * probe).sum() for probe in probes])
            scale = slope.norm() * probes[0].norm() / slope.numel() ** 0.5
            assert (predicted - measured).abs().max() < 0.02 * scale
            torch.testing.assert_close(predicted, measured, rtol=0.02, atol=0.002 * float(scale))
            checked += 1
    assert checked == 4


def test_weights_collect_no_gradients(interception: Interception) -> None:
    assert all(parameter.grad is None for parameter in interception.transformer.parameters())


def test_a_recording_is_needed_and_can_be_forgotten() -> None:
    fresh = Interception(tiny_wan.build_transformer(), CONFIG)
    with fresh, pytest.raises(StateError, match="no recorded call"):
        fresh.run_from(1, INPUTS, attend_dense)


def test_detach_leaves_nothing(dense: Tensor) -> None:
    transformer = tiny_wan.build_transformer()
    interception = Interception(transformer, CONFIG)
    interception.run(INPUTS)
    interception.detach()
    assert not any(_torch.is_compiled(module) for module in transformer.modules())
    before = interception.blocks_run
    with torch.no_grad():
        assert torch.equal(transformer(**INPUTS)[0], dense)
    assert interception.blocks_run == before


def test_two_transformers_of_one_shape_are_kept_apart() -> None:
    one, other = tiny_wan.build_transformer(0), tiny_wan.build_transformer(1)
    with torch.no_grad():
        wanted = [one(**INPUTS)[0], other(**INPUTS)[0]]
    with Interception(one, CONFIG, "transformer") as a, Interception(other, CONFIG, "transformer_2") as b:
        assert torch.equal(a.run(INPUTS), wanted[0])
        assert torch.equal(b.run(INPUTS), wanted[1])


def test_compiled_transformers_are_refused() -> None:
    transformer = tiny_wan.build_transformer()
    transformer.compile(backend="eager")
    with pytest.raises(StateError, match="compiled already"):
        Interception(transformer, CONFIG)


def test_other_modules_are_refused() -> None:
    with pytest.raises(OptionError, match="_repeated_blocks"):
        Interception(torch.nn.Linear(2, 2), CONFIG)


def test_a_site_that_stays_dense_is_an_error() -> None:
    torch._dynamo.reset()
    with (
        Interception(tiny_wan.build_transformer(), HasteConfig(min_tokens=1000)) as interception,
        pytest.raises(OptionError, match="fewer than min_tokens=1000"),
    ):
        interception.run(INPUTS)


def test_a_call_that_dynamo_runs_uncompiled_is_an_error() -> None:
    with (
        Interception(tiny_wan.build_transformer(), CONFIG) as interception,
        torch._dynamo.config.patch(disable=True),
        pytest.raises(StateError, match="0 of 2 calls of blocks"),
    ):
        interception.run(INPUTS)


@pytest.mark.parametrize("refused", ["no deterministic implementation", "out of memory", None])
def test_gradients_on_a_gpu_demand_one_order_where_there_is_one(refused: str | None) -> None:
    demanded: list[bool] = []

    def work() -> list[Any]:
        demanded.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        if refused is not None and demanded[-1]:
            raise RuntimeError(refused)
        return ["gradients"]

    hidden: Any = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if refused == "out of memory":
            with pytest.raises(RuntimeError, match=refused):
                _reproducibly(work, hidden)
        else:
            assert _reproducibly(work, hidden) == ["gradients"]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert demanded == ([True, False] if refused == "no deterministic implementation" else [True])
