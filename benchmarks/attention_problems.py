"""What the attention benchmark computes: inputs, three kinds of masks, and the check before any timing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from haste_compile.errors import HasteError
from haste_compile.kernels.block_mask import BlockMask, pack_bits, token_pairs

DTYPE = torch.bfloat16
HEAD_DIM = 128
BLOCK = 128

#: Frames of tokens (height, width) of Wan 2.1's 480p and 720p; a video of N tokens has N / (h·w) of them.
FRAME_480P, FRAME_720P = (30, 52), (45, 80)

#: τ of the first and of the last head of an uneven mask.
FIRST_TOP_P, LAST_TOP_P = 0.5, 0.99


class WrongResultError(HasteError):
    """A kernel's output is further from float64 than it may be: its time would mean nothing."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """q, k, v [1, H, N, D] as a transformer delivers them (heads permuted) and a block mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor  # bool [1, H, Tq, Tk]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def bits(self) -> Tensor:
        return pack_bits(self.kept)

    def lists(self) -> BlockMask:
        indices = self.kept.int().argsort(dim=-1, descending=True, stable=True).int()
        return BlockMask(self.kept.sum(-1, dtype=torch.int32), indices, BLOCK)

    def pairs(self) -> int:
        return int(token_pairs(self.bits(), self.tokens, BLOCK).sum())

    def flops(self) -> int:
        """4·D a kept query-key pair: one product with K and one with V."""
        return 4 * self.q.shape[3] * self.pairs()

    def bytes(self) -> int:
        """The fewest bytes: q, k, v and the output once, the log-sum-exps, and the lists that are walked."""
        tensors = 4 * self.q.numel() * self.q.element_size()
        rows = self.kept.shape[0] * self.kept.shape[1] * self.kept.shape[2]
        return tensors + 4 * self.q.shape[:3].numel() + 4 * (rows + int(self.kept.sum()))

    def full(self) -> Problem:
        """The same inputs with every block kept: what a dense kernel computes."""
        return dataclasses.replace(self, kept=torch.ones_like(self.kept))


def make_problem(
    tokens: int, heads: int, density: float, mask: str = "even", *, seed: int = 0, device: str = "cuda"
) -> Problem:
    """Gaussian q, k, v, and a mask of about that density; a query block's own keys are always kept.

    Args:
        mask: a name in ``MASKS``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, tokens, heads, HEAD_DIM)
    q, k, v = (
        torch.randn(size, device=device, dtype=DTYPE, generator=generator).transpose(1, 2) for _ in range(3)
    )
    blocks = -(-tokens // BLOCK)
    kept = MASKS[mask](tokens, heads, density, generator)
    return Problem(q, k, v, kept | torch.eye(blocks, dtype=torch.bool, device=device))


def even_mask(tokens: int, heads: int, density: float, generator: torch.Generator) -> Tensor:
    """Each block kept with the same probability: rows of about one length, neighbours unrelated."""
    blocks = -(-tokens // BLOCK)
    return torch.rand(1, heads, blocks, blocks, device=generator.device, generator=generator) < density


def uneven_mask(tokens: int, heads: int, density: float, generator: torch.Generator) -> Tensor:
    """Rows of many lengths, as top-p leaves them when every head has its own τ, .5 to .99.

    The mass of the blocks of a row is taken to be log-normal with a width σ that varies by row. The largest
    blocks that together hold τ of it are then a share Φ(Φ⁻¹(τ) − σ) of the row; one factor of all σ, found by
    bisection, sets the mean.
    """
    blocks = -(-tokens // BLOCK)
    device = generator.device
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64, device=device),
        torch.ones((), dtype=torch.float64, device=device),
    )
    top_p = torch.linspace(FIRST_TOP_P, LAST_TOP_P, heads, dtype=torch.float64, device=device)
    widths = torch.rand(heads, blocks, device=device, generator=generator).double() * 0.8 + 0.6

    def shares(factor: float) -> Tensor:
        return normal.cdf(normal.icdf(top_p)[:, None] - factor * widths)

    narrow, wide = -8.0, 8.0
    for _ in range(50):
        middle = (narrow + wide) / 2
        narrow, wide = (middle, wide) if shares(middle).mean() > density else (narrow, middle)
    counts = (shares(narrow) * blocks).round().clamp(1, blocks)
    order = torch.rand(1, heads, blocks, blocks, device=device, generator=generator).argsort(-1).argsort(-1)
    return order < counts[None, :, :, None]


def structured_mask(tokens: int, heads: int, density: float, generator: torch.Generator) -> Tensor:
    """Neighbourhoods in (t, h, w), as video models have them: columns in runs, rows at the borders shorter.

    Heads take turns as spatial (few frames, wide), temporal (many frames, narrow), local in all three, and
    spread (four times as dense as the rest, anywhere).
    """
    height, width = FRAME_720P if tokens >= 21 * math.prod(FRAME_720P) else FRAME_480P
    device = generator.device
    blocks = -(-tokens // BLOCK)
    token = (torch.arange(blocks, device=device) * BLOCK + BLOCK // 2).clamp(max=tokens - 1)
    place = torch.stack(
        [token // (height * width), token // width % height, token % width], 1
    ).float()  # middle of each block, [T, 3]
    reach = torch.tensor([[1.0, 30.0, 60.0], [20.0, 4.0, 8.0], [4.0, 10.0, 20.0]], device=device)
    shares = (4 / 7, 4 / 7, 4 / 7, 16 / 7)  # times the density; their mean is 1
    kept = torch.empty(1, heads, blocks, blocks, dtype=torch.bool, device=device)
    for head in range(heads):
        kind = head % 4
        if kind < 3:
            apart = ((place[:, None] - place[None]) / reach[kind]).square().sum(-1)
        else:
            apart = torch.rand(blocks, blocks, device=device, generator=generator)
        nearest = max(1, min(blocks * blocks, round(shares[kind] * density * blocks * blocks)))
        kept[0, head] = apart <= apart.flatten().kthvalue(nearest).values
    return kept


MASKS: dict[str, Callable[[int, int, float, torch.Generator], Tensor]] = {
    "even": even_mask,
    "uneven": uneven_mask,
    "structured": structured_mask,
}


def check(what: str, out: Tensor, problem: Problem, samples: int = 3) -> float:
    """Largest ratio of errors against float64, ``out``'s over SDPA's, on evenly spread query blocks.

    Raises:
        WrongResultError: a ratio above 2, or a value that is not finite.
    """
    blocks = problem.kept.shape[2]
    of_token = torch.arange(problem.tokens, device=out.device) // BLOCK
    worst = 0.0
    for head in range(out.shape[1]):
        for block in {round(i * (blocks - 1) / (samples - 1)) for i in range(samples)}:
            rows = slice(block * BLOCK, min((block + 1) * BLOCK, problem.tokens))
            keys = problem.kept[0, head, block][of_token]
            q = problem.q[:, head : head + 1, rows]
            k, v = (x[:, head : head + 1, keys] for x in (problem.k, problem.v))
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            yardstick = (F.scaled_dot_product_attention(q, k, v) - exact).abs().max().item()
            error = (out[:, head : head + 1, rows] - exact).abs().max().item()
            if not error <= 2 * yardstick:  # also when it is NaN
                raise WrongResultError(
                    found=f"error {error:.2e} against float64",
                    wanted=f"at most twice SDPA's, {yardstick:.2e}",
                    where=f"{what}, N = {problem.tokens}, head {head}, query block {block}",
                    fix="Run the tests marked gpu.",
                )
            worst = max(worst, error / yardstick)
    return worst


def check_poison(what: str, attention: Callable[[Problem], Tensor], problem: Problem) -> None:
    """NaN in every key and value that a whole head drops must not reach the output.

    Args:
        problem: of at least four blocks; its inputs are spoilt.

    Raises:
        WrongResultError: the output changed.
    """
    problem.kept[..., 2] = False
    problem.kept[..., 2, 0] = True
    clean = attention(problem)
    problem.k[:, :, 2 * BLOCK : 3 * BLOCK] = float("nan")
    problem.v[:, :, 2 * BLOCK : 3 * BLOCK] = float("inf")
    if not torch.equal(clean, attention(problem)):
        raise WrongResultError(
            found="an output that depends on dropped keys",
            wanted="the same output",
            where=f"{what}, N = {problem.tokens}",
            fix="Run the tests marked gpu.",
        )
