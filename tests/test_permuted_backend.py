"""``token_order`` through the backend: dense attention's video with full masks, else masks of that order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_wan
import torch
import torch.nn.functional as F
from predictor import gpu
from test_isolation import OPTIONS, sample_video
from tiny_wan import build_transformer, transformer_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from haste_compile import explain, optimize
from haste_compile.backend import reports
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, TokenOrderError
from haste_compile.predictors import get_predictor
from haste_compile.state import states_of, statistics
from haste_compile.token_order import ORDER_FIELDS, Grid, order_tensor

GRID: Grid = (5, 8, 8)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_in(order: str, transformer: nn.Module, *, dynamic: bool | None = False, **changes: Any) -> Any:
    options = {**OPTIONS, "token_order": order, "strict": True, **changes}
    return torch.compile(transformer, backend="haste", dynamic=dynamic, options=options)


def run(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**transformer_inputs(), **inputs})[0]


@pytest.mark.parametrize(
    ("inner", "order"),
    [("aot_eager", "hilbert"), ("inductor", "tile3d")],  # eager: in the test of grids below
)
def test_full_masks_give_what_dense_attention_gives(inner: str, order: str) -> None:
    transformer = build_transformer(num_layers=1)
    found = run(compile_in(order, transformer, inner=inner, top_p=1.0))
    torch.testing.assert_close(found, run(transformer), rtol=1e-4, atol=1e-5)
    assert statistics(transformer).density == 1.0


class InOrder(TorchFunctionMode):
    """Self-attention by definition: permute q, k, v, attend with masks made from them, permute back."""

    def __init__(self, order: str, config: HasteConfig) -> None:
        self.order, self.inverse = (order_tensor(f, order, GRID, config.block_size) for f in ORDER_FIELDS)
        self.config, self.pairs = config, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = kwargs or {}
        if func is not F.scaled_dot_product_attention or call["query"].shape != call["key"].shape:
            return func(*args, **call)
        q, k, v = (
            call[name].transpose(1, 2)[:, self.order].transpose(1, 2) for name in ("query", "key", "value")
        )
        top_p = torch.full((q.shape[1],), float(self.config.top_p))  # type: ignore[arg-type]
        out, pairs = get_predictor("xattention").attend_once(q, k, v, top_p, self.config)
        self.pairs += int(pairs.sum())
        return out[:, :, self.inverse]


def test_masks_are_made_from_tokens_in_that_order() -> None:
    transformer = build_transformer()
    found = run(compile_in("hilbert", transformer))
    config = HasteConfig.from_options(OPTIONS)
    with InOrder("hilbert", config) as mode:
        expected = run(transformer)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert statistics(transformer).density == pytest.approx(mode.pairs / (2 * 2 * math.prod(GRID) ** 2))
    torch._dynamo.reset()
    raster = run(compile_in("raster", build_transformer()))
    assert (raster - expected).abs().max() > 1e-3, "in raster order the masks are others"


def test_video_a_is_the_same_after_other_videos() -> None:
    model = compile_in("tile3d", build_transformer())
    first = sample_video(model)
    found = statistics(model)
    assert 0.3 < found.refresh_rate < 0.95 and 0.2 < found.density < 0.95, "else it would prove nothing"
    for intruder in ({"prompt": 2}, {"seed": 5}, {"width": 24}):
        assert not torch.equal(sample_video(model, **intruder), first)
        assert torch.equal(sample_video(model), first)


def test_grids_of_equal_size_have_orders_of_their_own() -> None:
    """Portrait and landscape hold as many tokens; one graph, one order and one state each."""
    transformer = build_transformer(num_layers=1)
    model = compile_in("tile3d", transformer, top_p=1.0)
    for height, width in ((96, 160), (160, 96), (96, 160)):
        inputs = transformer_inputs(height=height, width=width)
        torch.testing.assert_close(run(model, **inputs), run(transformer, **inputs), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    orders = [state.tensor(None, "token_order").clone() for state in states_of(transformer)]
    assert len(orders) == 2 and not torch.equal(*orders)
    for state in states_of(transformer):
        state.reset()
    after = [state.tensor(None, "token_order") for state in states_of(transformer)]
    assert all(torch.equal(a, b) for a, b in zip(after, orders, strict=True))


def test_a_single_block_stays_in_raster_order_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan.build_pipeline()
    options = {**OPTIONS, "token_order": "tile3d", "compile": "blocks"}
    with optimize(pipe, **options) as handle:
        run(pipe.transformer)
        first, _ = handle.reports()["transformer"]
        assert first.token_order == "raster" and "compiled alone" in first.order_reason
        assert "tokens stay in raster order: no 3-D convolution" in handle.summary()
    assert "tokens stay in raster order instead of tile3d" in caplog.text
    torch._dynamo.reset()
    with optimize(pipe, **options, strict=True), pytest.raises(TokenOrderError, match="compiled alone"):
        run(pipe.transformer)


def test_the_second_size_of_a_dynamic_graph_stays_in_raster_order() -> None:
    transformer = build_transformer(num_layers=1)
    model = compile_in("tile3d", transformer, dynamic=None, strict=False, top_p=1.0)
    for width in (128, 192):
        inputs = transformer_inputs(width=width)
        torch.testing.assert_close(run(model, **inputs), run(transformer, **inputs), rtol=1e-4, atol=1e-5)
    fixed, symbolic = reports(transformer)
    assert fixed.token_order == "tile3d (4×4×4 in a grid of 5×8×8)"
    assert symbolic.token_order == "raster" and "symbolic" in symbolic.order_reason


def test_image_to_video_pipeline_and_explain() -> None:
    """Dense and ordered videos agree with full masks; what ``explain`` foretold is what the handle tells."""
    from PIL import Image

    pipe = tiny_wan.build_image_pipeline()
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    options = {**OPTIONS, "token_order": "hilbert", "strict": True, "top_p": 1.0}

    def video() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(
            Image.new("RGB", (tiny_wan.WIDTH, tiny_wan.HEIGHT), "red"), "a red circle",
            num_inference_steps=2, generator=generator, output_type="latent", **size,
        ).frames  # fmt: skip

    dense = video()
    explained = explain(pipe, **size, **options)["transformer"]
    with optimize(pipe, **options) as handle:
        torch.testing.assert_close(video(), dense, rtol=1e-3, atol=1e-4)
        (report,) = handle.reports()["transformer"]
        assert "  token order hilbert (a grid of 5×8×8)" in handle.summary().splitlines()
        (state,) = states_of(pipe.transformer)
    assert explained.report.token_order == report.token_order == "hilbert (a grid of 5×8×8)"
    assert explained.grid == GRID and explained.state_bytes == state.nbytes()
    assert "token order hilbert (a grid of 5×8×8)" in str(explained)
    assert explained.to_dict()["report"]["token_order"] == explained.report.token_order


@gpu
@pytest.mark.gpu
def test_a_permuted_graph_never_waits_for_the_device() -> None:
    transformer = build_transformer().to("cuda", torch.float16)
    inputs = {
        name: value.to("cuda", torch.float16) if isinstance(value, Tensor) else value
        for name, value in transformer_inputs().items()
    }
    model = compile_in("tile3d", transformer, top_p=1.0)
    with torch.no_grad():
        dense = transformer(**inputs)[0]
        model(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(**inputs)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)


def test_an_unknown_order_is_refused() -> None:
    for wrong in ("zigzag", None, 3):
        with pytest.raises(
            OptionError, match="option token_order: found .* wanted one of 'raster', 'tile3d'"
        ):
            HasteConfig.from_options({"token_order": wrong})
