"""The command ``haste``. Exit codes: 0 done, 1 done but a check failed, 2 bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import haste_compile
from haste_compile.config import parse_options
from haste_compile.errors import HasteError, OptionError

app = typer.Typer(
    name="haste",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Wan video generation with head-wise adaptive block-sparse attention, through torch.compile.

Start with `haste demo`: it needs no download and no GPU. Then `haste explain --model FOLDER` tells what would
become of your own model, and `haste generate --model FOLDER --prompt "..."` makes a video with it.

Exit codes: 0 done, 1 done but a check failed, 2 bad input.""",
)

_Model = Annotated[
    Path | None,
    typer.Option(help="A diffusers folder or hub id of a Wan pipeline. Default: the embedded nano-wan."),
]
_Prompt = Annotated[
    str | None, typer.Option(help="What the video shows; nano-wan knows coloured shapes that move.")
]
_Seed = Annotated[int, typer.Option(help="Seed of the initial noise.")]
_Steps = Annotated[int | None, typer.Option(help="Denoising steps. Default: what suits the model.")]
_Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 switches guidance off.")]
_Height = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
_Width = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.")]
_Frames = Annotated[int | None, typer.Option(help="Frames, a multiple of 4 plus 1.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
_Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="An option of the backend: -o top_p=0.8. Repeatable."
    ),
]
_Predictor = Annotated[
    str | None, typer.Option(help="What makes the masks; the same as -o predictor=NAME. Default: xattention.")
]
_Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps what is compiled; the next run starts warm.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")]

_errors = Console(stderr=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the four files.")] = Path("outputs/demo"),
    model: _Model = None,
    prompt: _Prompt = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    height: _Height = None,
    width: _Width = None,
    frames: _Frames = None,
    device: _Device = None,
    predictor: _Predictor = None,
    option: _Options = None,
    as_json: _Json = False,
) -> None:
    """Generate one video dense and with HASTE, and compare them.

    Writes `dense.mp4`, `haste.mp4`, `compare.html` (open it in a browser) and `summary.json`.
    Both runs are compiled and start from the same noise. Exit code 1 says that a check failed.
    """
    from haste_compile.demo import run_demo
    from haste_compile.generation import complete_options
    from haste_compile.loading import NANO_WAN, pick_device

    chosen = model or NANO_WAN
    request = _request(chosen, prompt, seed, steps, guidance, height, width, frames)
    options = complete_options(chosen, _given(predictor, option))
    with _progress() as report:
        summary = run_demo(chosen, request, options, out=out, device=pick_device(device), progress=report)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_summary(summary, out)
    if not all(summary["checks"].values()):
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    model: _Model = None,
    dense: Annotated[bool, typer.Option("--dense", help="Leave attention dense, for comparison.")] = False,
    out: Annotated[Path, typer.Option(help="The MP4 file to write.")] = Path("outputs/video.mp4"),
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video models.")] = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    height: _Height = None,
    width: _Width = None,
    frames: _Frames = None,
    device: _Device = None,
    predictor: _Predictor = None,
    option: _Options = None,
    cache: _Cache = None,
    as_json: _Json = False,
) -> None:
    """Generate one video with your own model.

    With `--dense` the same compiled pipeline runs without HASTE.
    """
    from haste_compile.compile_cache import warm_start
    from haste_compile.generation import complete_options
    from haste_compile.generation import generate as run
    from haste_compile.loading import NANO_WAN, default_dtype, import_optional, load_pipeline, pick_device
    from haste_compile.output import new_file
    from haste_compile.pipeline import find_transformers, optimize

    import_optional("av", extra="demo")
    from haste_compile.evaluation.video import write_mp4

    chosen = model or NANO_WAN
    request = _request(chosen, prompt, seed, steps, guidance, height, width, frames)
    request = dataclasses.replace(request, image=image)
    options = _given(predictor, option)
    if dense and options:
        raise OptionError(
            found="--dense with --option or --predictor",
            wanted="one of the two",
            where="haste generate",
            fix="Drop one of them.",
        )
    target = pick_device(device)
    if cache is not None:
        warm_start(cache)
    with new_file(out) as path, _progress() as report:
        report("loading", 0, 1)
        pipe = load_pipeline(chosen, device=target, dtype=default_dtype(target))
        handle = None
        if dense:
            for transformer in find_transformers(pipe).values():
                transformer.compile(backend="inductor", dynamic=False)
        else:
            handle = optimize(pipe, **complete_options(chosen, options))
        report("compiling and generating", 0, request.steps)
        result = run(pipe, request, lambda step: report("generating", step + 1, request.steps))
        report("writing", request.steps, request.steps)
        write_mp4(path, result.video, fps=request.fps)
    facts: dict[str, Any] = {"file": str(out), "dense": dense, "steps": request.steps}
    facts["seconds"] = result.seconds
    if handle is not None:
        facts["statistics"] = {name: figures.to_dict() for name, figures in handle.statistics().items()}
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{out}: {request.steps} steps in {result.seconds:.1f} s, compilation included")
        if handle is not None:
            print(handle.summary())


@app.command()
def explain(
    model: _Model = None,
    height: _Height = None,
    width: _Width = None,
    frames: _Frames = None,
    device: _Device = None,
    predictor: _Predictor = None,
    option: _Options = None,
    as_json: _Json = False,
) -> None:
    """Tell what would become of every attention site, before anything is compiled.

    Only the model's configuration is read, no weights, and nothing is computed: a 14B model takes half a
    minute and needs no GPU; give `--device cuda` to ask about one that is elsewhere.
    """
    from haste_compile.explanation import explain as run
    from haste_compile.generation import complete_options, default_request
    from haste_compile.loading import NANO_WAN, default_dtype, known_device, transformer_structures

    chosen = model or NANO_WAN
    size = default_request(chosen)
    options = complete_options(chosen, _given(predictor, option))
    target = known_device(device)
    explanations = {}
    with _progress() as report:
        report("reading the model", 0, 1)
        structures = transformer_structures(chosen, dtype=default_dtype(target))
        for done, (name, transformer) in enumerate(structures.items()):
            report(f"tracing {name}", done, len(structures))
            explained = run(
                transformer,
                height=height or size.height,
                width=width or size.width,
                num_frames=frames or size.frames,
                device=target,
                **options,
            )
            explanations[name] = explained["transformer"]
    if as_json:
        print(json.dumps({name: found.to_dict() for name, found in explanations.items()}, indent=2))
        return
    for name, explanation in explanations.items():
        print(f"{name}: {explanation}")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The artifact to write; its manifest gets .json after the name.")],
    format: Annotated[
        str, typer.Option(help="aoti, onnx, tensorrt or torchscript; see docs/export.md.")
    ] = "aoti",
    model: _Model = None,
    component: Annotated[str | None, typer.Option(help="Which transformer, for Wan 2.2's two.")] = None,
    height: _Height = None,
    width: _Width = None,
    frames: _Frames = None,
    device: _Device = None,
    predictor: _Predictor = None,
    option: _Options = None,
    as_json: _Json = False,
) -> None:
    """Write a transformer as an artifact for deployment: one video size, thresholds baked in.

    `haste_compile.load` runs it in place of the transformer; it asks for the digest printed here.
    """
    from haste_compile.artifacts import export as run
    from haste_compile.generation import complete_options, default_request
    from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device

    chosen = model or NANO_WAN
    size = default_request(chosen)
    options = complete_options(chosen, _given(predictor, option))
    target = pick_device(device)
    with _progress() as report:
        report("loading", 0, 1)
        pipe = load_pipeline(chosen, device=target, dtype=default_dtype(target))
        report(f"exporting as {format}", 0, 1)
        manifest = run(
            pipe,
            out,
            format=format,
            height=height or size.height,
            width=width or size.width,
            num_frames=frames or size.frames,
            component=component,
            **options,
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(manifest), indent=2))
        return
    print(f"{out}: {manifest.format} for {manifest.size}, {len(manifest.sites)} attention sites rewritten")
    print(f"sha256 {manifest.digest}")


@app.command()
def calibrate(
    model: _Model = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt on each line. Default for nano-wan: its own twelve.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the profile and, until it is done, its journal.")
    ] = Path("outputs/profile"),
    method: Annotated[
        str | None, typer.Option(help="gradient (default), or exact: the paper's form.")
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Thresholds a head may get. Default: 0.85,0.9,0.95.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="shared:τ (default shared:0.9), sparsity:S or density:D.")
    ] = None,
    allocator: Annotated[str | None, typer.Option(help="additive (default) or quadratic.")] = None,
    delta: Annotated[
        str | None, typer.Option(help="keep (default) the option's δ, or choose one for each head.")
    ] = None,
    videos: Annotated[int | None, typer.Option(help="Dense videos to measure at.")] = None,
    intervals: Annotated[int | None, typer.Option(help="Steps measured in each video. Default: 4.")] = None,
    probes: Annotated[int | None, typer.Option(help="Probes sent backwards. Default: 3.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Prompts kept for the comparison with dense.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw. Default: 0.")] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Stop measuring after so long; repeat the command to go on.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell the cost and stop.")] = False,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video models.")] = None,
    steps: _Steps = None,
    guidance: _Guidance = None,
    height: _Height = None,
    width: _Width = None,
    frames: _Frames = None,
    device: _Device = None,
    option: _Options = None,
    as_json: _Json = False,
) -> None:
    """Give every attention head its own threshold, under one budget of sparsity.

    Writes `profile.json` and `tables.safetensors`, for `-o profile=FOLDER`. A run that was stopped goes on
    where it was when the command is repeated; under torchrun the work is divided over the ranks.
    """
    from haste_compile.calibration.command import run
    from haste_compile.loading import NANO_WAN, pick_device

    chosen = model or NANO_WAN
    request = _request(chosen, None, None, steps, guidance, height, width, frames)
    given = {
        "method": method,
        "candidates": None if candidates is None else _numbers("--candidates", candidates),
        "budget": budget,
        "allocator": allocator,
        "delta": delta,
        "videos": videos,
        "intervals": intervals,
        "probes": probes,
        "held_out": held_out,
        "seed": seed,
    }
    with _progress(time_left=True) as report:
        cost, profile = run(
            chosen,
            prompts,
            dataclasses.replace(request, image=image),
            options=parse_options(option or []),
            settings={name: value for name, value in given.items() if value is not None},
            out=out,
            device=pick_device(device),
            budget_minutes=budget_minutes,
            dry_run=dry_run,
            progress=report,
        )
    if as_json:
        facts = {"cost": cost.to_dict(), "profile": None if profile is None else profile.to_dict()}
        print(json.dumps(facts, indent=2))
    else:
        print(cost if profile is None else f"{profile.summary()}\n{out}")


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Tell what is installed, whether it is supported, and what will run where."""
    from haste_compile import doctor as module

    result = module.examine()
    facts = module.to_dict(result)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        table = Table("what", "found", "verdict", "note", box=None, pad_edge=False)
        colours = {"ok": "green", "missing": "yellow", "wrong": "red"}
        for check in result:
            verdict = f"[{colours[check.verdict]}]{check.verdict}[/]"
            table.add_row(check.name, check.found, verdict, check.note)
        Console().print(table)
    if not facts["ok"]:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"haste_compile {haste_compile.__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: typed errors become one message on stderr and exit code 2."""
    try:
        app()
    except HasteError as error:
        _errors.print(f"[bold red]{type(error).__name__}[/]", end=" ")
        _errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _given(predictor: str | None, option: list[str] | None) -> dict[str, Any]:
    named = [] if predictor is None else [f"predictor={predictor}"]
    return parse_options([*named, *(option or [])])


def _request(
    model: Path,
    prompt: str | None,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
) -> Any:
    from haste_compile.generation import default_request

    given = {
        "prompt": prompt,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "height": height,
        "width": width,
        "frames": frames,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(default_request(model), **changes)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(
            found=repr(text),
            wanted="numbers with commas between",
            where=option,
            fix="Write it like 0.85,0.9.",
        ) from error


@contextlib.contextmanager
def _progress(*, time_left: bool = False) -> Iterator[Any]:
    """A progress bar on stderr: call it with what is going on, steps done, steps in all."""
    for name in ("diffusers", "transformers"):
        if importlib.util.find_spec(name) is not None:  # their own bars would break ours
            importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    if time_left:
        columns += [TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False)]
    with Progress(*columns, console=_errors, transient=not _errors.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.stop_task(task)
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        yield report


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    console = Console()
    psnr = "equal" if summary["psnr_db"] is None else f"{summary['psnr_db']:.2f} dB"
    dense, haste = summary["dense_seconds"], summary["haste_seconds"]
    skipped = len(summary["sites_skipped"])
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in (
        ("prompt", summary["prompt"]),
        ("attention sites", f"{summary['sites_rewritten']} rewritten, {skipped} left dense"),
        ("density", f"{summary['density']:.1%} of query-key pairs"),
        ("masks rebuilt", f"{summary['refresh_rate']:.1%} of head calls"),
        ("PSNR, SSIM to dense", f"{psnr}, {summary['ssim']:.4f}"),
        ("denoising, dense", f"{dense:.1f} s"),
        ("denoising, HASTE", f"{haste:.1f} s ({dense / haste:.2f}× as fast)"),
        ("device", summary["device"]),
        ("files", str(out)),
    ):
        table.add_row(label, value)
    console.print(table)
    for name, passed in summary["checks"].items():
        console.print(f"[green]ok[/]      {name}" if passed else f"[red]failed[/]  {name}")
