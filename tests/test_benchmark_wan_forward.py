from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks import structured_weights, wan_forward
from benchmarks.wan_forward import Geometry, Run
from haste_compile.clock import Clock
from haste_compile.config import HasteConfig
from haste_compile.kernels.layout import Counter
from haste_compile.state import HasteState, StateSpec

GRID = (4, 16, 18)
BLOCKS = {"block": 64, "stride": 8}


@pytest.fixture(scope="module")
def small() -> Run:
    """One layer × 12 heads × 128 on 768 tokens, eager."""
    return Run(
        Geometry(1, 12, 128, (4, 12, 16), text_tokens=8), "cpu", torch.float32,
        {"block_size": 64, "stride": 8, "inner": "eager"},
        density=0.25, refresh=0.2, steps=6, text_dim=32, in_channels=4, out_channels=4,
    )  # fmt: skip


def test_heads_differ_as_their_profiles_say() -> None:
    factor = structured_weights.find_factor(GRID, 128, 0.25, top_p=0.9, **BLOCKS)
    density = structured_weights.densities(GRID, 128, factor, top_p=0.9, **BLOCKS)
    assert density.mean().item() == pytest.approx(0.25, abs=0.01)
    assert density.max() > 5 * density.min()
    kinds = [profile.kind for profile in structured_weights.PROFILES]
    assert set(kinds) == {"spatial", "temporal", "local", "global"}
    of_kind = {
        kind: torch.stack([d for d, k in zip(density, kinds, strict=True) if k == kind]).mean()
        for kind in kinds
    }
    assert of_kind["local"] < min(of_kind["spatial"], of_kind["temporal"]) < of_kind["global"]


def test_a_spatial_head_looks_along_its_frame_and_a_temporal_one_through_time() -> None:
    frame = 16 * 18
    for kind in ("spatial", "temporal"):
        profile = next(p for p in structured_weights.PROFILES if p.kind == kind)
        q, k = structured_weights.place_queries(GRID, 128, 5.0, [profile])
        weights = torch.softmax(q[0, 0, frame : 2 * frame] @ k[0, 0].T / 128**0.5, 1)
        weights = weights.view(16, 18, 4, 16, 18)
        in_frame = weights[:, :, 1].sum((-2, -1)).mean()
        # Queries of one place, keys within three tokens of it, in every frame.
        at_place = weights[8, 9, :, 5:12, 6:13].sum()
        if kind == "spatial":
            assert in_frame > 0.5 and at_place < 0.4
        else:
            assert in_frame < 0.4 and at_place > 0.6


def test_a_higher_target_density_gives_a_smaller_factor() -> None:
    sparse, dense = (
        structured_weights.find_factor(GRID, 128, target, top_p=0.9, steps=6, **BLOCKS)
        for target in (0.15, 0.4)
    )
    assert sparse > 2 * dense


def test_the_rate_of_refreshes_is_set_by_delta() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(20, 3, 12, 2, 16, generator=generator).cumsum(0)
    assert structured_weights.refresh_rate(anchors, float("inf")) == 0.0
    assert structured_weights.refresh_rate(anchors, 0.0) == 1.0
    for target in (0.2, 0.5):
        delta = structured_weights.find_delta(anchors, target)
        assert structured_weights.refresh_rate(anchors, delta) == pytest.approx(target, abs=0.06)


def test_density_and_refresh_rate_come_out_as_asked_for(small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(wan_forward, "check_site", lambda *sides: checked.append(sides))

    def timer(call: Any) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    result = wan_forward.compare(small, "whole", timer=timer, profile=False, dense_backend="eager")
    assert result.density == pytest.approx(0.25, abs=0.04)
    assert result.refresh_rate == pytest.approx(0.2, abs=0.08)
    assert result.dense_ms > 0 and result.haste_ms > 0 and len(checked) == 1
    assert "density 0.2" in wan_forward.report(result)
    _, _, state = checked[0]
    kept = state.counters()[0][0, 0, :, Counter.KEPT].double() / 768**2
    assert kept.max() > 5 * kept.min()
    # Two slots × 12 heads: 12 rows of one word, two means of 128 features, 8 counters; both thresholds; ctl.
    assert result.state_bytes == 2 * 12 * (12 * 4 + 2 * 128 * 4 + 8 * 8) + 2 * 12 * 4 + 8 * 4


def test_the_twin_shares_its_weights(small: Run) -> None:
    twin = small.twin()
    ours = dict(small.transformer.named_parameters())
    assert all(p.data_ptr() == ours[name].data_ptr() for name, p in twin.named_parameters())
    torch.testing.assert_close(small.forward(twin, 3), small.forward(small.transformer, 3))


def test_the_first_attention_is_self_attention(small: Run) -> None:
    with wan_forward._FirstAttention() as seen:
        small.forward(small.twin(), 0)
    assert [tuple(x.shape) for x in seen.inputs] == [(1, 12, 768, 128)] * 3


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("block_sparse_attention_kernel", "sparse attention"),
        ("block_sparse_attention_hopper", "sparse attention"),
        ("group_lse_kernel", "refresh: scores"),
        ("select_kernel", "refresh: top-p"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "dense attention"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "dense attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNN", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "linear"),
        ("triton_poi_fused_add_mul_3", "rest"),
    ],
)
def test_kernels_are_sorted_by_what_they_do(kernel: str, kind: str) -> None:
    assert wan_forward.kind_of(kernel) == kind


def test_the_bound_takes_cross_attention_from_the_haste_run() -> None:
    dense = wan_forward.parts([("flash_fwd", 80e3), ("nvjet_a", 30e3), ("triton_b", 10e3)], forwards=2)
    haste = wan_forward.parts([("flash_fwd", 8e3), ("block_sparse_attention_kernel", 20e3)], forwards=2)
    assert dense == {"dense attention": 40.0, "linear": 15.0, "rest": 5.0}
    # 60 ms dense, 36 of them self-attention; a quarter of that and 24 ms remain.
    assert wan_forward.bound(dense, haste, 0.25) == pytest.approx(60 / (24 + 9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert wan_forward.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("slots", "most"), [(2, 0.15e9), (4, 0.3e9)])
def test_state_of_14b_at_720p_fits_the_goal(slots: int, most: float) -> None:
    # Both guidance branches, and the default of four slots; on the meta device, which allocates nothing.
    device = torch.device("meta")
    specs = [StateSpec(f"blocks.{i}.attn1", 1, 40, 75600, 128, device) for i in range(40)]
    config = HasteConfig(slots=slots)
    state = HasteState(
        specs, config, clock=Clock(slots=slots, device=torch.device("cpu")), rows=(range(40), 40)
    )
    assert 0.9 * most < state.nbytes() <= most
