"""Measure a finished nano-wan: VAE fidelity, obedience to unseen prompts, how sparse its attention heads are.

    python -m examples.nano_wan.evaluate --model haste_compile/assets/nano_wan

puts the report into the model's ``training.json`` (as ``evaluation``) and writes the model card from it.
``examples.nano_wan.model_card`` writes the card alone.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image
from torch.overrides import TorchFunctionMode

from examples.nano_wan.detect import Verdict, judge
from examples.nano_wan.model import HEADS, LAYERS, load_pipeline
from examples.nano_wan.model_card import REPORT, write_card
from examples.nano_wan.render import FULL, Canvas, plain_caption, render, sample_scenes
from haste_compile.generation import NANO_REQUEST
from haste_compile.kernels.block_mask import token_pairs
from haste_compile.kernels.block_scores.reference import block_scores
from haste_compile.kernels.top_p_select.reference import top_p_select

log = logging.getLogger("nano_wan")

HOLD_OUT_SEED = 90210
HOLD_OUT_COUNTS = ((1, 10), (2, 24), (3, 6))  # (objects, prompts)
VALIDATION_SEED = 71
VALIDATION_COUNTS = ((1, 20), (2, 48), (3, 12))
STEPS = 30
SAMPLERS = ((3.0, 3.0), (3.0, 4.5), (6.0, 3.0), (6.0, 4.5))  # shift and guidance: validation chooses
TOP_P = 0.9
BLOCK = 64
STRIDES = (8, 16)


@dataclass(frozen=True)
class Prompt:
    """An unseen prompt, what it asks for as (colour, shape, direction), and the seed to draw it with."""

    text: str
    objects: tuple[tuple[str, str, str], ...]
    seed: int


# --- prompts and clips


def hold_out_prompts(counts: Sequence[tuple[int, int]] = HOLD_OUT_COUNTS) -> list[Prompt]:
    """Prompts whose set of objects training has never seen; the same list every time."""
    return _unseen_prompts(counts, HOLD_OUT_SEED)


def validation_prompts() -> list[Prompt]:
    """Others that training has never seen either, less what the hold-out prompts happen to share."""
    held = {frozenset(prompt.objects) for prompt in hold_out_prompts()}
    prompts = _unseen_prompts(VALIDATION_COUNTS, VALIDATION_SEED)
    return [prompt for prompt in prompts if frozenset(prompt.objects) not in held]


def _unseen_prompts(counts: Sequence[tuple[int, int]], seed: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    prompts: list[Prompt] = []
    for objects, n in counts:
        weights = [float(k == objects) for k in (1, 2, 3)]
        scenes = sample_scenes(n, weights, generator, unseen=True)
        for clip in range(n):
            asked = tuple(scenes.objects(clip))
            prompts.append(Prompt(plain_caption(asked), asked, 1000 + len(prompts)))
    return prompts


@torch.no_grad()
def generate(
    pipeline: WanPipeline,
    prompts: Sequence[Prompt],
    canvas: Canvas,
    steps: int = STEPS,
    guidance: float = NANO_REQUEST.guidance,
) -> torch.Tensor:
    """Clips [n, 3, frames, size, size] in -1..1 from the ordinary pipeline; noise is drawn on the CPU."""
    frames = pipeline(
        prompt=[p.text for p in prompts],
        negative_prompt="",
        height=canvas.size,
        width=canvas.size,
        num_frames=canvas.frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(p.seed) for p in prompts],
        output_type="pt",
    ).frames
    return frames.transpose(1, 2).float() * 2 - 1


def success(clips: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Shares of prompts, and of single objects, whose colour, shape and direction the detector finds."""
    verdicts = [judge(clip, prompt.objects) for clip, prompt in zip(clips, prompts, strict=True)]
    found = [hit for verdict in verdicts for hit in verdict.objects]
    by_count: dict[str, list[bool]] = {}
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        by_count.setdefault(str(len(prompt.objects)), []).append(verdict.clip)
    return {
        "prompts": len(prompts),
        "clip_success": share(verdict.clip for verdict in verdicts),
        "object_success": share(found),
        "clip_success_by_objects": {count: share(hits) for count, hits in by_count.items()},
        "clips_with_an_extra_colour": share(verdict.extra for verdict in verdicts),
        "failed": [describe(p, v) for p, v in zip(prompts, verdicts, strict=True) if not v.clip],
    }


def share(values: Any) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def describe(prompt: Prompt, verdict: Verdict) -> str:
    missed = [" ".join(item) for item, hit in zip(prompt.objects, verdict.objects, strict=True) if not hit]
    return f"{prompt.text} (seed {prompt.seed}): missed {', '.join(missed)}"


# --- VAE


@torch.no_grad()
def vae_psnr(pipeline: WanPipeline, clips: int, canvas: Canvas = FULL, batch: int = 4) -> dict[str, float]:
    """PSNR in dB (peak 1) of unseen clips reconstructed from the posterior's mode: mean and worst."""
    device = pipeline.vae.device
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED + 1)
    values: list[float] = []
    for start in range(0, clips, batch):
        scenes = sample_scenes(min(batch, clips - start), (0.3, 0.5, 0.2), generator, unseen=True)
        video = render(scenes, canvas, generator).to(device)
        again = pipeline.vae.decode(pipeline.vae.encode(video).latent_dist.mode()).sample
        error = ((video - again) / 2).square().mean((1, 2, 3, 4))
        values += (-10 * error.log10()).tolist()
    return {"clips": clips, "mean_db": round(sum(values) / clips, 2), "worst_db": round(min(values), 2)}


# --- attention heads


class SelfAttentionTap(TorchFunctionMode):
    """Shows the queries and keys (after RoPE) of every self-attention to ``see(call, layer, q, k)``.

    ``call`` counts transformer calls: with guidance, even ones are conditional. Only SDPA calls whose queries
    and keys are equally many count, so cross-attention and the VAE's single-head attention stay out.
    """

    def __init__(self, see: Callable[[int, int, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.sites = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (args + (kwargs.get("query"), kwargs.get("key")))[:2]
            if query.shape == key.shape and query.shape[1] == HEADS:
                self.see(self.sites // LAYERS, self.sites % LAYERS, query, key)
                self.sites += 1
        return func(*args, **kwargs)


def exact_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention mass of every pair of blocks, rows summing to 64: [B, H, N/64, N/64] (fp32)."""
    weights = (query.float() @ key.float().transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    blocks = weights.shape[-1] // BLOCK
    return weights.unflatten(3, (blocks, BLOCK)).sum(4).unflatten(2, (blocks, BLOCK)).sum(3)


def top_p_density(scores: torch.Tensor, tokens: int) -> torch.Tensor:
    """Share of query-key pairs in the blocks that top-p selection at TOP_P keeps: [B, H]."""
    threshold = torch.full((scores.shape[1],), TOP_P, device=scores.device)
    return token_pairs(top_p_select(scores, threshold), tokens, BLOCK) / tokens**2


@torch.no_grad()
def head_densities(
    pipeline: WanPipeline,
    prompts: Sequence[Prompt],
    canvas: Canvas = FULL,
    steps: int = STEPS,
    every: int = 5,
) -> dict[str, Any]:
    """Densities of all heads at TOP_P, of the conditional branch; means over prompts and every fifth step."""
    sums: dict[str, torch.Tensor] = {f"stride_{s}": torch.zeros(LAYERS, HEADS) for s in STRIDES}
    sums["exact"] = torch.zeros(LAYERS, HEADS)
    calls: Counter[int] = Counter()

    def see(call: int, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        step, branch = divmod(call, 2)
        if branch or step % every or step >= steps:
            return
        calls[layer] += 1
        scores = {f"stride_{s}": block_scores(query, key, block=BLOCK, stride=s) for s in STRIDES}
        scores["exact"] = exact_scores(query, key)
        for name, values in scores.items():
            sums[name][layer] += top_p_density(values, query.shape[2]).mean(0).cpu()

    with SelfAttentionTap(see):
        generate(pipeline, prompts, canvas, steps)
    return {name: spread(total / calls[0]) for name, total in sums.items()}


def spread(density: torch.Tensor) -> dict[str, Any]:
    """Percentiles of a [layers, heads] table of densities, and the table itself."""
    low, high = np.percentile(density.numpy(), [5, 95])
    return {
        "mean": round(float(density.mean()), 4),
        "p5": round(float(low), 4),
        "p95": round(float(high), 4),
        "ratio": round(float(high / low), 2),
        "by_head": [[round(v, 4) for v in row] for row in density.tolist()],
    }


# --- report


def contact_sheet(clips: torch.Tensor, path: Path, columns: int = 5) -> None:
    """One row for each clip [n, 3, frames, size, size] in -1..1, frames spread evenly, as a PNG."""
    moments = torch.linspace(0, clips.shape[2] - 1, columns).round().long().tolist()
    rows = [torch.cat([clip[:, t] for t in moments], dim=2) for clip in clips.cpu()]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def choose_sampler(pipeline: WanPipeline, canvas: Canvas = FULL) -> list[dict[str, float]]:
    """Shares of validation prompts that come out whole, best sampler first; the pipeline gets its shift."""
    prompts = validation_prompts()
    found = []
    for shift, guidance in SAMPLERS:
        _set_shift(pipeline, shift)
        figures = success(_generate_all(pipeline, prompts, canvas, guidance), prompts)
        found.append({"shift": shift, "guidance": guidance, "clip_success": figures["clip_success"]})
        log.info("%s %s", found[-1], figures["clip_success_by_objects"])
    found.sort(key=lambda row: -row["clip_success"])
    _set_shift(pipeline, found[0]["shift"])
    return found


def _set_shift(pipeline: WanPipeline, shift: float) -> None:
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)


def evaluate(
    pipeline: WanPipeline,
    canvas: Canvas = FULL,
    *,
    guidance: float = NANO_REQUEST.guidance,
    vae_clips: int = 16,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """The hold-out report: VAE PSNR, success on the unseen prompts, head densities."""
    prompts = hold_out_prompts()
    clips = _generate_all(pipeline, prompts, canvas, guidance)
    if sheet is not None:
        contact_sheet(clips[::3], sheet)
    return {
        "canvas": asdict(canvas),
        "steps": STEPS,
        "guidance": guidance,
        "vae_psnr": vae_psnr(pipeline, vae_clips, canvas),
        "hold_out": success(clips, prompts),
        "top_p": TOP_P,
        "block": BLOCK,
        "densities": head_densities(pipeline, [p for p in prompts if len(p.objects) == 2][:4], canvas),
    }


def _generate_all(
    pipeline: WanPipeline, prompts: Sequence[Prompt], canvas: Canvas, guidance: float, batch: int = 20
) -> torch.Tensor:
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return torch.cat([generate(pipeline, part, canvas, guidance=guidance) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--sheet", type=Path, help="PNG of the generated clips to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pipeline = load_pipeline(arguments.model).to(arguments.device)
    training = json.loads((arguments.model / REPORT).read_text())
    training["evaluation"] = evaluate(pipeline, sheet=arguments.sheet)
    (arguments.model / REPORT).write_text(json.dumps(training))
    write_card(arguments.model)
    log.info(json.dumps({k: v for k, v in training["evaluation"].items() if k != "densities"}, indent=1))


if __name__ == "__main__":
    main()
