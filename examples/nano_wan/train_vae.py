"""Train nano-wan's VAE, on short clips first and then on clips of full length, and measure its latents."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from examples.nano_wan.muon import Muon
from examples.nano_wan.plan import LOG_EVERY, SEED, SMOKE, Plan
from examples.nano_wan.render import FULL, SMALL, Canvas, render, sample_scenes

log = logging.getLogger("nano_wan")


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

    ``long``: on clips of full length. Short clips teach quickly but leave what the causal convolutions carry
    from chunk to chunk untrained: after them alone, reconstructions lost 15 dB from frame 9 on.
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
    """Measure the latents' mean and deviation on full clips and write them to the VAE's configuration."""
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
