"""The TensorRT format: an engine by TensorRT-RTX, built here; torch-tensorrt by stand-ins."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import operator
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorrt_stand_in
import tiny_wan
import torch
from artifact_case import OPTIONS, SIZE, TEXT_TOKENS
from predictor import gpu
from tensorrt_stand_in import Network, NetworkTensor

from haste_compile import artifacts, cli
from haste_compile.artifacts import Manifest, Size, tensorrt
from haste_compile.artifacts.capture import Captured, capture
from haste_compile.config import HasteConfig
from haste_compile.errors import ArtifactError, ArtifactVersionError, DependencyError, DeviceError

PAGE = (Path(__file__).parents[2] / "docs/onnx_and_tensorrt.md").read_text(encoding="utf-8")
#: What the commands of the page need for a random tiny model.
SMALL = ["--height", "128", "--width", "128", "--frames", "17"]
SMALL += [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the page write."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("artifacts")
    tiny_wan.build_pipeline(num_layers=1).save_pretrained(folder / "model")
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in block.splitlines():
            words = ["model" if "Wan-AI/" in word else word for word in shlex.split(line)]
            patch.setattr(sys, "argv", [*words, *SMALL, "--device", "cpu"])
            with pytest.raises(SystemExit) as exit_:
                cli.main()
            assert exit_.value.code in (0, None), line
    return folder


@pytest.fixture(scope="module")
def engine(written: Path) -> tuple[Path, Manifest]:
    return written / "wan.engine", Manifest.read(written / "wan.engine")


def test_the_commands_of_the_page_write_artifacts_that_load(written: Path) -> None:
    runner = artifacts.load(written / "wan.onnx", trust=True)
    inputs = tiny_wan.transformer_inputs()
    inputs["encoder_hidden_states"] = torch.zeros(1, 512, tiny_wan.TEXT_DIM)
    (sample,) = runner(**inputs)
    assert sample.shape == inputs["hidden_states"].shape and sample.isfinite().all()
    assert (written / "wan.onnx.data").is_file()


def captured_tiny(dtype: torch.dtype = torch.float32) -> Captured:
    transformer = tiny_wan.build_transformer(num_layers=1).to(dtype)
    return capture(
        transformer, Size(**SIZE, text_tokens=TEXT_TOKENS), (4, 8), HasteConfig.from_options(OPTIONS)
    )


def test_rtx_builds_an_engine_without_a_gpu(engine) -> None:
    path, manifest = engine
    assert manifest.extra["runtime"] == "tensorrt_rtx"
    assert manifest.versions["tensorrt_rtx"] == sys.modules["tensorrt_rtx"].__version__
    assert manifest.extra["outputs"] == ["sample", *(f"new_{layout.name}" for layout in manifest.state)]
    assert manifest.files[path.name]["bytes"] == path.stat().st_size > 100_000
    for layout in (*manifest.inputs, *manifest.state):  # the engine names what the runner passes
        assert layout.name.encode() in path.read_bytes()


def test_inputs_and_outputs_are_held_against_the_captured_ones() -> None:
    captured = captured_tiny()
    names = tensorrt.output_names(captured)
    outputs = [
        dataclasses.replace(layout, name=name)
        for name, layout in zip(names, (*captured.outputs, *captured.state), strict=True)
    ]
    good = _ParsedNetwork([*captured.inputs, *captured.state], outputs)
    tensorrt.check_network(captured, good)
    mask = captured.state[0]
    widened = dataclasses.replace(mask, shape=(*mask.shape[:-1], 7))
    for inputs in (
        [*captured.inputs, widened, *captured.state[1:]],
        [*captured.inputs, dataclasses.replace(mask, dtype="int64"), *captured.state[1:]],
        [*captured.inputs, *captured.state[:-1]],
    ):
        with pytest.raises(ArtifactError, match="instead of|inputs and outputs"):
            tensorrt.check_network(captured, _ParsedNetwork(inputs, outputs))


class _ParsedNetwork:
    """What a parser leaves: inputs and outputs with names, shapes and TensorRT's dtypes."""

    def __init__(self, inputs: list[Any], outputs: list[Any]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, index: int) -> Any:
        return self._tensor(self._inputs[index])

    def get_output(self, index: int) -> Any:
        return self._tensor(self._outputs[index])

    @staticmethod
    def _tensor(layout: Any) -> Any:
        kind = {"float32": "FLOAT", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64"}[layout.dtype]
        return types.SimpleNamespace(
            name=layout.name, shape=layout.shape, dtype=types.SimpleNamespace(name=kind)
        )


def test_what_the_parser_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("tensorrt_rtx")
    kind, node = onnx.TensorProto.INT32, onnx.helper.make_node("BitwiseAnd", ["x", "x"], ["y"])
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "bits", [tensor("x", kind, [4])], [tensor("y", kind, [4])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    program = types.SimpleNamespace(save=lambda path, **_: onnx.save(model, path))
    monkeypatch.setattr(tensorrt, "to_onnx", lambda captured, **_: program)
    with pytest.raises(ArtifactError, match=r"BitwiseAnd.*wanted a model that TensorRT-RTX can parse"):
        tensorrt.write(captured_tiny(), tmp_path / "x.engine")
    assert not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize(
    ("kind", "dtype", "inputs", "opset", "attributes"),
    [
        ("BitShift", "UINT32", 2, 20, {"direction": "LEFT"}),
        ("BitwiseAnd", "INT32", 2, 20, {}),
        ("BitCast", "INT32", 1, 26, {"to": 1}),
    ],
)
def test_operators_that_the_docs_say_rtx_does_not_take(
    kind: str, dtype: str, inputs: int, opset: int, attributes: dict[str, Any]
) -> None:
    assert not _parse(kind, dtype, inputs=inputs, opset=opset, **attributes).parsed


def test_float64_becomes_float32_as_the_docs_say() -> None:
    result = _parse("Cast", "FLOAT", result="DOUBLE", to=11)
    assert result.parsed and result.network.get_layer(0).get_output(0).dtype.name == "FLOAT"


@dataclasses.dataclass
class _Parsed:
    parsed: bool
    network: Any
    owners: tuple[Any, ...]  # a network lives no longer than its builder


def _parse(
    kind: str, dtype: str, *, inputs: int = 1, opset: int = 20, result: str | None = None, **attributes: Any
) -> _Parsed:
    """Hand a model of one operator to TensorRT-RTX's parser."""
    onnx, rtx = pytest.importorskip("onnx"), pytest.importorskip("tensorrt_rtx")
    x, y = (
        onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, element), [4])
        for name, element in (("x", dtype), ("y", result or dtype))
    )
    node = onnx.helper.make_node(kind, ["x"] * inputs, ["y"], **attributes)
    opsets = [onnx.helper.make_opsetid("", opset)]
    graph = onnx.helper.make_graph([node], "one", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    log = rtx.Logger(rtx.Logger.INTERNAL_ERROR)
    builder = rtx.Builder(log)
    network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = rtx.OnnxParser(network, log)
    return _Parsed(parser.parse(model.SerializeToString()), network, (log, builder, parser))


def test_opening_says_what_is_missing(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = engine
    with pytest.raises(DeviceError, match="NVIDIA GPU"):
        artifacts.load(path, trust=True, device="cpu")
    rtx = sys.modules["tensorrt_rtx"]
    with monkeypatch.context() as changed:
        changed.setattr(rtx, "__version__", "9.9.9")
        with pytest.raises(ArtifactVersionError, match=r"tensorrt_rtx 9\.9"):
            artifacts.load(path, trust=True, device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DependencyError, match=r"haste-compile\[tensorrt\]"):
        artifacts.load(path, trust=True, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a driver")
def test_an_engine_that_does_not_open_is_an_error_with_tensorrts_words(engine) -> None:
    path, manifest = engine
    with pytest.raises(ArtifactVersionError, match="CUDA"):
        tensorrt.open_(manifest, path, torch.device("cuda"))


@gpu
@pytest.mark.gpu
def test_the_engine_equals_the_graph_on_a_gpu(engine) -> None:
    path, manifest = engine
    captured = captured_tiny()
    plain, device = captured.module("plain"), torch.device("cuda")
    call = tensorrt.open_(manifest, path, device)
    state = list(captured.examples[len(captured.inputs) :])
    on_gpu = [x.to(device) for x in state]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        inputs = [
            torch.randn(x.shape, generator=generator) if x.dtype.is_floating_point else x
            for x in captured.examples[: len(captured.inputs)]
        ]
        expected, *state = plain(*inputs, *state)
        got, on_gpu = call([x.to(device) for x in inputs], on_gpu)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_torch_tensorrt_is_taken_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    with tensorrt_stand_in.tensorrt() as trt:
        fake = _TorchTensorRT(trt, monkeypatch)
        captured = captured_tiny(torch.bfloat16)
        path = tmp_path / "tiny.ep"
        with pytest.raises(DeviceError, match="NVIDIA GPU"):
            tensorrt.write(captured, path)
        on_gpu = dataclasses.replace(captured, device=torch.device("cuda"))
        written = tensorrt.write(on_gpu, path)
    assert written.extra["runtime"] == "torch_tensorrt" and written.versions == {"torch_tensorrt": "2.13.0"}
    assert path.read_bytes() == b"engine"
    assert fake.settings["require_full_compilation"] and fake.settings["min_block_size"] == 1
    # Every op of the graph became its plugins, and nothing else did.
    assert [layer.name for layer in fake.network.layers] == [
        "token_sums", "token_means", "drift_gate", "group_lse", "top_p_select", "count_pairs",
        "expand_mask", "block_sparse_attention",
    ]  # fmt: skip
    shapes = [x.shape for x in fake.outputs]
    assert shapes[1:] == [layout.shape for layout in captured.state]


class _TorchTensorRT:
    """Converts the nodes for which converters were registered, and leaves the other nodes alone."""

    def __init__(self, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from haste_compile.artifacts.plugins import ptx, registration

        self.network, self.converters = Network(trt), {}  # type: ignore[var-annotated]
        self.settings: dict[str, Any] = {}
        self.outputs: list[NetworkTensor] = []
        self._dtypes = {
            torch.float32: trt.DataType.FLOAT,
            torch.bfloat16: trt.DataType.BF16,
            torch.int32: trt.DataType.INT32,
            torch.int64: trt.DataType.INT64,
        }
        modules = {
            "torch_tensorrt": {"__version__": "2.13.0", "save": self._save},
            "torch_tensorrt.dynamo": {"compile": self._compile},
            "torch_tensorrt.dynamo.conversion": {"dynamo_tensorrt_converter": self._register},
            "torch_tensorrt.dynamo.conversion.converter_utils": {"get_trt_tensor": lambda _, x, name: x},
        }
        for name, contents in modules.items():
            module: Any = types.ModuleType(name)
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["torch_tensorrt"].dynamo = sys.modules["torch_tensorrt.dynamo"]  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        # What the compiler gives is tested elsewhere; here a name will do.
        monkeypatch.setattr(
            registration,
            "compile_plugins",
            lambda jobs: [ptx.Compiled(job.plugin.name, "ptx", (), 128, 0, job.launch) for job in jobs],
        )

    def _register(self, target: Any) -> Callable[[Any], Any]:
        return lambda converter: self.converters.setdefault(target, converter)

    def _compile(self, program: Any, **settings: Any) -> str:
        self.settings = settings
        values: dict[Any, Any] = {}
        context = types.SimpleNamespace(net=self.network)
        for node in program.graph.nodes:
            made = node.meta.get("val")
            if node.target in self.converters:
                arguments = tuple(values[x] for x in node.args)
                values[node] = self.converters[node.target](
                    context, node.target, arguments, node.kwargs, node.name
                )
            elif node.target is operator.getitem and node.args[0] in values:
                values[node] = values[node.args[0]][node.args[1]]
            elif isinstance(made, torch.Tensor):
                values[node] = NetworkTensor(tuple(made.shape), self._dtypes.get(made.dtype))
        self.outputs = [values[x] for x in program.graph.output_node().args[0]]
        return "engine"

    def _save(self, compiled: str, path: str, **_: Any) -> None:
        Path(path).write_text(compiled)
