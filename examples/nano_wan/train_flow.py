"""Train nano-wan's transformer and text encoder together by flow matching on latents of rendered clips."""

import copy
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from examples.nano_wan.model import CompactTextAttention
from examples.nano_wan.plan import LOG_EVERY, SEED, SMOKE, Plan, Stage
from examples.nano_wan.render import FULL, caption, render, sample_scenes
from examples.nano_wan.train_vae import Convolutions, autocast, fastest_convolutions, optimisers

log = logging.getLogger("nano_wan")

PIPELINE_TEXT_LENGTH = 512
TEXT_TOKENS = 48  # 47 real positions, and one that stands for all further padding
WORDINGS = 2  # captions for each clip
CAPTION_DROPOUT = 0.12


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids padded with 0: int64 [n, TEXT_TOKENS - 1]. A caption that does not fit is an error."""
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS - 1, return_tensors="pt").input_ids
    if ids.shape[1] != TEXT_TOKENS - 1:
        raise ValueError(
            f"a caption has {ids.shape[1]} tokens; at most {TEXT_TOKENS - 1} fit: raise TEXT_TOKENS"
        )
    return ids


def compact_text(encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """``WanPipeline.encode_prompt`` of ids, its zero padding cut to one token: [n, TEXT_TOKENS, D]."""
    mask = (ids != 0).long()
    hidden = encoder(ids, mask).last_hidden_state * mask[..., None]
    return F.pad(hidden, (0, 0, 0, 1))


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


def noise_levels(n: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in 0..1: logit-normal and shifted as flow schedulers shift them; a fifth just uniform."""
    device = generator.device
    level = torch.randn(n, generator=generator, device=device).sigmoid()
    shifted = shift * level / (1 + (shift - 1) * level)
    uniform = torch.rand(n, generator=generator, device=device)
    return torch.where(torch.rand(n, generator=generator, device=device) < 0.2, uniform, shifted)


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
    """Compile the blocks; where the compiler fails, say why and train uncompiled: only speed is lost."""
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
    """Flow matching on fresh clips for ``seconds``, the pool included; returns the averaged pipeline."""
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
        level = noise_levels(stage.batch, stage.shift, generator)
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
        # A gradient that is not finite becomes zero, decided without asking the device.
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
