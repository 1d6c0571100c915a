"""TensorRT's own Python code for plugins, without TensorRT.

``tensorrt.plugin`` is Python that ships in the wheel of the bindings. What it imports from the library, which
cannot be installed without an NVIDIA GPU, comes from TensorRT-RTX where that has it, and from here elsewhere:
dimensions with values, a registry, tensors and a network that asks a plugin what the builder would ask. So
our plugins meet the real code that reads their signatures, calls their descriptors and collects launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Dimension:
    """A dimension expression whose value is known."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class ExpressionBuilder:
    """Computes at once what the library's builder would write down."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, operation: Any, first: Dimension, second: Dimension) -> Dimension:
        compute: Callable[[int, int], int] = {
            "SUM": lambda a, b: a + b,
            "SUB": lambda a, b: a - b,
            "PROD": lambda a, b: a * b,
            "FLOOR_DIV": lambda a, b: a // b,
        }[operation.name]
        return Dimension(compute(first.value, second.value))


@dataclasses.dataclass
class NetworkTensor:
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass
class Layer:
    """A plugin in a network: what its kernel is and how it would be launched."""

    name: str
    inputs: list[NetworkTensor]
    outputs: list[NetworkTensor]
    entry: str
    ptx: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    scalars: list[int]

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> NetworkTensor:
        return self.outputs[index]


class Network:
    """Asks every plugin what TensorRT's builder asks: dtypes, shapes, formats, launch and kernel."""

    def __init__(self, trt: Any) -> None:
        self.trt, self.layers = trt, []  # type: ignore[var-annotated]

    def add_plugin(self, create: Callable[..., Any], *, aot: bool) -> Layer:
        assert aot
        inputs, _, plugin = create("STRICT_AOT")
        builder = ExpressionBuilder()
        dtypes = plugin.get_output_data_types([x.dtype for x in inputs], [len(x.shape) for x in inputs])
        sizes = [[Dimension(n) for n in x.shape] for x in inputs]
        shapes = plugin.get_output_shapes(sizes, [], builder)
        outputs = [
            NetworkTensor(tuple(n.value for n in shape), dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        in_out = [self._dynamic(x) for x in (*inputs, *outputs)]
        plugin.get_supported_format_combinations(in_out, len(inputs))
        plugin.set_tactic(0)
        parameters, scalars = types.SimpleNamespace(), _Scalars()
        plugin.get_launch_params(sizes, in_out, len(inputs), parameters, scalars, builder)
        descriptions = [x.desc for x in in_out]
        entry, ptx = plugin.get_kernel(descriptions[: len(inputs)], descriptions[len(inputs) :])
        layer = Layer(
            plugin.plugin_name,
            inputs,
            outputs,
            entry,
            ptx.decode(),
            tuple(getattr(parameters, f"grid_{axis}").expr.value for axis in "xyz"),
            tuple(getattr(parameters, f"block_{axis}").expr.value for axis in "xyz"),
            parameters.shared_mem.expr.value,
            [scalar.expr.value for scalar in scalars.values],
        )
        self.layers.append(layer)
        return layer

    def _dynamic(self, x: NetworkTensor) -> Any:
        described = self.trt.DynamicPluginTensorDesc()
        described.desc.dims = self.trt.Dims(x.shape)
        described.desc.type = x.dtype
        described.desc.format = self.trt.TensorFormat.LINEAR
        return described


class _Scalars:
    nbSymExprs = 0

    def __init__(self) -> None:
        self.values: list[Any] = []

    def __setitem__(self, index: int, value: Any) -> None:
        assert index == len(self.values) < self.nbSymExprs
        self.values.append(value)


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.name, "1", namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


@contextlib.contextmanager
def tensorrt() -> Iterator[Any]:
    """The module ``tensorrt`` in ``sys.modules``, with ``tensorrt.plugin``; gone again afterwards.

    Skips the test where the wheels are missing.
    """
    rtx = pytest.importorskip("tensorrt_rtx")
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the Python code in tensorrt-cu13-bindings")
    module: Any = types.ModuleType("tensorrt")
    vars(module).update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    module.__path__ = []
    registry = _Registry()
    module.get_plugin_registry = lambda: registry
    module.ITensor, module.IDimensionExpr = NetworkTensor, Dimension
    module.DimsExprs = lambda count: [None] * count
    module.IPluginV3QuickAOTBuild, module.ISymExpr = type("AOTBuild", (), {}), type("SymExpr", (), {})
    module.QuickPluginCreationRequest = types.SimpleNamespace(
        STRICT_AOT="STRICT_AOT", STRICT_JIT="STRICT_JIT", PREFER_AOT="PREFER_AOT", PREFER_JIT="PREFER_JIT"
    )
    package: Any = types.ModuleType("tensorrt_bindings")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]))]
    before = {name for name in sys.modules if name.startswith("tensorrt")}
    sys.modules.update({"tensorrt": module, "tensorrt_bindings": package})
    try:
        module.plugin = sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
        yield module
    finally:
        for name in {name for name in sys.modules if name.startswith("tensorrt")} - before:
            del sys.modules[name]
