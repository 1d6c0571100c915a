"""The study's machinery: workers, batches and weights change nothing that they should not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from tiny_calibration import Finished

from benchmarks import calibration_study
from benchmarks.calibration_bench import Bench, generate_together
from benchmarks.calibration_rows import Figures, Record, Rows
from benchmarks.calibration_workers import Workers
from haste_compile.generation import generate

ROWS: dict[str, dict[str, Any]] = {
    "+ TMR": {"top_p": 0.4, "reuse": "tmr"},
    "SVG2 + TMR": {"predictor": "svg2", "top_p": 0.4, "reuse": "tmr"},
}


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("workers")
    pool = folder / "pool.txt"
    pool.write_text("a red circle moves left\n", encoding="utf-8")
    given = ["--model", tiny_wan.save_pipeline(folder / "tiny"), "--pool", pool, "--small", "--device", "cpu"]
    given += ["--height", 128, "--width", 128, "--frames", 17, "--steps", 3, "--workers", 2]
    for option in ("block_size=64", "min_tokens=64", "dense_steps=1", "delta=1", "cluster_iterations=[3,1]"):
        given += ["-o", option]
    return calibration_study._parse(list(map(str, given)))


def run(args: Any, folder: Path, devices: list[str] | None, together: int) -> dict[str, Figures]:
    _, request, _ = calibration_study.load_task(args)
    requests = calibration_study.evaluation_requests(request, prompts=2, seeds=1)
    with Workers(args, folder, devices) as workers:
        rows = Rows(workers, requests, together, Record(None, list(ROWS)))
        rows.dense()
        with pytest.raises(AttributeError, match="no_such_thing"):  # a worker begins anew and goes on
            workers.call("no_such_thing")
        for name, options in ROWS.items():
            rows.run(name, options)
    return rows.figures


def test_neither_workers_nor_batches_change_the_rows(
    args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times two rows of two videos: here, in two processes, and both videos as one batch."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the number of threads changes the order of sums
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = run(args, tmp_path, None, together=1)
        batched = run(args, tmp_path, None, together=2)
        divided = run(args, tmp_path, ["cpu", "cpu"], together=1)
    finally:
        torch.set_num_threads(threads)
    for name in ROWS:
        assert here[name].to_dict() == divided[name].to_dict()
        assert here[name].density < 0.9 and here[name].psnr.max() < 60
        for field in ("psnr", "ssim", "latent_error", "density", "refresh_rate"):
            np.testing.assert_allclose(
                getattr(batched[name], field), getattr(here[name], field), rtol=1e-3, err_msg=field
            )


def test_nothing_is_begun_after_the_deadline(args: Any, tmp_path: Path) -> None:
    with Workers(args, tmp_path, None, deadline=0.0) as workers, pytest.raises(TimeoutError):
        workers.call("facts")


def test_a_batch_draws_the_noise_of_its_videos(args: Any, tmp_path: Path) -> None:
    bench = Bench(args, None, tmp_path)
    requests = [dataclasses.replace(bench.request, prompt="a red circle", seed=seed) for seed in (3, 4)]
    for found, request in zip(generate_together(bench.pipe, requests), requests, strict=True):
        alone = generate(bench.pipe, request, lambda _step: None, decode=False).video
        np.testing.assert_allclose(found, alone, atol=1e-4)
    with pytest.raises(ValueError, match="prompt and seed alone"):
        generate_together(bench.pipe, [requests[0], dataclasses.replace(requests[1], steps=2)])


def test_step_weights_follow_the_noise_schedule(args: Any, tmp_path: Path) -> None:
    bench = Bench(args, None, tmp_path)
    request = dataclasses.replace(bench.request, steps=4, guidance=3.0)
    conditional, unconditional = bench.step_weights(request)
    assert np.sqrt(conditional).sum() == pytest.approx(3.0, abs=0.02), "σ falls from 1 to 0"
    np.testing.assert_allclose(unconditional, conditional * 4 / 9)


def test_a_state_that_weighs_nothing_counts_for_nothing(finished: Finished) -> None:
    profile = finished.profile.with_experts({"transformer": finished.profile.experts["transformer"]})
    expert = profile.experts["transformer"]
    (video,) = profile.draws["videos"]
    weights = np.ones((2, profile.request["steps"]))
    same = calibration_study.weighted_by_step(profile, weights).experts["transformer"]
    np.testing.assert_allclose(same.errors, expert.errors, rtol=1e-5)
    weights[1] = 0  # the unconditional calls, the second half of the states
    assert len(video["steps"]["transformer"]) == 1
    found = calibration_study.weighted_by_step(profile, weights).experts["transformer"]
    assert expert.products is not None
    first = np.square(expert.products[: len(expert.products) // 2], dtype=np.float64).mean(0)
    np.testing.assert_allclose(found.errors, first, rtol=1e-5)
