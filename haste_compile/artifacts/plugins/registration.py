"""The plugins made known to TensorRT, and the converters that have torch-tensorrt use them.

TensorRT calls a plugin twice: its descriptor when the network is made, with symbolic dimensions, and its
ahead-of-time implementation when the engine is built, which returns PTX and how to launch it. TensorRT then
passes the kernel its inputs, the scalars and its outputs, in this order (``tensorrt.plugin.aot_impl``).
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import haste_compile.kernels.functional  # noqa: F401  (defines haste::refresh_mask)
from haste_compile.artifacts.plugins import chain
from haste_compile.artifacts.plugins.definitions import PLUGINS, Capability, Plugin, TensorSpec
from haste_compile.artifacts.plugins.ptx import Job, compile_plugins, jobs_of
from haste_compile.errors import DependencyError, InputError

NAMESPACE = "haste"

#: TensorRT's name of a dtype -> Triton's.
_DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT32": "i32", "INT64": "i64"}

#: Numbers travel as arrays of one element, as in torch-tensorrt's own plugins: TensorRT's way with plain
#: numbers ends in a conversion that NumPy 2 refuses.
_ARRAYS: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_}


def register_plugins(capability: Capability | None = None) -> None:
    """Register every plugin with ``tensorrt.plugin``, once.

    Args:
        capability: (major, minor) that kernels are compiled for; None: the current GPU's.

    Raises:
        DependencyError: TensorRT (10.9 or later) is missing.
    """
    trt, trtp = _import_tensorrt()
    known = getattr(trtp.op, NAMESPACE, None)
    for plugin in PLUGINS:
        if not hasattr(known, plugin.name):
            name = f"{NAMESPACE}::{plugin.name}"
            trtp.register(name)(_descriptor(plugin, trt, trtp))
            trtp.aot_impl(name)(_implementation(plugin, trtp, capability))


def add_op(
    network: Any,
    op: Callable[..., tuple[Any, ...]],
    tensors: Sequence[Any],
    options: Mapping[str, Any],
    capability: Capability | None = None,
) -> tuple[Any, ...]:
    """Add one of the ops of ``plugins.chain`` to a TensorRT network, a layer for each plugin.

    Args:
        network: a TensorRT network with strong types.
        op: ``chain.refresh_mask`` or ``chain.block_sparse_attention``.
        tensors: the network's tensors that it reads.
        options: its options.
        capability: as for ``register_plugins``, which comes first.

    Returns:
        The network's tensors that it gives.

    Raises:
        InputError: a tensor has a dynamic shape.
        DependencyError: a kernel cannot be compiled.
    """
    _, trtp = _import_tensorrt()
    specs = [TensorSpec(_static(x.shape), _DTYPES[x.dtype.name]) for x in tensors]
    # All at once, before TensorRT asks for one after the other: a compiler takes two seconds to start.
    compile_plugins(jobs_of(op, specs, options, capability or torch.cuda.get_device_capability()))

    def call(name: str, inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
        definition = getattr(getattr(trtp.op, NAMESPACE), name)
        values = {key: _wrapped(value) for key, value in attributes.items()}
        layer = network.add_plugin(definition(*inputs, **values), aot=True)
        return tuple(layer.get_output(i) for i in range(layer.num_outputs))

    return op(call, *tensors, **options)


def register_converters() -> None:
    """Have torch-tensorrt turn the two ops into chains of plugins.

    Raises:
        DependencyError: torch-tensorrt or TensorRT is missing.
    """
    register_plugins()
    conversion = _import("torch_tensorrt.dynamo.conversion")
    utilities = _import("torch_tensorrt.dynamo.conversion.converter_utils")

    def converter(op: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def convert(
            context: Any, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
        ) -> Any:
            tensors = [utilities.get_trt_tensor(context, x, f"{name}_{i}") for i, x in enumerate(args)]
            return add_op(context.net, op, tensors, kwargs)

        return convert

    register = conversion.dynamo_tensorrt_converter
    register(torch.ops.haste.refresh_mask.default)(converter(chain.refresh_mask))
    register(torch.ops.haste.block_sparse_attention.default)(converter(chain.block_sparse_attention))


def _descriptor(plugin: Plugin, trt: Any, trtp: Any) -> Callable[..., Any]:
    spelled = {getattr(trt.DataType, name): spelling for name, spelling in _DTYPES.items()}
    dtypes = {spelling: dtype for dtype, spelling in spelled.items()}

    def describe(*descriptors: Any, **attributes: Any) -> tuple[Any, ...]:
        tensors = {
            name: TensorSpec(tuple(x.shape_expr), spelled[x.dtype])
            for name, x in zip(plugin.inputs, descriptors, strict=True)
        }
        values = {key: _plain(value) for key, value in attributes.items()}
        outputs = plugin.describe(**tensors, **values)
        return tuple(trtp.from_shape_expr(output.shape, dtypes[output.dtype]) for output in outputs)

    returns = _tuple_of(trtp.TensorDesc, len(plugin.outputs))
    describe.__signature__ = _signature(plugin, trtp, returns=returns)  # type: ignore[attr-defined]
    return describe


def _implementation(plugin: Plugin, trtp: Any, capability: Capability | None) -> Callable[..., Any]:
    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        descriptors = arguments[: len(plugin.inputs)]
        values = arguments[len(plugin.inputs) : -2]  # outputs and tactic come last
        tensors = {
            name: TensorSpec(_static(x.shape), _DTYPES[x.dtype.name])
            for name, x in zip(plugin.inputs, descriptors, strict=True)
        }
        attributes = dict(zip(plugin.attributes, map(_plain, values), strict=True))
        target = capability or torch.cuda.get_device_capability()
        (compiled,) = compile_plugins([Job(plugin, tensors, attributes, target)])
        parameters = trtp.KernelLaunchParams()
        for axis, size in zip("xyz", compiled.launch.grid, strict=False):
            setattr(parameters, f"grid_{axis}", size)
        parameters.block_x = compiled.threads
        parameters.shared_mem = compiled.shared
        scalars = trtp.SymIntExprs(len(compiled.launch.scalars))
        for i, value in enumerate(compiled.launch.scalars.values()):
            scalars[i] = trtp.SymInt32(value)
        return compiled.entry, compiled.ptx, parameters, scalars

    returns = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]
    extra = {
        "outputs": _tuple_of(trtp.TensorDesc, len(plugin.outputs)),
        "tactic": int,
    }
    implement.__signature__ = _signature(plugin, trtp, returns=returns, extra=extra)  # type: ignore[attr-defined]
    return implement


def _signature(
    plugin: Plugin, trtp: Any, *, returns: Any, extra: Mapping[str, Any] | None = None
) -> inspect.Signature:
    """What TensorRT reads off a plugin's function: tensors, then attributes, each with its type."""
    kinds: dict[str, Any] = dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    for name, kind in plugin.attributes.items():
        kinds[name] = _Alias(np.ndarray, (Any, np.dtype[_ARRAYS[kind]])) if kind in _ARRAYS else kind
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, positional, annotation=kind)
        for name, kind in (kinds | dict(extra or {})).items()
    ]
    return inspect.Signature(parameters, return_annotation=returns)


class _Alias(types.GenericAlias):
    """A generic alias that TensorRT can ask ``issubclass`` about; Python 3.13's own has no bases."""

    __bases__ = (object,)


def _tuple_of(kind: Any, count: int) -> Any:
    return types.GenericAlias(tuple, (kind,) * count)


def _static(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape)
    if any(size < 0 for size in sizes):
        raise InputError(
            found=f"dynamic shape {sizes}",
            wanted="one size for each artifact",
            where=f"TensorRT plugins of the namespace {NAMESPACE}",
            fix="Build an engine for each video size.",
        )
    return sizes


def _wrapped(value: Any) -> Any:
    kind = _ARRAYS.get(type(value))
    return value if kind is None else np.array([value], dtype=kind)


def _plain(value: Any) -> Any:
    return value.reshape(()).item() if isinstance(value, np.ndarray) else value


def _import_tensorrt() -> tuple[Any, Any]:
    return _import("tensorrt"), _import("tensorrt.plugin")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DependencyError(
            found=f"no module {name}",
            wanted="torch-tensorrt with TensorRT 10.9 or later",
            where="this environment",
            fix="pip install 'haste-compile[torch-tensorrt]', on a machine with an NVIDIA GPU.",
        ) from error
