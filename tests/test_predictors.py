"""The predictor interface: a third predictor is one file, the class below, and one line in PREDICTORS."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_wan
import torch
import torch.nn.functional as F
from torch import Tensor

from haste_compile import optimize
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError
from haste_compile.kernels.block_mask import pack_bits, token_pairs
from haste_compile.kernels.drift_gate.reference import decide
from haste_compile.kernels.layout import Counter, Ctl
from haste_compile.predictors import PREDICTORS
from haste_compile.predictors.base import Layout, OpCall, Predictor, Size
from haste_compile.predictors.xattention import ATTENTION

OPTIONS = {"block_size": 64, "stride": 8, "min_tokens": 64, "top_p": 0.7, "inner": "eager"}


@torch.library.custom_op("haste_test::keep_diagonal_", mutates_args=("mask", "counters"))
def keep_diagonal_(q: Tensor, k: Tensor, ctl: Tensor, mask: Tensor, counters: Tensor, block: int) -> None:
    slot, blocks = int(ctl[Ctl.SLOT]), mask.shape[3]
    nothing = torch.zeros(*q.shape[:2], 1)
    rebuild, _, counters[slot] = decide(
        nothing, nothing, torch.zeros(q.shape[1]), ctl, torch.zeros(*q.shape[:2], 2, 1), counters[slot],
        tokens=q.shape[2], reuse="freeze", interval=0, max_age=0, gate_low=0.0, gate_high=1.0, relative=False,
    )  # fmt: skip
    place = torch.arange(blocks)
    bits = pack_bits((place - place[:, None]).abs() <= 1)
    mask[slot][rebuild] = bits
    for column in (Counter.KEPT, Counter.KEPT_SUM):
        counters[slot, ..., column] += rebuild * token_pairs(bits, q.shape[2], block)


@keep_diagonal_.register_fake
def _(q: Tensor, k: Tensor, ctl: Tensor, mask: Tensor, counters: Tensor, block: int) -> None: ...


class Diagonal(Predictor):
    """Keeps a query block's own keys and those of its two neighbours."""

    def blocks(self, tokens: Size, config: HasteConfig) -> tuple[Size, Size]:
        return (blocks := -(-tokens // config.block_size)), blocks

    def why_not(self, tokens: Size, config: HasteConfig) -> str | None:
        return None

    def state(self, tokens: Size, dim: Size, config: HasteConfig) -> dict[str, Layout]:
        rows, columns = self.blocks(tokens, config)
        return {"mask": ((rows, -(-columns // 32)), torch.int32)}

    def refresh(self, config: HasteConfig, scale: float) -> OpCall:
        op = torch.ops.haste_test.keep_diagonal_.default
        return OpCall(op, ("ctl", "mask", "counters"), {"block": config.block_size})

    def attention(self, config: HasteConfig, scale: float) -> OpCall:
        return OpCall(ATTENTION, ("mask", "ctl"), {"block": config.block_size, "scale": scale})


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICTORS, "diagonal", Diagonal())


@pytest.mark.usefixtures("third")
def test_a_third_predictor_generates() -> None:
    torch._dynamo.reset()
    pipe = tiny_wan.build_pipeline()
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    with optimize(pipe, predictor="diagonal", **OPTIONS) as handle:
        generator = torch.Generator().manual_seed(0)
        video = pipe("a red circle", num_inference_steps=4, generator=generator, output_type="latent", **size)
        assert video.frames.isfinite().all()
        found = handle.statistics()["transformer"]
        said = handle.explain(**size)["transformer"]
    assert found.sites == ("blocks.0.attn1", "blocks.1.attn1")
    assert found.density == pytest.approx(13 / 25)  # of five blocks of 64: two rows of two, three of three
    assert found.refresh_rate == pytest.approx(1 / 4)
    assert (said.blocks, said.key_blocks) == (5, 5)
    assert len(said.report.rewritten) == tiny_wan.LAYERS


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize("name", ["xattention", "diagonal"])
def test_attend_once_is_the_first_step_of_a_video(name: str) -> None:
    config = HasteConfig(predictor=name, block_size=64, stride=8)
    q, k, v = torch.randn(3, 2, 3, 333, 64, generator=torch.Generator().manual_seed(0)).unbind()
    top_p = torch.tensor([0.3, 0.6, 1.0])
    out, pairs = PREDICTORS[name].attend_once(q, k, v, top_p, config)
    assert pairs.shape == (2, 3) and pairs.dtype == torch.int64
    if name == "diagonal":
        block = torch.arange(333) // 64
        kept = (block - block[:, None]).abs() <= 1
        assert (pairs == kept.sum()).all()
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    else:
        assert (pairs[:, 0] < pairs[:, 1]).all() and (pairs[:, 2] == 333**2).all()
        out, wanted = out[:, 2], F.scaled_dot_product_attention(q, k, v)[:, 2]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_unknown_predictors_are_refused_by_name() -> None:
    for wrong in ("svg9", None, ["xattention"]):
        with pytest.raises(OptionError, match=r"option predictor: found .* wanted one of 'xattention'"):
            HasteConfig.from_options({"predictor": wrong})


@pytest.mark.usefixtures("third")
def test_a_predictors_defaults_yield_to_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diagonal, "defaults", {"delta": 8.0})
    assert HasteConfig.from_options({"predictor": "diagonal"}).delta == 8.0
    assert HasteConfig.from_options({"predictor": "diagonal", "delta": 3.0}).delta == 3.0
    plain = HasteConfig.from_options({})
    assert plain.predictor == "xattention" and dataclasses.replace(plain, predictor="diagonal").delta == 30.0
