"""The ONNX artifact in ONNX Runtime: the live backend's masks and latents, and what the file is made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from artifact_case import denoise, export, inputs, live, relative_error
from torch import fx

from haste_compile import artifacts
from haste_compile.artifacts import Manifest
from haste_compile.artifacts.onnx import DOMAIN, name_operators, open_
from haste_compile.errors import ArtifactError, ArtifactVersionError, DependencyError
from haste_compile.kernels import functional
from haste_compile.kernels.layout import Counter
from haste_compile.loading import NANO_WAN
from haste_compile.state import states_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def exported(artifact: Callable[[str], Path]) -> tuple[Path, Manifest]:
    path = artifact("onnx")
    return path, Manifest.read(path)


def test_fifty_steps_with_the_state_fed_back_equal_eager(exported) -> None:
    path, _ = exported
    eager, runner = live(), artifacts.load(path, trust=True)
    for seed, steps in ((0, 50), (1, 8), (0, 8)):  # after another video nothing of it is left
        video = inputs(seed=seed, steps=steps)
        assert relative_error(denoise(runner, video), denoise(eager, video)) < 1e-5
        (state,) = states_of(eager)
        for expected, counters in zip(state.counters(), runner.state.counters(), strict=True):
            assert torch.equal(counters, expected)
        for i in range(tiny_wan.LAYERS):
            assert torch.equal(runner.state.tensor(i, "mask"), state.tensor(i, "mask"))
    figures = runner.statistics()
    assert 0.05 < figures.refresh_rate < 0.9 and figures.density < 0.9  # reused, rebuilt and sparse


def test_trained_heads_keep_the_same_blocks(tmp_path: Path) -> None:
    """One of nano-wan's blocks: attention that was learnt, masks that differ from head to head."""
    diffusers = pytest.importorskip("diffusers")
    nano = diffusers.WanTransformer3DModel.from_pretrained(NANO_WAN / "transformer").eval()
    nano.blocks = nano.blocks[:1]
    size = {"height": 256, "width": 256, "num_frames": 17}
    export("onnx", tmp_path / "nano.onnx", nano, **size, text_tokens=8, stride=16, top_p=0.95, delta=4.0)
    runner = artifacts.load(tmp_path / "nano.onnx", trust=True)
    options = runner.manifest.config.to_options() | {"inner": "eager"}
    eager = torch.compile(nano, backend="haste", dynamic=False, options=options)
    generator = torch.Generator().manual_seed(0)
    channels, text = nano.config.in_channels, (1, 8, nano.config.text_dim)
    video = inputs(steps=3) | {
        "latents": torch.randn(1, channels, 5, 32, 32, generator=generator),
        "prompt": torch.randn(text, generator=generator),
        "negative": torch.randn(text, generator=generator),
    }
    assert relative_error(denoise(runner, video), denoise(eager, video)) < 1e-3
    (state,) = states_of(nano)
    kept = [counters[..., Counter.KEPT_SUM].double() for counters in runner.state.counters()]
    for mine, expected in zip(kept, state.counters(), strict=True):
        torch.testing.assert_close(mine, expected[..., Counter.KEPT_SUM].double(), rtol=1e-3, atol=0)
    spread = torch.stack(kept)
    assert spread.max() > 1.5 * spread[spread > 0].min()


def test_the_file_holds_standard_operators_and_functions_of_our_domain(exported) -> None:
    path, manifest = exported
    model = onnx.load(str(path))
    onnx.checker.check_model(str(path), full_check=True)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions == {"": 20, DOMAIN: 1}
    assert {(f.domain, f.name) for f in model.functions} == {
        (DOMAIN, "refresh_mask"),
        (DOMAIN, "block_sparse_attention"),
    }
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len(ours) == 2 * tiny_wan.LAYERS
    options = {a.name: onnx.helper.get_attribute_value(a) for a in ours[0].attribute}
    assert options["block"] == 64 and options["stride"] == 8 and options["reuse"] == b"drift"
    used = {node.op_type for graph in (model.graph, *model.functions) for node in graph.node}
    # No runtime sorts in parallel well, and TensorRT has no shifts, bits or bit casts.
    assert used.isdisjoint({"TopK", "Unique", "NonZero", "Loop", "BitShift", "BitwiseAnd", "BitCast"})
    assert {node.domain for f in model.functions for node in f.node} == {""}
    inputs = [(x.name, tuple(d.dim_value for d in x.type.tensor_type.shape.dim)) for x in model.graph.input]
    assert inputs == [(x.name, x.shape) for x in (*manifest.inputs, *manifest.state)]
    assert [x.name for x in model.graph.output] == manifest.extra["outputs"]
    assert manifest.extra["outputs"][:2] == ["sample", "new_haste_0_mask"]


def test_a_kernel_takes_over_by_name(exported) -> None:
    """As a runtime with a native kernel would: both ops run in torch, the functions are not looked at."""
    from onnx.reference.op_run import OpRun

    called: list[str] = []

    class RefreshMask(OpRun):
        op_domain, op_type = DOMAIN, "refresh_mask"

        def _run(self, *tensors: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
            called.append(self.op_type)
            options["relative"] = bool(options["relative"])
            new = functional.refresh_mask(*map(torch.from_numpy, tensors), **options)
            return tuple(x.numpy() for x in new)

    class BlockSparseAttention(OpRun):
        op_domain, op_type = DOMAIN, "block_sparse_attention"

        def _run(self, *tensors: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
            called.append(self.op_type)
            return (functional.block_sparse_attention(*map(torch.from_numpy, tensors), **options).numpy(),)

    RefreshMask.__name__, BlockSparseAttention.__name__ = "refresh_mask", "block_sparse_attention"
    path, manifest = exported
    generator = torch.Generator().manual_seed(3)
    feeds = [
        torch.randn(x.shape, generator=generator) if x.dtype == "float32" else torch.zeros(x.shape)
        for x in (*manifest.inputs, *manifest.state)
    ]
    tensors = [
        x.to(layout.torch_dtype) for x, layout in zip(feeds, (*manifest.inputs, *manifest.state), strict=True)
    ]
    tensors[len(manifest.inputs) - 1][1] = 1  # the first video
    sample, state = open_(manifest, path, torch.device("cpu"))(
        tensors[: len(manifest.inputs)], tensors[len(manifest.inputs) :]
    )
    named = {
        layout.name: x.numpy() for layout, x in zip((*manifest.inputs, *manifest.state), tensors, strict=True)
    }
    evaluator = onnx.reference.ReferenceEvaluator(str(path), new_ops=[RefreshMask, BlockSparseAttention])
    results = evaluator.run(None, named)
    assert called == ["refresh_mask", "block_sparse_attention"] * tiny_wan.LAYERS
    for expected, got in zip((sample, *state), results, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)


def test_sites_of_two_shapes_are_refused() -> None:
    attention = torch.ops.haste.block_sparse_attention.default
    gm = fx.GraphModule({}, fx.Graph())
    for tokens in (128, 192):
        q, mask, ctl = (gm.graph.placeholder(f"{name}_{tokens}") for name in ("q", "mask", "ctl"))
        q.meta["val"] = torch.empty(1, 2, tokens, 64)
        mask.meta["val"] = torch.empty(2, 1, 2, tokens // 64, 1, dtype=torch.int32)
        ctl.meta["val"] = torch.empty(8, dtype=torch.int32)
        gm.graph.call_function(attention, (q, q, q, mask, ctl), {"block": 64, "scale": 0.125})
    with pytest.raises(ArtifactError, match=r"\(1, 2, 128, 64\).*\(1, 2, 192, 64\)"):
        name_operators(gm)


def test_a_model_that_the_runtime_refuses_is_an_error_with_its_words(exported, tmp_path: Path) -> None:
    _, manifest = exported
    path = tmp_path / "later.onnx"
    node = onnx.helper.make_node("FromALaterOpset", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "later", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    with pytest.raises(ArtifactVersionError, match=r"FromALaterOpset.*opset 20"):
        open_(manifest, path, torch.device("cpu"))


def test_what_is_missing_is_a_typed_error(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = exported
    if "CUDAExecutionProvider" not in sys.modules["onnxruntime"].get_available_providers():
        with pytest.raises(DependencyError, match="CUDAExecutionProvider"):
            open_(manifest, path, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"haste-compile\[onnx\]"):
        artifacts.load(path, trust=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DependencyError, match=r"haste-compile\[onnx\]"):
        export("onnx", tmp_path / "x.onnx")
