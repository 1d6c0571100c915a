"""TensorRT: an engine with state as inputs and outputs, in one of two ways.

Where torch-tensorrt can be imported, it compiles the "named" form, and the two ops become chains of plugins
that launch our Triton kernels (``plugins``): masked work is skipped. Elsewhere TensorRT-RTX parses the ONNX
artifact and builds an engine from its operators, which needs no GPU: every head is scored at every call and
attention is dense under its mask. Both run on NVIDIA GPUs only. TensorRT has no float64, so in the ONNX way
top-p sums in float32, as our kernels do.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_compile.artifacts.base import Call, StateInTurns, Written
from haste_compile.artifacts.capture import Captured
from haste_compile.artifacts.manifest import Manifest, TensorLayout
from haste_compile.artifacts.onnx import output_names, to_onnx
from haste_compile.errors import ArtifactError, ArtifactVersionError, DeviceError, OutputPathError
from haste_compile.loading import import_optional

#: TensorRT's name of a dtype -> torch's.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}

#: The package that opens an engine -> the extra that installs it.
_EXTRAS = {"tensorrt_rtx": "tensorrt", "torch_tensorrt": "torch-tensorrt"}


def write(captured: Captured, path: Path) -> Written:
    """Build an engine: with torch-tensorrt where that is installed, else with TensorRT-RTX."""
    try:
        if importlib.util.find_spec("torch_tensorrt") is not None:
            return _write_torch_tensorrt(captured, path)
        return _write_rtx(captured, path)
    except OSError as error:
        raise OutputPathError(
            found=error.strerror or str(error),
            wanted="a folder that can be written",
            where=str(path),
            fix="Choose another path.",
        ) from error


def open_(manifest: Manifest, path: Path, device: torch.device) -> Call:
    """Open the engine on a GPU with the runtime that it was built for."""
    name = manifest.extra["runtime"]
    open_engine = _open_torch_tensorrt if name == "torch_tensorrt" else _open_rtx
    runtime = import_optional(name, extra=_EXTRAS[name])
    manifest.require(name, runtime.__version__)
    if device.type != "cuda":
        raise DeviceError(
            found=f"device {device}",
            wanted="an NVIDIA GPU",
            where="a tensorrt artifact",
            fix="Load it with device='cuda' on a machine that has one.",
        )
    return open_engine(runtime, manifest, path)


def _write_rtx(captured: Captured, path: Path) -> Written:
    rtx = import_optional("tensorrt_rtx", extra=_EXTRAS["tensorrt_rtx"])
    import_optional("onnx", extra="onnx")
    import_optional("onnxscript", extra="onnx")
    log = _log(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        to_onnx(captured, sums=torch.float32).save(str(source), external_data=True)
        if not parser.parse_from_file(str(source)):
            reasons = [parser.get_error(i) for i in range(parser.num_errors)]
            raise _refused("; ".join(f"{x.node_operator()}: {x.desc()}" for x in reasons), "parse")
        check_network(captured, network)
        engine = builder.build_serialized_network(network, builder.create_builder_config())
    if engine is None:
        raise _refused("; ".join(log.errors), "build")
    with path.open("wb") as file:
        file.write(engine)
    extra = {"runtime": "tensorrt_rtx", "outputs": output_names(captured)}
    return Written((path,), {"tensorrt_rtx": rtx.__version__}, extra)


def _open_rtx(rtx: Any, manifest: Manifest, path: Path) -> Call:
    log = _log(rtx)
    engine = rtx.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context() if engine is not None else None
    if context is None:
        raise ArtifactVersionError(
            found="; ".join(log.errors) or "an engine that does not open",
            wanted=f"an engine that tensorrt_rtx {rtx.__version__} runs on this GPU",
            where=str(path),
            fix="Update the driver, or export again.",
        )
    names = [layout.name for layout in (*manifest.inputs, *manifest.state)] + list(manifest.extra["outputs"])
    sample_layout = manifest.outputs[0]
    turns = StateInTurns()

    def call(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        new = turns.outputs_for(state)
        sample = torch.empty(sample_layout.shape, dtype=sample_layout.torch_dtype, device=inputs[0].device)
        for name, x in zip(names, (*inputs, *state, sample, *new), strict=True):
            context.set_tensor_address(name, x.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream(sample.device).cuda_stream)
        return sample, new

    return call


def _write_torch_tensorrt(captured: Captured, path: Path) -> Written:
    from haste_compile.artifacts.plugins.registration import register_converters

    if captured.device.type != "cuda":
        raise DeviceError(
            found=f"a transformer on {captured.device}",
            wanted="one on an NVIDIA GPU: torch-tensorrt builds engines for the GPU that it runs on",
            where="format tensorrt",
            fix="Move the pipeline to CUDA in bfloat16 or float16, or uninstall torch-tensorrt to use "
            "TensorRT-RTX.",
        )
    torch_tensorrt = import_optional("torch_tensorrt", extra=_EXTRAS["torch_tensorrt"])
    register_converters()
    # One engine for the whole graph: state that left it between two parts would be copied at every call.
    compiled = torch_tensorrt.dynamo.compile(
        captured.program("named"),
        arg_inputs=captured.examples,
        min_block_size=1,
        require_full_compilation=True,
        truncate_double=True,
    )
    torch_tensorrt.save(compiled, str(path), arg_inputs=captured.examples, retrace=False)
    extra = {"runtime": "torch_tensorrt", "outputs": output_names(captured)}
    return Written((path,), {"torch_tensorrt": torch_tensorrt.__version__}, extra)


def _open_torch_tensorrt(torch_tensorrt: Any, manifest: Manifest, path: Path) -> Call:
    module = torch_tensorrt.load(str(path)).module()

    def call(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        sample, *new = module(*inputs, *state)
        return sample, new

    return call


def check_network(captured: Captured, network: Any) -> None:
    """Hold what the parser made of the model's inputs and outputs against what was captured.

    Raises:
        ArtifactError: another name, shape or dtype.
    """
    wanted = [
        *captured.inputs,
        *captured.state,
        *(
            TensorLayout(name, layout.shape, layout.dtype)
            for name, layout in zip(output_names(captured), (*captured.outputs, *captured.state), strict=True)
        ),
    ]
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    found = [TensorLayout(x.name, tuple(x.shape), _DTYPES.get(x.dtype.name, x.dtype.name)) for x in tensors]
    wrong = [f"{a} instead of {b}" for a, b in zip(found, wanted, strict=False) if a != b]
    if wrong or len(found) != len(wanted):
        raise _refused("; ".join(wrong) or f"{len(found)} inputs and outputs of {len(wanted)}", "parse")


def _log(rtx: Any) -> Any:
    """A logger that keeps errors for a message of ours; TensorRT's own prints."""

    class Log(rtx.ILogger):
        def __init__(self) -> None:
            rtx.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (rtx.ILogger.ERROR, rtx.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _refused(found: str, step: str) -> ArtifactError:
    return ArtifactError(
        found=found,
        wanted=f"a model that TensorRT-RTX can {step}",
        where="format tensorrt",
        fix="Use a TensorRT-RTX of another version, or torch-tensorrt, or format='onnx'.",
    )
