"""State belongs to one transformer instance, one CFG branch and one video: no result depends on the past.

Each test compares bits. The sampler is a plain Euler loop with classifier-free guidance: every call is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_wan import TEXT_DIM, build_transformer
from torch import Tensor, nn

from haste_compile.state import states_of, statistics

#: Reuse is on and neither always nor never taken: the tiny model's drift lies around this value.
OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "stride": 8,
    "min_tokens": 64,
    "top_p": 0.7,
    "delta": 10.0,
    "inner": "eager",
}


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


def compile_transformer(seed: int = 0, **changes: Any) -> nn.Module:
    return torch.compile(
        build_transformer(seed), backend="haste", dynamic=False, options={**OPTIONS, **changes}
    )  # type: ignore[return-value]


def embed(prompt: int) -> Tensor:
    return torch.randn(1, 16, TEXT_DIM, generator=torch.Generator().manual_seed(prompt))


def sample_video(
    model: Callable[..., Any],
    prompt: int = 1,
    *,
    uncond_model: Callable[..., Any] | None = None,
    steps: int = 4,
    seed: int = 0,
    guidance: float | None = 4.0,
    width: int = 16,
    stop_at: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents of one video; ``stop_at`` raises in the middle, ``on_step`` runs between steps."""
    latents = torch.randn(1, 4, 5, 16, width, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for i in range(steps):
            if i == stop_at:
                raise KeyboardInterrupt
            call = {"hidden_states": latents, "timestep": 1000 * sigmas[i].expand(1), "return_dict": False}
            velocity = model(encoder_hidden_states=embed(prompt), **call)[0]
            if guidance is not None:
                empty = (model if uncond_model is None else uncond_model)(
                    encoder_hidden_states=embed(0), **call
                )[0]
                velocity = empty + guidance * (velocity - empty)
            latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
            on_step()
    return latents


@each_predictor
def test_the_settings_exercise_reuse_and_sparsity():
    """Guards the other tests: a model that always rebuilds, or keeps every block, would prove nothing."""
    model = compile_transformer()
    sample_video(model)
    found = statistics(model)
    assert 0.3 < found.refresh_rate < 0.95
    assert 0.1 < found.density < 0.95


@each_predictor
def test_branches_never_share_a_mask():
    """One transformer for both branches gives what two transformers, one for each, give."""
    together = sample_video(compile_transformer())
    apart = sample_video(compile_transformer(), uncond_model=compile_transformer())
    assert torch.equal(together, apart)


@each_predictor
def test_branches_have_masks_of_their_own():
    model = compile_transformer()
    sample_video(model)
    (state,) = states_of(model)
    mask = state.tensor(1, "mask")  # of the second block: text has not touched the first block's queries yet
    used = [slot for slot in range(4) if mask[slot].any()]
    assert len(used) == 2
    assert not torch.equal(mask[used[0]], mask[used[1]])


INTRUDERS: dict[str, dict[str, Any]] = {
    "another prompt": {"prompt": 2},
    "another seed": {"seed": 5},
    "another size": {"width": 24},
    "more steps": {"steps": 6},
    "without guidance": {"guidance": None},
    "an exception in the middle": {"prompt": 2, "stop_at": 2},
    "the same video, cut off": {"stop_at": 3},
}


@each_predictor
@pytest.mark.parametrize("intruder", INTRUDERS.values(), ids=INTRUDERS.keys())
def test_video_a_is_the_same_after_video_b(intruder: dict[str, Any]):
    model = compile_transformer()
    first = sample_video(model)
    try:
        sample_video(model, **intruder)
    except KeyboardInterrupt:
        assert "stop_at" in intruder
    assert torch.equal(sample_video(model), first)


@each_predictor
def test_video_a_is_the_same_when_b_runs_between_its_steps():
    alone = sample_video(compile_transformer())
    model = compile_transformer()

    def run_b(state: dict[str, int] = {"step": 0}) -> None:  # noqa: B006  (counts the calls)
        sigma = torch.tensor([1000.0 * (1 - state["step"] / 4)])
        latents = torch.randn(1, 4, 5, 16, 16, generator=torch.Generator().manual_seed(77))
        with torch.no_grad():
            for prompt in (1, 0):
                model(
                    hidden_states=latents,
                    timestep=sigma,
                    encoder_hidden_states=embed(prompt),
                    return_dict=False,
                )
        state["step"] += 1

    assert torch.equal(sample_video(model, on_step=run_b), alone)


@each_predictor
def test_two_transformers_compiled_alike_keep_apart():
    """Dynamo's guards do not tell two instances of one class apart: they share a graph, never a mask."""
    alone = [sample_video(compile_transformer(seed)) for seed in (0, 1)]
    torch._dynamo.reset()
    first, second = compile_transformer(0), compile_transformer(1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    turns = [sample_video(model) for model in (first, second, first, second)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2
    for i, latents in enumerate(turns):
        assert torch.equal(latents, alone[i % 2])


def test_two_transformers_in_turn_equal_each_alone():
    alone = [sample_video(compile_transformer(seed), seed=seed) for seed in (0, 1)]
    first, second = compile_transformer(0), compile_transformer(1)
    latents: list[Tensor] = []
    in_turn = sample_video(first, seed=0, on_step=lambda: latents.append(sample_video(second, seed=1)))
    assert torch.equal(in_turn, alone[0])
    assert all(torch.equal(x, alone[1]) for x in latents)


def test_a_copy_of_a_transformer_has_state_of_its_own():
    original = build_transformer()
    twin = copy.deepcopy(original)
    options = {"backend": "haste", "dynamic": False, "options": OPTIONS}
    sample_video(torch.compile(original, **options))
    assert list(states_of(original)) and not list(states_of(twin))


def test_state_dies_with_its_transformer():
    import gc
    import weakref

    model = compile_transformer()
    sample_video(model, steps=1)
    (state,) = states_of(model)
    gone = weakref.ref(state)
    del model, state
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@each_predictor
def test_two_videos_in_one_batch_are_judged_apart():
    """A batch of two equals the two alone: refresh decisions are made for each sample."""
    model = compile_transformer()
    latents = torch.randn(2, 4, 5, 16, 16, generator=torch.Generator().manual_seed(3))
    texts = torch.cat([embed(1), embed(2)])

    def run(rows: slice) -> Tensor:
        x = latents[rows]
        with torch.no_grad():
            for t in (1000.0, 750.0, 500.0):
                call = {"timestep": torch.full((x.shape[0],), t), "return_dict": False}
                x = x - 0.25 * model(hidden_states=x, encoder_hidden_states=texts[rows], **call)[0]
        return x

    together = run(slice(0, 2))
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], run(slice(i, i + 1)), rtol=1e-4, atol=1e-4)
