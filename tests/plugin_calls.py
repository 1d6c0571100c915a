"""Runs plugins as TensorRT would launch their kernels: inputs, scalars, outputs, on contiguous tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from haste_compile.artifacts.plugins import kernels
from haste_compile.artifacts.plugins.definitions import BY_NAME, Launch, TensorSpec

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i64": torch.int64,
}
SPELLINGS = {dtype: name for name, dtype in DTYPES.items()}


def spec(x: Tensor) -> TensorSpec:
    return TensorSpec(tuple(x.shape), SPELLINGS[x.dtype])


def call(name: str, inputs: tuple[Tensor, ...], attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """One plugin, interpreted or on the GPU; outputs start full of NaN or of the largest integer."""
    plugin = BY_NAME[name]
    assert list(attributes) == list(plugin.attributes)
    inputs = tuple(x.contiguous() for x in inputs)
    specs = dict(zip(plugin.inputs, map(spec, inputs), strict=True))
    launch: Launch = plugin.launch(**specs, **attributes, capability=(9, 0))
    outputs = tuple(_spoiled(x, inputs[0].device) for x in plugin.describe(**specs, **attributes))
    kernel = getattr(kernels, name)
    grid = (*launch.grid, 1, 1)[:3]
    kernel[grid](*inputs, *launch.scalars.values(), *outputs, **launch.constexprs, num_warps=launch.num_warps)
    return outputs


def _spoiled(output: TensorSpec, device: torch.device) -> Tensor:
    dtype = DTYPES[output.dtype]
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(output.shape, value, dtype=dtype, device=device)
