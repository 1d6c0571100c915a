"""The demo: one prompt and seed, generated dense and with HASTE, both compiled, then compared."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from haste_compile import _torch, doctor
from haste_compile.calibration.use import mismatches, warming_up
from haste_compile.errors import OptionError
from haste_compile.generation import Generation, Request, generate
from haste_compile.loading import default_dtype, load_pipeline, shown_path
from haste_compile.output import new_folder
from haste_compile.pipeline import Handle, find_transformers, optimize

logger = logging.getLogger(__name__)

#: What the demo has to show, beside every self-attention rewritten, no graph break and no late recompile.
MAX_DENSITY, MIN_PSNR_DB = 0.6, 25.0

#: Steps of the untimed call before each timed one, which compiles: each branch has a second call.
_WARM_UP_STEPS = 2
_DIFFERENCE_GAIN = 4.0

#: (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]


def run_demo(
    model: str | Path,
    request: Request,
    options: dict[str, Any],
    *,
    out: Path,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Generate twice; write ``dense.mp4``, ``haste.mp4``, ``compare.html`` and ``summary.json`` to ``out``.

    Times exclude compilation, text encoding and decoding. The dense run is ``torch.compile`` with Inductor.

    Returns:
        The summary, as written. ``psnr_db`` is None when the two videos are equal bit for bit.

    Raises:
        OutputPathError: ``out`` cannot be written; nothing was generated.
        ModelPathError: ``model`` cannot be loaded.
        OptionError: bad options, or a pipeline that wants an image.
    """
    from haste_compile.evaluation import metrics, video

    with new_folder(out) as folder:
        progress("loading", 0, 1)
        pipe = load_pipeline(model, device=device, dtype=default_dtype(device))
        if "ImageToVideo" in type(pipe).__name__:
            raise OptionError(
                found=f"a {type(pipe).__name__}",
                wanted="a text-to-video pipeline",
                where="the demo's model",
                fix="Use `haste generate --image` for image-to-video.",
            )
        dense = _run_dense(pipe, request, progress)
        if options.get("profile") is not None:
            for mismatch in mismatches(options["profile"], request):
                logger.warning("haste: the profile was calibrated for another request: %s", mismatch)
        with optimize(pipe, **options) as handle:
            run = _run_haste(pipe, request, handle, progress)
        progress("comparing", 0, 1)
        summary = _summary(model, request, handle, dense, run, device)
        haste_video, dense_video = run.generation.video, dense.video
        psnr = metrics.psnr_db(haste_video, dense_video)
        summary["psnr_db"] = psnr if math.isfinite(psnr) else None
        summary["ssim"] = metrics.ssim(haste_video, dense_video)
        summary["checks"] = checks(summary)
        difference = metrics.absolute_difference(haste_video, dense_video, gain=_DIFFERENCE_GAIN)
        for name, frames in (("dense", dense_video), ("haste", haste_video), ("difference", difference)):
            video.write_mp4(folder / f"{name}.mp4", frames, fps=request.fps)
        _write_page(folder, request, summary, dense, run)
        (folder / "difference.mp4").unlink()
        text = json.dumps(summary, indent=2, allow_nan=False)
        (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
        progress("done", 1, 1)
    return summary


def checks(summary: dict[str, Any]) -> dict[str, bool]:
    """What the demo has to show, each as a sentence with its verdict."""
    psnr = summary["psnr_db"]
    self_skipped = [site for site in summary["sites_skipped"] if site["kind"] == "self"]
    return {
        "every self-attention site is rewritten": summary["sites_rewritten"] > 0 and not self_skipped,
        "no graph breaks": summary["graph_breaks"] == 0,
        "no recompiles after the first step": summary["recompiles_after_first_step"] == 0,
        f"density below {MAX_DENSITY}": summary["density"] < MAX_DENSITY,
        f"PSNR of at least {MIN_PSNR_DB:g} dB": psnr is None or psnr >= MIN_PSNR_DB,
    }


@dataclasses.dataclass(frozen=True)
class _HasteRun:
    """The timed HASTE run, and what the compiler did in it and the warm-up before it."""

    generation: Generation
    refreshes_by_step: tuple[float, ...]
    graphs: int
    graph_breaks: int
    recompiles_after_first_step: int


def _run_dense(pipe: Any, request: Request, progress: Progress) -> Generation:
    transformers = find_transformers(pipe).values()
    for transformer in transformers:
        transformer.compile(backend="inductor", dynamic=False)
    try:
        _warm_up(
            pipe,
            request,
            "compiling the dense run",
            progress,
            steps=_WARM_UP_STEPS,
            on_step=lambda step: None,
        )
        return generate(
            pipe, request, lambda step: progress("generating with dense attention", step + 1, request.steps)
        )
    finally:
        for transformer in transformers:
            _torch.undo_compile(transformer)


def _run_haste(pipe: Any, request: Request, handle: Handle, progress: Progress) -> _HasteRun:
    graphs_before, breaks_before = _torch.compile_counts()
    graphs: list[int] = []
    refreshes: list[float] = []
    totals = [(0, 0)]

    def after_warm_up_step(_step: int) -> None:
        graphs.append(_torch.compile_counts()[0])

    def after_step(step: int) -> None:
        after_warm_up_step(step)
        figures = handle.statistics().values()
        totals.append((sum(f.refreshes for f in figures), sum(f.calls for f in figures)))
        (old_refreshes, old_calls), (new_refreshes, new_calls) = totals[-2:]
        refreshes.append((new_refreshes - old_refreshes) / max(new_calls - old_calls, 1))
        progress("generating with HASTE", step + 1, request.steps)

    # Past the dense steps, so that the sparse kernels are compiled before the clock runs.
    steps = _WARM_UP_STEPS + handle.config.dense_steps
    _warm_up(pipe, request, "compiling the HASTE run", progress, steps=steps, on_step=after_warm_up_step)
    handle.reset()
    generation = generate(pipe, request, after_step)
    return _HasteRun(
        generation=generation,
        refreshes_by_step=tuple(refreshes),
        graphs=graphs[-1] - graphs_before,
        graph_breaks=_torch.compile_counts()[1] - breaks_before,
        recompiles_after_first_step=graphs[-1] - graphs[0],
    )


def _warm_up(
    pipe: Any, request: Request, what: str, progress: Progress, *, steps: int, on_step: Callable[[int], None]
) -> None:
    progress(what, 0, steps)

    def after_step(step: int) -> None:
        on_step(step)
        progress(what, step + 1, steps)

    with warming_up():
        generate(pipe, dataclasses.replace(request, steps=steps), after_step)


def _summary(
    model: str | Path,
    request: Request,
    handle: Handle,
    dense: Generation,
    run: _HasteRun,
    device: torch.device,
) -> dict[str, Any]:
    sites = [site for found in handle.sites().values() for site in found]
    rewritten = [site for site in sites if site.status == "rewritten"]
    statistics = list(handle.statistics().values())
    names = [name for figures in statistics for name in figures.sites]
    density = [row for figures in statistics for row in figures.density_by_head]
    refresh = [row for figures in statistics for row in figures.refresh_rate_by_head]
    return {
        "model": shown_path(model),
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "size": {"frames": request.frames, "height": request.height, "width": request.width},
        "tokens": max((int(site.shape[2]) for site in rewritten), default=0),
        "options": {
            name: shown_path(value) if name == "profile" and value is not None else value
            for name, value in handle.config.to_options().items()
        },
        "sites_rewritten": len(rewritten),
        "sites_skipped": [
            {"name": site.name, "kind": site.kind, "reason": site.reason}
            for site in sites
            if site not in rewritten
        ],
        "sites": names,
        "density": _mean(density),
        "density_by_head": density,
        "refresh_rate": _mean(refresh),
        "refresh_rate_by_head": refresh,
        "refreshes_by_step": run.refreshes_by_step,
        "dense_seconds": dense.seconds,
        "haste_seconds": run.generation.seconds,
        "dense_step_seconds": dense.step_seconds,
        "haste_step_seconds": run.generation.step_seconds,
        "graphs": run.graphs,
        "graph_breaks": run.graph_breaks,
        "recompiles_after_first_step": run.recompiles_after_first_step,
        "device": doctor.device_name(device),
        "versions": doctor.versions(),
    }


def _mean(rows: list[tuple[float, ...]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values) if values else 1.0


def _write_page(
    folder: Path, request: Request, summary: dict[str, Any], dense: Generation, run: _HasteRun
) -> None:
    from haste_compile.evaluation.compare_page import Comparison, render_page

    psnr = summary["psnr_db"]
    clips = {
        "Dense attention": "dense.mp4",
        "HASTE": "haste.mp4",
        f"Absolute difference × {_DIFFERENCE_GAIN:g}": "difference.mp4",
    }
    comparison = Comparison(
        title=request.prompt,
        clips={caption: (folder / name).read_bytes() for caption, name in clips.items()},
        fps=request.fps,
        frames=request.frames,
        figures={
            "Pairs computed": f"{summary['density']:.1%}",
            "Masks rebuilt": f"{summary['refresh_rate']:.1%}",
            "PSNR to dense": "equal" if psnr is None else f"{psnr:.1f} dB",
            "SSIM to dense": f"{summary['ssim']:.3f}",
            "Dense": f"{summary['dense_seconds']:.1f} s",
            "HASTE": f"{summary['haste_seconds']:.1f} s",
            "Speed-up": f"{summary['dense_seconds'] / summary['haste_seconds']:.2f}×",
        },
        sites=tuple(summary["sites"]),
        density_by_head=tuple(summary["density_by_head"]),
        refreshes_by_step=run.refreshes_by_step,
        step_seconds={"Dense": dense.step_seconds, "HASTE": run.generation.step_seconds},
        notes=(
            f"{request.frames} frames of {request.width}×{request.height}, {summary['tokens']:,} tokens, "
            f"{request.steps} steps, guidance {request.guidance:g}, seed {request.seed}. "
            "Both runs go through torch.compile; their times exclude compilation and decoding.",
            f"{summary['device']}. "
            + ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
            + ".",
        ),
    )
    (folder / "compare.html").write_text(render_page(comparison), encoding="utf-8")
