"""Train nano-wan from nothing in about 18 minutes of one H200, in as many calls as it takes.

    python -m examples.nano_wan.train --work build/nano_wan --out build/out --minutes 9.3

Each call goes on where the last one ended, stops by itself in time, and leaves in ``--out`` the pipeline so far (a
tar in pieces below 16 MiB), a report and a contact sheet. The checkpoint *is* that float16 pipeline: a stage that
is split over two calls, or that follows another one, starts from averaged weights with a fresh optimiser. To resume
on another machine, put the pieces into ``--work`` and call again.

Stages: the VAE; the transformer and the text encoder together on small clips (320 tokens); both on full clips
(2304 tokens).
"""

import argparse
import copy
import json
import logging
import platform
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from examples.nano_wan.evaluate import contact_sheet, evaluate, generate, hold_out_prompts, success, vae_psnr
from examples.nano_wan.model import (
    FLOW_SHIFT,
    CompactTextAttention,
    build_pipeline,
    load_pipeline,
    save_pipeline,
    set_word_neighbourhoods,
)
from examples.nano_wan.muon import Muon
from examples.nano_wan.render import FULL, SMALL, Canvas, caption, render, sample_scenes

log = logging.getLogger("nano_wan")

SEED = 20260
PIPELINE_TEXT_LENGTH = 512
TEXT_TOKENS = 48  # 47 real positions, and one that stands for all further padding
WORDINGS = 2  # captions for each clip
CAPTION_DROPOUT = 0.12
PIECE_BYTES = 15 * 2**20
LOG_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """One transformer stage: what it trains on, for how long (seconds over all calls), and how fast."""

    name: str
    canvas: Canvas
    seconds: float
    batch: int
    objects: tuple[float, float, float]  # odds of one, two, three objects
    pool: int  # clips rendered and encoded at its start, fewer if pool_seconds run out
    pool_seconds: float
    learning_rate: float
    final_rate: float  # as a share of learning_rate


@dataclass(frozen=True)
class Plan:
    vae_seconds: float
    long_vae_seconds: float  # at the end, on clips of full length
    vae_batch: int
    vae_learning_rate: float
    stages: tuple[Stage, ...]
    encode_batch: int  # full clips at once
    reserve: float  # seconds kept for saving and evaluation
    vae_clips: int
    compile: bool


PLAN = Plan(
    vae_seconds=150,
    long_vae_seconds=85,
    vae_batch=32,
    vae_learning_rate=4e-3,
    stages=(
        Stage("small", SMALL, 290, 256, (0.45, 0.55, 0.0), 60_000, 40, 2.5e-3, 0.3),
        Stage("pairs", SMALL, 125, 256, (0.15, 0.85, 0.0), 40_000, 20, 1.8e-3, 0.3),
        Stage("full", FULL, 900, 48, (0.3, 0.5, 0.2), 14_000, 60, 1.5e-3, 0.0),
    ),
    encode_batch=16,
    reserve=75,
    vae_clips=16,
    compile=True,
)

SMOKE = Plan(
    vae_seconds=20,
    long_vae_seconds=10,
    vae_batch=2,
    vae_learning_rate=1.5e-3,
    stages=(
        Stage("small", Canvas(9, 64, (10.0, 14.0)), 15, 4, (0.5, 0.5, 0.0), 16, 8, 1e-3, 0.3),
        Stage("full", Canvas(9, 64, (10.0, 14.0)), 15, 2, (0.3, 0.5, 0.2), 8, 5, 1e-3, 0.0),
    ),
    encode_batch=2,
    reserve=15,
    vae_clips=1,
    compile=False,
)


class Clock:
    """Seconds since the start of the call, and what is left of it."""

    def __init__(self, minutes: float, started: float) -> None:
        self.start = started
        self.total = minutes * 60

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.total - self.elapsed()


# --- text


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids padded with 0: int64 [n, TEXT_TOKENS - 1]. A caption that does not fit is an error."""
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS - 1, return_tensors="pt").input_ids
    if ids.shape[1] != TEXT_TOKENS - 1:
        raise ValueError(
            f"a caption has {ids.shape[1]} tokens; at most {TEXT_TOKENS - 1} fit: raise TEXT_TOKENS"
        )
    return ids


def compact_text(encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """What ``WanPipeline.encode_prompt`` makes of ids, its zero padding cut to one last token: [n, TEXT_TOKENS, D]."""
    mask = (ids != 0).long()
    hidden = encoder(ids, mask).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, 1))


# --- optimisers


def optimisers(
    matrices: list[torch.nn.Parameter],
    parameters: Iterable[torch.nn.Parameter],
    rate: float,
    device: torch.device,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest of the parameters. Each group keeps its ``initial_lr``."""
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    adam = torch.optim.AdamW(
        rest, lr=0.6 * rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device.type == "cuda"
    )
    opts: list[torch.optim.Optimizer] = [Muon(matrices, lr=rate), adam]
    for group in (group for opt in opts for group in opt.param_groups):
        group["initial_lr"] = group["lr"]
    return opts


# --- VAE --------------------------------------------------------------------------------------------------------


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and device.type == "cuda")


@dataclass(frozen=True)
class Convolutions:
    """How the VAE's 3-D convolutions are run: cuDNN's speed for them differs severalfold between these."""

    half: bool  # bf16 autocast, else fp32 with TF32
    channels_last: bool

    def apply(self, vae: AutoencoderKLWan) -> None:
        for parameter in vae.parameters():
            parameter.data = self.lay_out(parameter.data)

    def lay_out(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 5:
            wanted = torch.channels_last_3d if self.channels_last else torch.contiguous_format
            return tensor.contiguous(memory_format=wanted)
        if tensor.dim() == 4:
            wanted = torch.channels_last if self.channels_last else torch.contiguous_format
            return tensor.contiguous(memory_format=wanted)
        return tensor


def fastest_convolutions(vae: AutoencoderKLWan, video: torch.Tensor, train: bool) -> Convolutions:
    """Time a step (or only the encoder) in each way on a CUDA device and return the fastest."""
    seconds: dict[Convolutions, float] = {}
    for way in (Convolutions(True, True), Convolutions(True, False), Convolutions(False, False)):
        way.apply(vae)
        clip = way.lay_out(video)
        for attempt in range(4):
            if attempt == 1:
                torch.cuda.synchronize()
                start = time.monotonic()
            with torch.set_grad_enabled(train), autocast(video.device, way.half):
                latent = vae.encode(clip).latent_dist.mode()
                if train:
                    vae.decode(latent).sample.float().square().mean().backward()
        torch.cuda.synchronize()
        seconds[way] = (time.monotonic() - start) / 3
        log.info("%s: %.3f s for %s", way, seconds[way], tuple(video.shape))
    vae.zero_grad(set_to_none=True)
    best = min(seconds, key=lambda way: seconds[way])
    best.apply(vae)
    return best


def train_vae(
    vae: AutoencoderKLWan, plan: Plan, seconds: float, generator: torch.Generator, *, long: bool
) -> dict[str, Any]:
    """Train the VAE for ``seconds``: L1 and squared error, a little KL. The last third sees large canvases.

    ``long``: on clips of full length. Short clips teach quickly but leave what the causal convolutions carry from
    chunk to chunk untrained: after them alone, reconstructions lost 15 dB from frame 9 on.
    """
    begin, device = time.monotonic(), generator.device
    vae.train()
    kernels = [p for p in vae.parameters() if p.dim() >= 4]
    opts = optimisers(kernels, vae.parameters(), plan.vae_learning_rate * (0.4 if long else 1.0), device)
    smoke = plan is SMOKE
    frames = FULL.frames if long and not smoke else 9
    crop = Canvas(frames, 64 if smoke else 128, SMALL.radius if not smoke else (10.0, 14.0))
    wide = crop if smoke else Canvas(frames, 256, FULL.radius)
    full_batch = max(1, plan.vae_batch * 9 // frames)
    scenes_rng = torch.Generator().manual_seed(SEED + (3 if long else 1))
    way = Convolutions(half=False, channels_last=False)
    if device.type == "cuda":
        probe = render(sample_scenes(full_batch, (0.2, 0.4, 0.4), scenes_rng), crop, generator)
        way = fastest_convolutions(vae, probe, train=True)
    start, step, history = time.monotonic(), 0, []
    seconds -= start - begin
    while (progress := (time.monotonic() - start) / seconds) < 1:
        canvas, batch = (crop, full_batch) if progress < 0.67 else (wide, max(1, full_batch // 4))
        rate = min(1.0, (step + 1) / 100) * min(1.0, 1.02 * (1 - progress) / 0.6)
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["initial_lr"] * rate
        video = way.lay_out(render(sample_scenes(batch, (0.2, 0.4, 0.4), scenes_rng), canvas, generator))
        with autocast(device, way.half):
            posterior = vae.encode(video).latent_dist
            again = vae.decode(posterior.sample()).sample
        error = again.float() - video
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + 4 * error.square().mean() + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % LOG_EVERY == 0 or step == 1:
            psnr = float(-10 * (error.detach() / 2).square().mean().log10())
            history.append([step, round(psnr, 2)])
            rate_now = step / (time.monotonic() - start)
            log.info(
                "vae step %d: psnr %.2f dB, kl %.2f, %.1f steps/s", step, psnr, float(kl.detach()), rate_now
            )
    vae.eval()
    return {"steps": step, "seconds": round(time.monotonic() - start, 1), "psnr_history": history}


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, plan: Plan, generator: torch.Generator) -> None:
    """Measure the latent channels' mean and deviation on full clips and write them to the VAE's configuration."""
    canvas = plan.stages[-1].canvas
    scenes_rng = torch.Generator().manual_seed(SEED + 2)
    latents = []
    for _ in range(8):
        video = render(sample_scenes(plan.encode_batch, (0.3, 0.5, 0.2), scenes_rng), canvas, generator)
        with autocast(generator.device):
            latents.append(vae.encode(video).latent_dist.mode().float())
    flat = torch.cat(latents).transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in flat.mean(1).tolist()],
        latents_std=[round(v, 5) for v in flat.std(1).tolist()],
    )
    log.info("latent mean %s std %s", vae.config.latents_mean, vae.config.latents_std)


# --- latents


@dataclass(frozen=True)
class Pool:
    """Encoded clips: normalised latents bf16 [n, C, T, H, W] and token ids [n, WORDINGS, TEXT_TOKENS - 1]."""

    latents: torch.Tensor
    ids: torch.Tensor


@torch.no_grad()
def fill_pool(pipeline: WanPipeline, stage: Stage, plan: Plan, call: int, generator: torch.Generator) -> Pool:
    """Render and encode new clips until the stage's pool is full or its time is up."""
    vae, device = pipeline.vae, generator.device
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    scale = (FULL.size / stage.canvas.size) ** 2 * FULL.frames / stage.canvas.frames
    batch = plan.encode_batch if plan is SMOKE else max(1, int(plan.encode_batch * scale))
    scenes_rng = torch.Generator().manual_seed(SEED + 100 * call + len(stage.name))
    words_rng = random.Random(SEED + 100 * call + len(stage.name))
    way = Convolutions(half=False, channels_last=False)
    if device.type == "cuda":
        way = fastest_convolutions(
            vae, render(sample_scenes(batch, stage.objects, scenes_rng), stage.canvas, generator), train=False
        )
    latents, captions, start = [], [], time.monotonic()
    while len(latents) * batch < stage.pool and time.monotonic() - start < stage.pool_seconds:
        scenes = sample_scenes(batch, stage.objects, scenes_rng)
        video = way.lay_out(render(scenes, stage.canvas, generator))
        with autocast(device, way.half):
            encoded = vae.encode(video).latent_dist.mode()
        latents.append(((encoded.float() - mean) / std).to(torch.bfloat16).contiguous())
        for clip in range(batch):
            captions += [caption(scenes.objects(clip), words_rng) for _ in range(WORDINGS)]
        if device.type == "cuda":
            torch.cuda.synchronize()
    ids = token_ids(pipeline.tokenizer, captions).unflatten(0, (-1, WORDINGS)).to(device)
    pool = Pool(torch.cat(latents), ids)
    seconds = time.monotonic() - start
    log.info("%s pool: %d clips %s in %.1f s", stage.name, len(ids), tuple(pool.latents.shape[1:]), seconds)
    return pool


# --- transformer


def noise_levels(n: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in 0..1: logit-normal, a fifth uniform, then shifted as the scheduler shifts them."""
    device = generator.device
    level = torch.randn(n, generator=generator, device=device).sigmoid()
    uniform = torch.rand(n, generator=generator, device=device)
    level = torch.where(torch.rand(n, generator=generator, device=device) < 0.2, uniform, level)
    return FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level)


class Average:
    """Exponential moving average of a model's weights, with warm-up, held in a copy of the model."""

    def __init__(self, models: tuple[torch.nn.Module, ...], decay: float) -> None:
        self.live = [p for model in models for p in model.parameters()]
        self.models = tuple(copy.deepcopy(model).eval().requires_grad_(False) for model in models)
        self.weights = [p for model in self.models for p in model.parameters()]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.live], 1 - decay)


def compile_blocks(transformer: torch.nn.Module, warm_up: Callable[[], Any]) -> bool:
    """Compile the blocks one by one; where the compiler fails, say why and train uncompiled: only speed is lost."""
    for block in transformer.blocks:
        block.compile(dynamic=False)
    start = time.monotonic()
    try:
        warm_up()
    except Exception:
        log.exception("torch.compile failed; training goes on uncompiled")
        for block in transformer.blocks:
            block._compiled_call_impl = None
        return False
    log.info("compiled in %.1f s", time.monotonic() - start)
    return True


def train_stage(
    pipeline: WanPipeline, stage: Stage, plan: Plan, call: int, seconds: float, generator: torch.Generator
) -> tuple[WanPipeline, dict[str, Any]]:
    """Flow matching on freshly made clips for ``seconds``, the pool included; returns the averaged pipeline."""
    begin, device = time.monotonic(), generator.device
    pool = fill_pool(pipeline, stage, plan, call, generator)
    transformer, encoder = pipeline.transformer, pipeline.text_encoder
    average = Average((transformer, encoder), 0.999)
    transformer.train().requires_grad_(True)
    encoder.train().requires_grad_(True)
    compact = CompactTextAttention(PIPELINE_TEXT_LENGTH - (TEXT_TOKENS - 1))
    for block in transformer.blocks:
        block.attn2.set_processor(compact)
    empty = token_ids(pipeline.tokenizer, [""]).to(device)
    n = len(pool.ids)

    def loss_of_batch() -> torch.Tensor:
        pick = torch.randint(n, (stage.batch,), generator=generator, device=device)
        wording = torch.randint(WORDINGS, (stage.batch,), generator=generator, device=device)
        dropped = torch.rand(stage.batch, 1, generator=generator, device=device) < CAPTION_DROPOUT
        ids = torch.where(dropped, empty, pool.ids[pick, wording])
        clean = pool.latents[pick].float()
        level = noise_levels(stage.batch, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = torch.lerp(clean, noise, level[:, None, None, None, None])
        with autocast(device):
            velocity = transformer(noisy, level * 1000, compact_text(encoder, ids), return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - clean)

    compiled = plan.compile and compile_blocks(transformer, lambda: loss_of_batch().backward())
    parameters = [*transformer.parameters(), *encoder.parameters()]
    matrices = [p for p in transformer.blocks.parameters() if p.dim() == 2]
    opts = optimisers(matrices, parameters, stage.learning_rate, device)
    for opt in opts:
        opt.zero_grad(set_to_none=True)
    start, budget = time.monotonic(), seconds - (time.monotonic() - begin)
    step, history, total, skipped = 0, [], torch.zeros((), device=device), torch.zeros((), device=device)
    while (progress := (time.monotonic() - start) / max(budget, 1.0)) < 1:
        warm = min(1.0, (step + 1) / 150)
        cool = 1.0 if progress < 0.35 else 1 - (1 - stage.final_rate) * (progress - 0.35) / 0.65
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = group["initial_lr"] * warm * cool
        loss = loss_of_batch()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # A step whose gradient is not finite becomes a step of zero gradient, decided without asking the device.
        finite = torch.isfinite(norm)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = torch.where(finite, parameter.grad, 0.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        average.update()
        total += torch.where(finite, loss.detach(), 0.0)
        skipped += ~finite
        step += 1
        if step % LOG_EVERY == 0:
            mean_loss = float(total) / LOG_EVERY  # waits for the device, so the clock above is honest
            total.zero_()
            pace = step * stage.batch / (time.monotonic() - start)
            history.append([step, round(mean_loss, 4)])
            log.info("%s step %d: loss %.4f, %.0f clips/s, %.0f s left", stage.name, step, mean_loss, pace,
                     budget - (time.monotonic() - start))  # fmt: skip
    report = {
        "steps": step,
        "batch": stage.batch,
        "clips_in_pool": n,
        "seconds": round(time.monotonic() - begin, 1),
        "clips_per_second": round(step * stage.batch / (time.monotonic() - start), 1),
        "compiled": compiled,
        "steps_skipped": int(skipped),
        "loss_history": history,
    }
    averaged_transformer, averaged_encoder = average.models
    return (
        WanPipeline(
            tokenizer=pipeline.tokenizer,
            text_encoder=averaged_encoder,
            vae=pipeline.vae,
            transformer=averaged_transformer,
            scheduler=pipeline.scheduler,
        ),
        report,
    )


# --- checkpoints


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
    """The state of a training run in a work folder: the pipeline so far and report.json, which says what is done."""

    def __init__(self, work: Path, out: Path) -> None:
        self.work, self.out, self.folder = work, out, work / "pipeline"
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        if not self.folder.exists():
            join_pieces(work)
        state = self.folder / "training.json"
        self.report: dict[str, Any] = {"seed": SEED, "calls": [], "vae": None, "stages": []}
        if state.exists():
            self.report = json.loads(state.read_text())
            self.pipeline = load_pipeline(self.folder)
        else:
            self.pipeline = build_pipeline(SEED)

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
        set_word_neighbourhoods(run.pipeline.text_encoder)  # MIGRATION
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
        run.report["evaluation"] = evaluate(pipeline, sheet=sheet)
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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_float32_matmul_precision("high")
    run = Run(arguments.work, arguments.out)
    plan = SMOKE if arguments.smoke else PLAN
    train(run, plan, Clock(arguments.minutes, started), torch.device(arguments.device))


if __name__ == "__main__":
    main()
