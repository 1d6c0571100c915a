"""A bare ``torch.compile(pipe.transformer, backend="haste")`` in an ordinary ``WanPipeline``: no video leaks.

``test_isolation.py`` proves it for transformers in a sampler of its own; here diffusers drives the loop, with
its scheduler, guidance and callbacks, and nothing tells the backend where a video begins. Bits are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_wan
import torch
from torch import Tensor

from haste_compile.state import states_of, statistics

#: Reuse is on, and neither always nor never taken.
OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "stride": 8,
    "min_tokens": 64,
    "top_p": 0.7,
    "delta": 10.0,
    "inner": "eager",
}


class BrokenOffError(Exception):
    """What a callback raises in the middle of a video."""


@pytest.fixture(autouse=True)
def predictor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "predictor", getattr(request, "param", "xattention"))


#: Tests of what a predictor keeps run for each of them.
each_predictor = pytest.mark.parametrize("predictor", ["xattention", "svg2"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_pipeline(seed: int = 0) -> Any:
    pipe = tiny_wan.build_pipeline(seed)
    pipe.transformer = torch.compile(pipe.transformer, backend="haste", dynamic=False, options=OPTIONS)
    return pipe


def generate(
    pipe: Any, *, prompt: str = "a red circle moves left", seed: int = 0, steps: int = 4, **changes: Any
) -> Tensor:
    """Latents of one video."""
    call = {
        "num_frames": tiny_wan.FRAMES,
        "height": tiny_wan.HEIGHT,
        "width": tiny_wan.WIDTH,
        "guidance_scale": 4.0,
        **changes,
    }
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call).frames


def break_off(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        raise BrokenOffError
    return tensors


@each_predictor
def test_the_settings_exercise_reuse_and_sparsity() -> None:
    pipe = compiled_pipeline()
    generate(pipe)
    found = statistics(pipe.transformer)
    assert 0.2 < found.refresh_rate < 0.95
    assert 0.2 < found.density < 0.95


@pytest.mark.parametrize(
    "intruder",
    [
        {"prompt": "a blue square moves up"},
        {"seed": 5},
        {"steps": 6},
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.0},
        {"width": 192},
        {"num_frames": 9},
        {"prompt": "a blue square moves up", "callback_on_step_end": break_off},
        {"callback_on_step_end": break_off},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_video_a_is_the_same_after_video_b(intruder: dict[str, Any]) -> None:
    pipe = compiled_pipeline()
    first = generate(pipe)
    if "callback_on_step_end" in intruder:
        with pytest.raises(BrokenOffError):
            generate(pipe, **intruder)
    else:
        assert not torch.equal(generate(pipe, **intruder), first)
    assert torch.equal(generate(pipe), first)


@each_predictor
def test_guidance_branches_keep_state_of_their_own() -> None:
    pipe = compiled_pipeline()
    generate(pipe)
    (state,) = states_of(pipe.transformer)
    mask = state.tensor(1, "mask")
    used = [slot for slot in range(mask.shape[0]) if mask[slot].any()]
    assert len(used) == 2
    # The means of queries and keys: so weak is the tiny encoder's text that masks may coincide. Of the second
    # block, since text has not touched the first block's queries yet.
    anchors = state.tensor(1, "anchors")
    assert not torch.equal(anchors[used[0]], anchors[used[1]])


@pytest.mark.parametrize("predictor", ["svg2"], indirect=True)
def test_clusters_of_one_video_never_reach_another() -> None:
    pipe = compiled_pipeline()
    first = generate(pipe)
    generate(pipe, prompt="a blue square moves up", seed=5, width=192)
    with pytest.raises(BrokenOffError):
        generate(pipe, callback_on_step_end=break_off)
    assert torch.equal(generate(pipe), first)
    (state,) = (s for s in states_of(pipe.transformer) if s.specs[0].N == tiny_wan.TOKENS)
    centroids = state.tensor(1, "centroids")
    used = [slot for slot in range(centroids.shape[0]) if centroids[slot].any()]
    assert len(used) > 1
    assert not any(torch.equal(centroids[used[0]], centroids[slot]) for slot in used[1:])


def after_each_step(action: Callable[[], None]) -> dict[str, Any]:
    def callback(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        action()
        return tensors

    return {"callback_on_step_end": callback}


def test_two_pipelines_in_turn_equal_each_alone() -> None:
    alone = [generate(compiled_pipeline(seed), seed=seed) for seed in (0, 1)]
    torch._dynamo.reset()
    first, second = compiled_pipeline(0), compiled_pipeline(1)
    inner: list[Tensor] = []
    outer = generate(first, seed=0, **after_each_step(lambda: inner.append(generate(second, seed=1))))
    assert torch.equal(outer, alone[0])
    assert len(inner) == 4 and all(torch.equal(latents, alone[1]) for latents in inner)


@each_predictor
def test_pipelines_that_share_a_transformer_equal_each_alone() -> None:
    """Two requests in one server: one compiled transformer, two loops with schedulers of their own."""
    first, second = compiled_pipeline(), tiny_wan.build_pipeline()
    alone = [generate(first, seed=0), generate(first, seed=1, prompt="a blue square moves up")]
    second.transformer = first.transformer
    inner: list[Tensor] = []

    def other_video() -> None:
        inner.append(generate(second, seed=1, prompt="a blue square moves up"))

    outer = generate(first, seed=0, **after_each_step(other_video))
    assert torch.equal(outer, alone[0])
    assert all(torch.equal(latents, alone[1]) for latents in inner)
