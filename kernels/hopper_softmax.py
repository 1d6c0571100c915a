"""What the online softmax of Hopper's two attention kernels does in its own way, Gluon.

* A row's four threads add up what they hold, each for itself, and put their sums together once, at the end.
* A warp whose rows all keep their running maximum skips the rescaling of its outputs: a seventh of the loop's
  instructions, mostly for nothing, since late blocks seldom raise a maximum. The result has the same bits.

FlashAttention-4 goes further, on Blackwell: its maximum lags behind by up to 2⁸. Here that was as fast, and
its error twice SDPA's where one key dominates, whose weight is then no longer 1, which is exact.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

#: 64 numbers of a thread times the factors of its two rows, in turns of two; nothing where they are 1 in all
#: of the warp. The branch is a warp's own, which Gluon has no word for.
_RESCALE = gl.constexpr(
    "{ .reg .pred p, q; "
    "setp.neu.f32 p, $128, 0f3F800000; setp.neu.f32 q, $130, 0f3F800000; or.pred p, p, q; "
    "vote.sync.any.pred p, p, 0xffffffff; @!p bra SKIP${:uid}; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${i + 128};" for i in range(64))
    + " SKIP${:uid}: }"
)
_OPERANDS = gl.constexpr(",".join(["=f"] * 64 + [str(i) for i in range(64)] + ["f"] * 64))


@gluon.jit
def lane_sums(weights):
    """Sums [64, 4] of what each of the four threads of a row holds of it."""
    return gl.sum(gl.sum(weights.reshape([64, 16, 4, 2]), 3), 1)


@gluon.jit
def times_rows(sums, factor):
    """[64, 4] times a factor a row, which every thread of the row has."""
    return sums * gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout))[:, None]


@gluon.jit
def rescale_rows(accumulator, factor, LAYOUT: gl.constexpr):
    """[64, 128] times a factor a row."""
    factors = gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None].broadcast_to([64, 128])
    return gl.inline_asm_elementwise(
        _RESCALE, _OPERANDS, [accumulator, factors], dtype=gl.float32, is_pure=False, pack=64
    )
