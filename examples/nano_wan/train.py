"""Train nano-wan from nothing in about 23 minutes of one Hopper GPU, in as many calls as it takes.

    python -m examples.nano_wan.train --work build/nano_wan --out build/out --minutes 9.4
    python -m examples.nano_wan.train ... --vae haste_compile/assets/nano_wan     # keep a trained VAE

Each call goes on where the last one ended, stops by itself in time, and leaves in ``--out`` the pipeline so
far (a tar in pieces below 16 MiB), a report and a contact sheet. The checkpoint *is* that float16 pipeline: a
stage that is split over two calls, or that follows another one, starts from averaged weights with a fresh
optimiser. To resume on another machine, put the pieces into ``--work`` and call again.

Stages (``plan.py``): the text encoder alone; the VAE on short and on full-length clips; the transformer and
the text encoder together on small clips (320 tokens), and on full clips (2304 tokens).

Other weights want other thresholds: once the new pipeline lies in ``haste_compile/assets/nano_wan``, the
calibration profile that goes with the old one is refused, also by the demo. It is made anew by

    haste calibrate --out haste_compile/assets/nano_wan_profile
"""

import argparse
import json
import logging
import platform
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from examples.nano_wan.evaluate import (
    choose_sampler,
    contact_sheet,
    evaluate,
    generate,
    hold_out_prompts,
    success,
    vae_psnr,
)
from examples.nano_wan.model import build_pipeline, load_pipeline, save_pipeline
from examples.nano_wan.plan import PLAN, SEED, SMOKE, Plan
from examples.nano_wan.train_flow import train_stage
from examples.nano_wan.train_vae import measure_latents, train_vae
from examples.nano_wan.words import teach_phrases

log = logging.getLogger("nano_wan")

PIECE_BYTES = 15 * 2**20

#: What the model card has to say of the plan, and of a VAE that is not this run's.
PLAN_NOTE = (
    "The plan was settled with the hold-out figures of earlier runs in view, though none of their prompts "
    "was trained on."
)
VAE_NOTE = "The VAE was kept from an earlier run; its time is counted."


class Clock:
    """Seconds since the start of the call, and what is left of it."""

    def __init__(self, minutes: float, started: float) -> None:
        self.start = started
        self.total = minutes * 60

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.total - self.elapsed()


def write_pieces(folder: Path, out: Path) -> None:
    """Tar the folder into ``out`` in pieces below 16 MiB: nano_wan.tar.00, .01, ... (``cat`` joins them)."""
    whole = out / "nano_wan.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, arcname="pipeline")
    with whole.open("rb") as stream:
        for number, piece in enumerate(read_pieces(stream)):
            (out / f"nano_wan.tar.{number:02d}").write_bytes(piece)
    whole.unlink()


def read_pieces(stream: Any) -> Iterator[bytes]:
    while piece := stream.read(PIECE_BYTES):
        yield piece


def join_pieces(work: Path) -> bool:
    """Unpack pieces that lie in ``work`` into work/pipeline; False if there are none."""
    pieces = sorted(work.glob("nano_wan.tar.[0-9][0-9]"))
    if not pieces:
        return False
    whole = work / "nano_wan.tar"
    whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(whole) as archive:
        archive.extractall(work, filter="data")
    whole.unlink()
    return True


def versions(device: torch.device) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


class Run:
    """A training run in a work folder: the pipeline so far, and training.json, which says what is done.

    A new run starts from nothing, or with the trained VAE of the pipeline in the folder ``vae``.
    """

    def __init__(self, work: Path, out: Path, vae: Path | None = None) -> None:
        self.work, self.out, self.folder = work, out, work / "pipeline"
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        if not self.folder.exists():
            join_pieces(work)
        state = self.folder / "training.json"
        self.report: dict[str, Any] = {
            "seed": SEED,
            "calls": [],
            "vae": None,
            "stages": [],
            "notes": PLAN_NOTE,
        }
        if state.exists():
            self.report = json.loads(state.read_text())
            self.pipeline = load_pipeline(self.folder)
            return
        self.pipeline = build_pipeline(SEED)
        if vae is not None:
            self.pipeline.vae = load_pipeline(vae).vae
            before = json.loads((vae / "training.json").read_text())
            self.report.update(
                {key: before[key] for key in ("vae", "long_vae")},
                vae_kept=True,
                notes=f"{PLAN_NOTE} {VAE_NOTE}",
            )

    def seconds_of(self, stage: str) -> float:
        return sum(entry["seconds"] for entry in self.report["stages"] if entry["stage"] == stage)

    def save(self) -> None:
        fresh = self.work / "pipeline.new"
        save_pipeline(self.pipeline, fresh)
        (fresh / "training.json").write_text(json.dumps(self.report))
        if self.folder.exists():
            old = self.work / "pipeline.old"
            self.folder.rename(old)
            fresh.rename(self.folder)
            remove_tree(old)
        else:
            fresh.rename(self.folder)
        write_pieces(self.folder, self.out)
        (self.out / "report.json").write_text(json.dumps(self.report, indent=1))
        log.info("saved after %s", self.report["stages"][-1]["stage"] if self.report["stages"] else "vae")


def remove_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def train(run: Run, plan: Plan, clock: Clock, device: torch.device) -> None:
    """Do as much of the plan as the clock allows, saving after every stage."""
    call = len(run.report["calls"])
    generator = torch.Generator(device).manual_seed(SEED + 1000 * call)
    run.pipeline.to(device)
    run.report["calls"].append({"versions": versions(device)})
    if run.report.get("phrases") is None:
        run.report["phrases"] = teach_phrases(
            run.pipeline.text_encoder, run.pipeline.tokenizer, steps=plan.phrase_steps, seed=SEED
        )
        log.info("probes of the text encoder: %s", run.report["phrases"])
        run.save()
    if run.report["vae"] is None:
        seconds = min(plan.vae_seconds, clock.left() - plan.reserve)
        run.report["vae"] = train_vae(run.pipeline.vae, plan, seconds, generator, long=False)
        measure_latents(run.pipeline.vae, plan, generator)
        run.report["vae"]["hold_out"] = vae_psnr(run.pipeline, plan.vae_clips, plan.stages[-1].canvas)
        log.info("vae hold-out: %s", run.report["vae"]["hold_out"])
        run.save()
    if run.report.get("long_vae") is None:
        seconds = min(plan.long_vae_seconds, clock.left() - plan.reserve)
        run.report["long_vae"] = train_vae(run.pipeline.vae, plan, seconds, generator, long=True)
        measure_latents(run.pipeline.vae, plan, generator)
        run.report["long_vae"]["hold_out"] = vae_psnr(run.pipeline, plan.vae_clips, plan.stages[-1].canvas)
        log.info("vae hold-out after long clips: %s", run.report["long_vae"]["hold_out"])
        run.save()
    for stage in plan.stages:
        due = stage.seconds - run.seconds_of(stage.name)
        if due < 0.3 * stage.seconds:
            continue
        seconds = min(due, clock.left() - plan.reserve)
        if seconds < 2 * stage.pool_seconds:
            log.info("%s: %.0f s are too few to start on it in this call", stage.name, seconds)
            break
        run.pipeline, entry = train_stage(run.pipeline, stage, plan, call, seconds, generator)
        run.report["stages"].append({"stage": stage.name, "call": call, **entry})
        run.save()
    report_progress(run, plan)
    run.report["calls"][-1]["seconds"] = round(clock.elapsed(), 1)
    run.save()


def report_progress(run: Run, plan: Plan) -> None:
    """Evaluate what is there: the full report after the last stage, a glance at small clips before it."""
    stages = [entry["stage"] for entry in run.report["stages"]]
    if not stages:
        return
    # Weights as they were saved, so that the figures hold for the shipped float16 file.
    pipeline = load_pipeline(run.folder).to(run.pipeline.device)
    sheet = run.out / "sheet.png"
    if stages[-1] == plan.stages[-1].name and plan is PLAN:
        canvas = plan.stages[-1].canvas
        found = run.report["validation"] = choose_sampler(pipeline, canvas)
        run.pipeline.scheduler = pipeline.scheduler
        run.report["evaluation"] = evaluate(pipeline, canvas, guidance=found[0]["guidance"], sheet=sheet)
        log.info("hold-out: %s", run.report["evaluation"]["hold_out"])
        for name, figures in run.report["evaluation"]["densities"].items():
            log.info("densities %s: %s", name, {k: v for k, v in figures.items() if k != "by_head"})
        return
    canvas = plan.stages[0].canvas
    prompts = hold_out_prompts(((1, 10), (2, 10)) if plan is PLAN else ((1, 1),))
    clips = generate(pipeline, prompts, canvas, steps=30 if plan is PLAN else 2)
    contact_sheet(clips[::2], sheet)
    run.report["small_glance"] = success(clips, prompts)
    log.info("small hold-out: %s", run.report["small_glance"])


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pieces, the report and the sheet"
    )
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock limit of this call")
    parser.add_argument("--smoke", action="store_true", help="tiny canvases and times: a test of the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae", type=Path, help="a new run keeps the VAE of the pipeline in this folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_float32_matmul_precision("high")
    run = Run(arguments.work, arguments.out, arguments.vae)
    plan = SMOKE if arguments.smoke else PLAN
    train(run, plan, Clock(arguments.minutes, started), torch.device(arguments.device))


if __name__ == "__main__":
    main()
