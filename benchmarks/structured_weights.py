"""Random Wan transformers whose heads attend like a video model's: for speed only.

Fresh random weights give near-uniform attention, in which no mask is sparse. Here every query and key starts
from the same vector, a bias, so that rotary embedding alone decides how two tokens meet:

    q·k / √D = κ · Σ over axes t, h, w · Σᵢ pᵢ cos(θᵢ Δ)          (Δ: distance along the axis)

a kernel of (Δt, Δh, Δw) that is the same everywhere. The weights pᵢ of an axis lie around the frequency
1/reach, so a head looks about ``reach`` tokens far along it; an axis without weights is one along which it
looks everywhere. Spatial heads have weights on t alone, temporal ones on h and w, local ones on all three,
global ones a small κ. A common factor of all κ, found by bisection, sets the mean density that top-p leaves.

To this the layer adds content: a random projection of its input, different for every token, and moved by the
timestep through the modulation of the block. So masks differ from row to row, means drift from step to step
as in a real run, and a head wants a new mask now and then; ``find_delta`` sets how often.

Structured random weights say nothing about quality.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haste_compile.kernels.block_mask import token_pairs
from haste_compile.kernels.block_scores.reference import block_scores
from haste_compile.kernels.top_p_select.reference import top_p_select
from haste_compile.loading import import_optional

#: Standard deviation of a token's content beside a bias of 1, and of the timestep's part of it.
CONTENT, TIMESTEP = 0.25, 0.6
#: Amplitude of the slow rotary pairs: they say nothing about places, and carry content and its drift.
CARRIER = 0.7
#: Share of the timestep's sinusoids, counted from the fastest, that are cut off (up to a period of 1,100).
SLOWEST = 0.56
#: Width of an axis' weights, in natural logarithms of frequency.
BAND = 0.7
EVERYWHERE = math.inf


@dataclasses.dataclass(frozen=True)
class HeadProfile:
    """How a head attends.

    Attributes:
        kind: "spatial", "temporal", "local" or "global".
        reach: tokens along t, h, w that it looks far; ``EVERYWHERE``: the axis does not matter.
        sharpness: κ before the common factor.
    """

    kind: str
    reach: tuple[float, float, float]
    sharpness: float


#: Twelve heads, one layer of the 1.3B model; wider layers repeat them.
PROFILES = (
    HeadProfile("spatial", (1.5, EVERYWHERE, EVERYWHERE), 6.0),
    HeadProfile("temporal", (EVERYWHERE, 3.0, 4.0), 7.0),
    HeadProfile("local", (2.0, 4.0, 6.0), 8.0),
    HeadProfile("spatial", (3.0, EVERYWHERE, EVERYWHERE), 4.0),
    HeadProfile("temporal", (EVERYWHERE, 6.0, 9.0), 4.0),
    HeadProfile("local", (3.0, 8.0, 12.0), 5.0),
    HeadProfile("global", (8.0, 16.0, 24.0), 1.0),
    HeadProfile("spatial", (1.5, 12.0, EVERYWHERE), 5.0),
    HeadProfile("temporal", (EVERYWHERE, 4.0, EVERYWHERE), 5.0),
    HeadProfile("local", (1.5, 3.0, 4.0), 10.0),
    HeadProfile("global", (12.0, 20.0, 30.0), 0.5),
    HeadProfile("local", (4.0, 6.0, 6.0), 4.0),
)


def axis_dims(dim: int) -> tuple[int, int, int]:
    """Features of a head that belong to t, h and w, as ``WanRotaryPosEmbed`` divides them."""
    plane = 2 * (dim // 6)
    return dim - 2 * plane, plane, plane


def frequencies(dim: int) -> list[Tensor]:
    """θ of the rotary pairs of each axis, float64 [pairs]."""
    return [10000.0 ** -(torch.arange(0, part, 2, dtype=torch.float64) / part) for part in axis_dims(dim)]


def amplitudes(profile: HeadProfile, dim: int, factor: float) -> Tensor:
    """Length of q, and of k, in every rotary pair of a head, fp32 [D/2]; the products are κ·√D·pᵢ."""
    parts = []
    for theta, reach in zip(frequencies(dim), profile.reach, strict=True):
        weights = torch.zeros_like(theta)
        if reach != EVERYWHERE:
            weights = torch.exp(-0.5 * ((theta * reach).log() / BAND) ** 2)
            weights = weights / weights.sum()
        length = (factor * profile.sharpness * math.sqrt(dim) * weights).sqrt()
        # A pair that hardly turns over a whole video carries content; it adds the same to every score.
        parts.append(torch.where((theta < 2e-3) & (length < CARRIER), CARRIER, length))
    return torch.cat(parts).float()


def place_queries(
    grid: tuple[int, int, int],
    dim: int,
    factor: float,
    profiles: Sequence[HeadProfile] = PROFILES,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer as its attention would see them, with content, fp32 [1, H, N, D].

    Args:
        grid: tokens along t, h, w.
    """
    generator = torch.Generator(device).manual_seed(seed)
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    angles = torch.cat(
        [
            place.flatten()[:, None] * theta.to(device)
            for place, theta in zip(axes, frequencies(dim), strict=True)
        ],
        1,
    )  # [N, D/2]
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    length = torch.stack([amplitudes(profile, dim, factor) for profile in profiles]).to(device)

    def turned() -> Tensor:
        content = CONTENT * torch.randn(
            1, len(profiles), *angles.shape, 2, device=device, generator=generator
        )
        content[..., 0] += 1.0
        rows = torch.view_as_complex(content) * length[None, :, None] * turn
        return torch.view_as_real(rows).flatten(-2)

    return turned(), turned()


def densities(
    grid: tuple[int, int, int],
    dim: int,
    factor: float,
    *,
    top_p: float,
    block: int,
    stride: int,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Density that top-p leaves to each profile, fp64 [len(PROFILES)]; one head at a time, to save memory."""
    tokens = math.prod(grid)
    found = []
    threshold = torch.tensor([top_p, top_p], device=device)
    for profile in PROFILES:
        q, k = place_queries(grid, dim, factor, [profile], device=device)
        bits = top_p_select(block_scores(q, k, block=block, stride=stride), threshold)
        found.append(token_pairs(bits, tokens, block).double().cpu().flatten() / tokens**2)
    return torch.cat(found)


def find_factor(
    grid: tuple[int, int, int], dim: int, target: float, *, steps: int = 12, **options: Any
) -> float:
    """The common factor of all κ at which the mean density is ``target``, by bisection.

    Args:
        options: of ``densities``.
    """
    low, high = math.log(0.05), math.log(50.0)
    for _ in range(steps):
        middle = (low + high) / 2
        dense = densities(grid, dim, math.exp(middle), **options).mean().item() > target
        low, high = (middle, high) if dense else (low, middle)
    return math.exp((low + high) / 2)


def build_transformer(
    *,
    factor: float,
    layers: int,
    heads: int,
    dim: int = 128,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A ``WanTransformer3DModel`` in eval mode with structured random weights.

    Args:
        factor: common factor of all κ, from ``find_factor``.
        layers, heads, dim: L, H and D.
        changes: further fields of its config, such as ``ffn_dim``.
    """
    diffusers = import_optional("diffusers", extra="demo")
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        config = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": dim, **changes}
        transformer = diffusers.WanTransformer3DModel(**config).eval().requires_grad_(False)
        for index, block in enumerate(transformer.blocks):
            _structure(block, index, heads, dim, factor)
        # The timestep reaches a block's self-attention through the first sixth of this projection.
        width = heads * dim
        embedder = transformer.condition_embedder
        # Fast sinusoids of the timestep would throw the means about from step to step: only slow ones count.
        half = config.get("freq_dim", 256) // 2
        fast = (torch.arange(half) < SLOWEST * half).repeat(2)
        embedder.time_embedder.linear_1.weight.normal_(0.0, half**-0.5)[:, fast] = 0.0
        embedder.time_embedder.linear_2.weight.normal_(0.0, width**-0.5)
        embedder.time_embedder.linear_2.bias.zero_()
        embedder.time_proj.weight[:width].normal_(0.0, 3.0 * TIMESTEP * width**-0.5)
    # As `from_pretrained` does: norms, modulation and rotary tables stay in float32.
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, tensor in [*transformer.named_parameters(), *transformer.named_buffers()]:
        if not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return transformer


def _structure(block: nn.Module, layer: int, heads: int, dim: int, factor: float) -> None:
    attention: Any = block.attn1
    width = heads * dim
    profiles = [PROFILES[(head + layer) % len(PROFILES)] for head in range(heads)]
    length = torch.cat([amplitudes(profile, dim, factor) for profile in profiles])
    bias = torch.tensor([1.0, 0.0]).repeat(width // 2)
    # The root mean square of bias and content, which the norm divides by, is multiplied back.
    root = math.sqrt(0.5 + CONTENT**2)
    for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
        linear.weight.normal_(0.0, CONTENT * width**-0.5)
        linear.bias.copy_(bias)
        norm.weight.copy_(root * length.repeat_interleave(2))


def latents_at(noise: Tensor, video: Tensor, sigma: float) -> Tensor:
    """The latents of a flow at noise level σ: (1 − σ)·video + σ·noise."""
    return (1.0 - sigma) * video + sigma * noise


def sigmas(steps: int, shift: float = 8.0) -> list[float]:
    """Noise levels of a run, first to last, as Wan's scheduler shifts them."""
    even = [1.0 - step / steps for step in range(steps)]
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in even]


def refresh_rate(anchors: Tensor, delta: float, *, gate: tuple[float, float] = (0.4, 0.8)) -> float:
    """Share of head calls that temporal mask reuse rebuilds after the first call, replayed on recorded means.

    Args:
        anchors: means of q and k at every step, fp32 [steps, L, H, 2, D].
        delta: δ; gate: as the option.
    """
    low, high = gate
    held = anchors[0].clone()
    rebuilt = 0.0
    for now in anchors[1:]:
        wants = (held - now).abs().sum((-2, -1)) > delta  # [L, H]
        share = wants.double().mean(1, keepdim=True)
        rebuild = (wants | (share > high)) & (share >= low)
        held[rebuild] = now[rebuild]
        rebuilt += rebuild.float().mean().item()
    return rebuilt / (len(anchors) - 1)


def find_delta(anchors: Tensor, target: float, *, gate: tuple[float, float] = (0.4, 0.8)) -> float:
    """δ at which ``refresh_rate`` comes nearest to ``target``, among percentiles of the drifts met."""
    drifts = (anchors[1:] - anchors[:1]).abs().sum((-2, -1)).flatten()
    candidates = torch.quantile(drifts.double(), torch.linspace(0.01, 1.0, 100).double()).tolist()
    return min(candidates, key=lambda delta: abs(refresh_rate(anchors, delta, gate=gate) - target))
