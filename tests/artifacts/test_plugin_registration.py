"""The plugins in TensorRT's own Python code: signatures, shapes, launches, and PTX that suits them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorrt_stand_in
import torch
from tensorrt_stand_in import Network, NetworkTensor
from torch import Tensor
from torch._subclasses import FakeTensorMode

from haste_compile.errors import InputError
from haste_compile.kernels.cross_compile import SHARED_MEMORY_LIMIT

pytest.importorskip("triton")
from haste_compile.artifacts.plugins import chain, kernels, ptx  # noqa: E402
from haste_compile.artifacts.plugins.definitions import PLUGINS  # noqa: E402

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
}
TARGETS = {"sm_90a": ((9, 0), 128), "sm_120a": ((12, 0), 64)}
B, H, N, D, SLOTS = 2, 3, 1000, 128, 4
CHAIN = [plugin.name for plugin in PLUGINS]


def arguments(trt: Any, block: int, *, tokens: int = N) -> dict[str, NetworkTensor]:
    """One site's tensors in a network."""
    blocks = -(-tokens // block)
    kinds = trt.DataType
    qkv = dict.fromkeys("qkv", NetworkTensor((B, H, tokens, D), kinds.BF16))
    return {
        **qkv,
        "top_p": NetworkTensor((H,), kinds.FLOAT),
        "delta": NetworkTensor((H,), kinds.FLOAT),
        "ctl": NetworkTensor((8,), kinds.INT32),
        "mask": NetworkTensor((SLOTS, B, H, blocks, -(-blocks // 32)), kinds.INT32),
        "anchors": NetworkTensor((SLOTS, B, H, 2, D), kinds.FLOAT),
        "counters": NetworkTensor((SLOTS, B, H, 8), kinds.INT64),
    }


def build(trt: Any, capability: tuple[int, int], block: int) -> tuple[Network, list[NetworkTensor]]:
    """A network of both ops, and what they give: mask, anchors, counters, out, lse."""
    from haste_compile.artifacts.plugins.registration import add_op, register_plugins

    register_plugins(capability)
    network = Network(trt)
    x = arguments(trt, block)
    refreshed = [x[name] for name in x if name != "v"]
    new = add_op(network, chain.refresh_mask, refreshed, {"block": block, "stride": 16}, capability)
    attended = [x["q"], x["k"], x["v"], new[0], x["ctl"]]
    options = {"block": block, "scale": 0.1}
    out = add_op(network, chain.block_sparse_attention, attended, options, capability)
    return network, [*new, *out]


@pytest.fixture(scope="module", params=TARGETS)
def built(request: pytest.FixtureRequest) -> Iterator[tuple[str, Network, list[NetworkTensor]]]:
    capability, block = TARGETS[request.param]
    with tensorrt_stand_in.tensorrt() as trt:
        yield request.param, *build(trt, capability, block)


def test_both_ops_become_nine_plugins(built) -> None:
    _, network, _ = built
    assert [layer.name for layer in network.layers] == CHAIN


def test_descriptors_give_the_shapes_and_dtypes_of_the_ops_fakes(built) -> None:
    target, network, got = built
    _, block = TARGETS[target]
    x = arguments(network.trt, block)
    with FakeTensorMode():

        def fake(tensor: NetworkTensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype.name])

        q, k, v, *state = (fake(tensor) for tensor in x.values())
        options = {"block": block, "stride": 16}
        new = torch.ops.haste.refresh_mask(q, k, *state, **options)
        out = torch.ops.haste.block_sparse_attention(q, k, v, new[0], state[2], block=block, scale=0.1)
    expected = [(tuple(y.shape), y.dtype) for y in (*new, *out)]
    assert [(y.shape, DTYPES[y.dtype.name]) for y in got] == expected


def test_ptx_takes_inputs_then_scalars_then_outputs_and_nothing_else(built) -> None:
    _, network, _ = built
    for layer, plugin in zip(network.layers, PLUGINS, strict=True):
        header = layer.ptx.split(f".entry {layer.entry}(")[1].split(")")[0]
        pointers, scalars = [".u64"] * len(layer.inputs), [".u32"] * len(layer.scalars)
        assert re.findall(r"\.param (\.\w+)", header) == pointers + scalars + [".u64"] * layer.num_outputs
        # The kernel's own argument names stand in the documented order, too.
        names = list(getattr(kernels, plugin.name).arg_names)
        runtime = [name for name in names if not name.isupper()]
        assert len(runtime) == len(pointers) + len(scalars) + layer.num_outputs
        assert runtime[: len(pointers)] == list(plugin.inputs)
        assert runtime[-layer.num_outputs :] == list(plugin.outputs)


def test_scalars_are_passed_in_the_kernels_order(built) -> None:
    target, network, _ = built
    _, block = TARGETS[target]
    x = arguments(network.trt, block)
    blocks = -(-N // block)
    known = {"tokens": N, "heads": H, "slots": SLOTS, "rows": blocks, "key_blocks": blocks}
    known |= {"words": x["mask"].shape[4], "chunks": 2, "interval": 0, "max_age": 0, "fewest": 2, "most": 2}
    known["groups"] = -(-N // 16)
    for layer, plugin in zip(network.layers, PLUGINS, strict=True):
        names = [n for n in getattr(kernels, plugin.name).arg_names if n in known]
        assert layer.scalars == [known[name] for name in names], layer.name


def test_the_table_in_the_docs_lists_every_plugin_in_order(built) -> None:
    _, network, _ = built
    page = (Path(__file__).parents[2] / "docs/onnx_and_tensorrt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \| (.+) \|$", page, re.M)
    found = [(name, *(re.findall(r"`(\w+)`", cell) for cell in cells)) for name, *cells in rows]
    scalars = {
        plugin.name: [name for name in getattr(kernels, plugin.name).arg_names if not name.isupper()]
        for plugin in PLUGINS
    }
    assert found == [
        (
            plugin.name,
            list(plugin.inputs),
            scalars[plugin.name][len(plugin.inputs) : -len(plugin.outputs)],
            list(plugin.outputs),
            list(plugin.attributes),
        )
        for plugin in PLUGINS
    ]


def test_launches_fit_the_gpu(built) -> None:
    target, network, _ = built
    for layer in network.layers:
        threads, *rest = layer.block
        assert rest == [1, 1] and f".reqntid {threads}" in layer.ptx
        assert layer.shared <= SHARED_MEMORY_LIMIT[target]
        assert all(size >= 1 for size in layer.grid)
        assert f".target {target}" in layer.ptx


def test_ptxas_accepts_what_is_left_of_the_ptx(built, tmp_path: Path) -> None:
    import triton

    target, network, _ = built
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    blackwell = ptxas.with_name("ptxas-blackwell")
    assembler = blackwell if target == "sm_120a" and blackwell.is_file() else ptxas
    if not shutil.which(str(assembler)):
        pytest.skip("triton without ptxas")
    for layer in network.layers:
        source = tmp_path / f"{layer.name}.ptx"
        source.write_text(layer.ptx)
        done = subprocess.run(
            [str(assembler), f"--gpu-name={target}", str(source), "-o", str(tmp_path / "kernel.cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{layer.name}: {done.stderr}"


def test_a_kernel_that_reads_a_hidden_argument_is_an_error() -> None:
    from haste_compile.errors import DependencyError
    from haste_compile.kernels.cross_compile import CrossCompiled

    plugin = PLUGINS[0]
    names = [f"token_sums_param_{i}" for i in range(5)]
    header = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    source = f".visible .entry token_sums(\n{header}\n)\n{{\n\tld.param.b64 %rd1, [{names[4]}];\n}}"
    compiled = CrossCompiled(source, "", b"", 0, 32, 0, "", "", {}, "3.7.1")
    spec = ptx.TensorSpec((1, 1, 64, 64), "bf16")
    launch = plugin.launch(q=spec, k=spec, capability=(9, 0))
    with pytest.raises(DependencyError, match="one more than its 4 arguments"):
        ptx.from_triton(plugin, launch, compiled)


def test_a_dynamic_shape_is_refused(built) -> None:
    from haste_compile.artifacts.plugins.registration import add_op

    _, network, _ = built
    x = arguments(network.trt, 64)
    mask = NetworkTensor((-1, *x["mask"].shape[1:]), x["mask"].dtype)
    with pytest.raises(InputError, match="dynamic shape"):
        add_op(network, chain.block_sparse_attention, [*(x[n] for n in "qkv"), mask, x["ctl"]], {}, (9, 0))
