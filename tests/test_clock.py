"""The clock: which slot, step and video a call belongs to, from its tensors alone."""

from __future__ import annotations

import pytest
import torch

from haste_compile.clock import Clock
from haste_compile.kernels.layout import Ctl

COND, UNCOND, OTHER = (torch.full((1, 4, 8), value) for value in (1.0, 2.0, 3.0))


def noise(seed: int, shape: tuple[int, ...] = (1, 4, 3, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_clock(slots: int = 4, **steps: int) -> Clock:
    return Clock(slots=slots, device=torch.device("cpu"), **steps)


def tick(clock: Clock, latents: torch.Tensor, timestep: float, text: torch.Tensor) -> dict[str, int]:
    clock.tick(latents, torch.tensor([timestep]), text)
    ctl = clock.ctl.tolist()
    return {
        "slot": ctl[Ctl.SLOT],
        "epoch": ctl[Ctl.EPOCH],
        "step": ctl[Ctl.STEP],
        "dense": ctl[Ctl.DENSE],
        "force": ctl[Ctl.FORCE],
    }


def run_video(clock: Clock, seed: int, texts: list[torch.Tensor], steps: int = 4) -> list[dict[str, int]]:
    """The calls of a sampler: latents go from noise to a clean sample, all branches at every step."""
    start, end = noise(seed), noise(seed + 1000)
    calls = []
    for i in range(steps):
        share = i / steps
        latents = (1 - share) * start + share * end
        calls += [tick(clock, latents, 1000 * (1 - share), text) for text in texts]
    return calls


def test_before_the_first_tick_every_mask_is_rebuilt():
    ctl = make_clock().ctl
    assert ctl[Ctl.FORCE] == 1 and ctl[Ctl.EPOCH] == 1


def test_branches_of_a_video_keep_their_slots_and_count_steps():
    calls = run_video(make_clock(), 0, [COND, UNCOND])
    cond, uncond = calls[0::2], calls[1::2]
    assert [c["step"] for c in cond] == [0, 1, 2, 3] == [c["step"] for c in uncond]
    assert {c["force"] for c in calls} == {0}
    assert len({c["slot"] for c in cond}) == 1 and len({c["slot"] for c in uncond}) == 1
    assert cond[0]["slot"] != uncond[0]["slot"] and cond[0]["epoch"] != uncond[0]["epoch"]
    assert len({c["epoch"] for c in cond}) == 1


@pytest.mark.parametrize("second_seed", [0, 7], ids=["same seed", "another seed"])
def test_the_same_prompt_again_is_a_new_video(second_seed: int):
    clock = make_clock()
    first = run_video(clock, 0, [COND])
    second = run_video(clock, second_seed, [COND])
    assert second[0]["step"] == 0 and second[0]["epoch"] != first[-1]["epoch"]


def test_an_interrupted_video_leaves_nothing():
    clock = make_clock()
    broken = run_video(clock, 0, [COND, UNCOND], steps=4)[:3]
    again = run_video(clock, 0, [COND, UNCOND], steps=4)
    assert [c["step"] for c in again] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {c["epoch"] for c in again}.isdisjoint({c["epoch"] for c in broken})


def test_a_later_start_with_other_noise_is_a_new_video():
    """Video to video starts at a timestep lower than the slot's: only the latents tell."""
    clock = make_clock()
    tick(clock, noise(0), 1000, COND)
    assert tick(clock, noise(5), 600, COND)["step"] == 0


def test_two_videos_with_one_prompt_in_turn_do_not_mix():
    clock = make_clock(slots=2)
    a, b = noise(0), noise(1)
    calls = [tick(clock, x, t, COND) for t in (1000, 900, 800) for x in (a, b)]
    assert [c["step"] for c in calls] == [0, 0, 1, 1, 2, 2]
    assert len({c["slot"] for c in calls[0::2]}) == 1 == len({c["slot"] for c in calls[1::2]})


def test_equal_prompts_of_both_branches_are_told_apart_by_their_timesteps():
    calls = run_video(make_clock(), 0, [COND, COND])
    assert calls[0]["slot"] != calls[1]["slot"]
    assert [c["step"] for c in calls] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_guidance_switched_off_in_the_middle_keeps_the_other_branch():
    clock = make_clock()
    latents = noise(0)
    tick(clock, latents, 1000, COND), tick(clock, latents, 1000, UNCOND)
    assert [tick(clock, latents, t, COND)["step"] for t in (900, 800)] == [1, 2]


def test_more_branches_than_slots_rebuild_every_time():
    clock = make_clock(slots=2)
    calls = run_video(clock, 0, [COND, UNCOND, OTHER])
    assert {c["step"] for c in calls} == {0}
    assert len({c["epoch"] for c in calls}) == len(calls)


def test_a_changed_prompt_is_a_new_video():
    clock = make_clock()
    tick(clock, noise(0), 1000, COND)
    assert tick(clock, noise(0), 900, COND + 1e-3)["step"] == 0


def test_another_latent_size_is_a_new_video():
    clock = make_clock()
    first = tick(clock, noise(0), 1000, COND)
    other = tick(clock, noise(0, (1, 4, 3, 8, 16)), 900, COND)
    back = tick(clock, noise(0), 800, COND)
    assert (other["step"], back["step"]) == (0, 0)
    assert len({first["epoch"], other["epoch"], back["epoch"]}) == 3


def test_one_sample_that_jumps_restarts_the_batch():
    clock = make_clock()
    text, latents = COND.expand(2, -1, -1), noise(0, (2, 4, 3, 8, 8))
    tick(clock, latents, 1000, text)
    jumped = torch.stack([latents[0], noise(9)[0]])
    assert tick(clock, jumped, 900, text)["step"] == 0


def test_nan_never_continues_a_video():
    clock = make_clock()
    tick(clock, noise(0), 1000, COND)
    assert tick(clock, noise(0) * float("nan"), 900, COND)["step"] == 0
    assert tick(clock, noise(0), float("nan"), COND)["step"] == 0


def test_warm_up_marks_the_first_steps_of_each_video_dense():
    clock = make_clock(dense_steps=2)
    for _ in range(2):
        assert [c["dense"] for c in run_video(clock, 0, [COND])] == [1, 1, 0, 0]


def test_masks_are_forced_in_the_first_steps_of_each_video():
    clock = make_clock(rebuild_steps=3)
    for _ in range(2):
        assert [c["force"] for c in run_video(clock, 0, [COND])] == [1, 1, 1, 0]


def test_timestep_per_token_counts_by_its_largest():
    clock = make_clock()
    clock.tick(noise(0), torch.tensor([[0.0, 1000.0]]), COND)
    clock.tick(noise(0), torch.tensor([[0.0, 900.0]]), COND)
    assert clock.ctl[Ctl.STEP] == 1


def test_reset_starts_anew_and_keeps_the_address():
    clock = make_clock()
    address = clock.ctl.data_ptr()
    first = tick(clock, noise(0), 1000, COND)
    clock.reset()
    second = tick(clock, noise(0), 900, COND)
    assert second["step"] == 0 and second["epoch"] > first["epoch"] and clock.ctl.data_ptr() == address


def test_inference_mode_and_grad_mode_mix():
    clock = make_clock()
    with torch.inference_mode():
        first = tick(clock, noise(0), 1000, COND)
    second = tick(clock, noise(0).requires_grad_(), 900, COND)
    assert (first["step"], second["step"]) == (0, 1)
