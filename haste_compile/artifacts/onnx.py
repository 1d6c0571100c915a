"""ONNX, opset 20: state as inputs and outputs, the two ops as functions of the model.

    haste.compile::refresh_mask(q, k, top_p, delta, ctl, mask, anchors, counters) -> mask, anchors, counters
    haste.compile::block_sparse_attention(q, k, v, mask, ctl) -> out

Each is a function that the model brings along, its body ONNX's own operators, so that any runtime can run
it. A runtime that has a kernel of that name and domain takes the kernel and skips masked work. The nodes
carry the op's options as attributes for it; the bodies have them, and the shapes, worked in.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.artifacts.base import Call, StateInTurns, Written
from haste_compile.artifacts.capture import Captured
from haste_compile.artifacts.manifest import Manifest
from haste_compile.errors import ArtifactError, ArtifactVersionError, DependencyError, OutputPathError
from haste_compile.kernels import functional
from haste_compile.loading import import_optional

DOMAIN = "haste.compile"
OPSET = 20

_REFRESH = torch.ops.haste.refresh_mask.default
_ATTENTION = torch.ops.haste.block_sparse_attention.default


def write(captured: Captured, path: Path) -> Written:
    """Export the "named" form with torch.onnx; weights go into a file of their own, ``<name>.data``."""
    onnx = import_optional("onnx", extra="onnx")
    import_optional("onnxscript", extra="onnx")
    model = to_onnx(captured)
    weights = path.with_name(path.name + ".data")
    try:
        model.save(str(path), external_data=True)
    except OSError as error:
        raise OutputPathError(
            found=error.strerror or str(error),
            wanted="a folder that can be written",
            where=str(path),
            fix="Choose another path.",
        ) from error
    return Written(
        (path, weights), {"onnx": onnx.__version__}, {"opset": OPSET, "outputs": output_names(captured)}
    )


def open_(manifest: Manifest, path: Path, device: torch.device) -> Call:
    """Open it with ONNX Runtime, which reads and writes torch's memory."""
    runtime = import_optional("onnxruntime", extra="onnx")
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise DependencyError(
            found=f"onnxruntime {runtime.__version__} with {', '.join(runtime.get_available_providers())}",
            wanted=provider,
            where=f"an ONNX artifact on {device}",
            fix="pip install onnxruntime-gpu, or load it with device='cpu'.",
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its errors have no other base class
        raise ArtifactVersionError(
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            wanted=f"a model of opset {manifest.extra['opset']} that this onnxruntime runs",
            where=f"onnxruntime {runtime.__version__}, {path}",
            fix="Update onnxruntime.",
        ) from error
    outputs = manifest.extra["outputs"]
    names = [layout.name for layout in (*manifest.inputs, *manifest.state)]
    turns = StateInTurns()

    def call(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        new = turns.outputs_for(state)
        sample = torch.empty(manifest.outputs[0].shape, dtype=manifest.outputs[0].torch_dtype, device=device)
        binding = session.io_binding()
        for name, x in zip(names, (*inputs, *state), strict=True):
            binding.bind_input(name, *_memory(onnx_type, x))
        for name, x in zip(outputs, (sample, *new), strict=True):
            binding.bind_output(name, *_memory(onnx_type, x))
        binding.synchronize_inputs()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return sample, new

    onnx_type = _element_types()
    return call


def output_names(captured: Captured) -> list[str]:
    return [captured.outputs[0].name, *(f"new_{layout.name}" for layout in captured.state)]


def to_onnx(captured: Captured, *, sums: torch.dtype = torch.float64) -> Any:
    """The model as ``torch.onnx.ONNXProgram``, with the functions in it.

    Args:
        sums: what top-p adds up in, see ``kernels.top_p_select.reference``.

    Raises:
        ArtifactError: torch.onnx cannot translate it, or two sites differ in what their function would be.
    """
    graph = _torch.copy_graph(captured.module("named"))
    calls = name_operators(graph)
    inputs = [layout.name for layout in (*captured.inputs, *captured.state)]
    program = _export(graph, captured.examples, inputs, output_names(captured))
    for target, (arguments, options) in calls.items():
        function = _function(target, arguments, options, sums)
        program.model.functions[function.identifier()] = function
    program.model.opset_imports[DOMAIN] = 1
    return program


def name_operators(gm: fx.GraphModule) -> dict[Any, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Have every op stand in the graph as a node of our domain.

    Returns:
        op -> fakes of its arguments, and its options; they are the same at every site.
    """
    calls: dict[Any, tuple[tuple[Tensor, ...], dict[str, Any]]] = {}
    for node in list(gm.graph.nodes):
        if node.target not in (_REFRESH, _ATTENTION):
            continue
        fakes = tuple(_torch.fake_value(x) for x in node.args)
        options = {a.name: a.default_value for a in node.target._schema.arguments if a.kwarg_only}
        options |= node.kwargs
        known_fakes, known_options = calls.setdefault(node.target, (fakes, options))
        if options != known_options or list(map(_layout, fakes)) != list(map(_layout, known_fakes)):
            raise ArtifactError(
                found=f"sites of several shapes, {_layout(known_fakes[0])} and {_layout(fakes[0])}",
                wanted="one shape for all self-attention sites",
                where="format onnx",
                fix="Keep the sites of the other shape dense, with dense_layers.",
            )
        results = _results(node.target, fakes)
        attributes = {
            "attrs": options,
            "dtypes": tuple(x.dtype for x in results),
            "shapes": tuple(tuple(x.shape) for x in results),
            "version": 1,
        }
        with gm.graph.inserting_before(node):
            named = gm.graph.call_function(
                torch.onnx.ops.symbolic_multi_out, (f"{DOMAIN}::{_name(node.target)}", node.args), attributes
            )
        node.replace_all_uses_with(named)
        gm.graph.erase_node(node)
        for item in named.users:
            _torch.set_fake_value(item, results[item.args[1]], "export")
    gm.recompile()
    return calls


def _results(target: Any, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors like those that the operator gives: the new state, or attention's output alone."""
    return arguments[5:8] if target is _REFRESH else arguments[:1]


class _Refresh(nn.Module):
    def __init__(self, options: Mapping[str, Any], sums: torch.dtype) -> None:
        super().__init__()
        self._options = {**options, "sums": sums}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return functional.refresh_mask(*tensors, **self._options)


class _Attention(nn.Module):
    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._options = options

    def forward(self, *tensors: Tensor) -> Tensor:
        return functional.block_sparse_attention(*tensors, **self._options)


def _function(target: Any, arguments: Sequence[Tensor], options: Mapping[str, Any], sums: torch.dtype) -> Any:
    """The op's pure form as a function of the model: no initialisers, the options declared as attributes."""
    ir = import_optional("onnx_ir", extra="onnx")
    body = _Refresh(options, sums) if target is _REFRESH else _Attention(options)
    examples = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in arguments)
    inputs = [a.name for a in target._schema.arguments if not a.kwarg_only]
    outputs = [f"out_{i}" for i in range(len(_results(target, arguments)))]
    graph = _export(body, examples, inputs, outputs).model.graph
    for value in list(graph.initializers.values()):
        constant = ir.node("Constant", [], attributes={"value": value.const_value}, num_outputs=1)
        constant.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.insert_before(graph[0], constant)
    graph.initializers.clear()
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    declared = [
        ir.Attr(key, kinds[int if isinstance(value, bool) else type(value)], None)
        for key, value in options.items()
    ]
    return ir.Function(DOMAIN, _name(target), graph=graph, attributes=declared)


def _export(module: nn.Module, examples: tuple[Tensor, ...], inputs: list[str], outputs: list[str]) -> Any:
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module.eval(), examples)
            return torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ArtifactError(
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            wanted=f"a transformer of operators that torch.onnx translates to opset {OPSET}",
            where="format onnx",
            fix="Export it as diffusers made it; another torch version may know the operator.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that it does not find and of constants that it does not fold."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name(target: Any) -> str:
    return target._schema.name.split("::")[1]


def _layout(x: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(x.shape), x.dtype


def _element_types() -> dict[torch.dtype, int]:
    kinds = import_optional("onnx", extra="onnx").TensorProto
    return {
        torch.float32: kinds.FLOAT,
        torch.float16: kinds.FLOAT16,
        torch.bfloat16: kinds.BFLOAT16,
        torch.int32: kinds.INT32,
        torch.int64: kinds.INT64,
    }


def _memory(kinds: Mapping[torch.dtype, int], x: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """What ONNX Runtime asks of a tensor that it shares: device, its number, type, shape, address."""
    return x.device.type, x.device.index or 0, kinds[x.dtype], tuple(x.shape), x.data_ptr()
