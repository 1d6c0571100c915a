"""Every private or version-dependent name of torch that the graph side of this package relies on.

Two dialects of FX graph meet here. "dynamo": what a ``torch.compile`` backend receives, with Python
functions as targets and fakes in ``meta["example_value"]``. "export": what ``torch.export`` makes, with aten
overloads as targets and fakes in ``meta["val"]``. Each function is pinned by ``tests/test_torch_private.py``,
so a new torch version that moves something fails there, with the name of what moved, and not inside a user's
compile.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import SyntheticLocalSource
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true
from torch.utils._pytree import tree_leaves, tree_map_only

from haste_compile.errors import HasteError, OptionError

Dialect = Literal["dynamo", "export"]

_FAKE_KEY: dict[Dialect, str] = {"dynamo": "example_value", "export": "val"}

# What Dynamo hangs on a graph module outside of ``meta`` and AOTAutograd reads again.
_GRAPH_ATTRIBUTES = (
    "_param_name_to_source",
    "_source_to_user_stacks",
    "_backend_id",
    "compile_subgraph_reason",
)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph so that passes may edit it; tensors and submodules are shared, nodes are not.

    Dynamo keeps its own graph, and AOTAutograd takes a graph for Dynamo's only while every placeholder has a
    ``_dynamo_source`` and the module its sources and ``meta``: all of them go along.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    twins: dict[fx.Node, fx.Node] = {}
    result, old_output = cast(tuple[Any, fx.Node], graph.graph_copy(gm.graph, twins, return_output_node=True))
    graph.output(result).meta = copy.copy(old_output.meta)
    graph.set_codegen(copy.deepcopy(gm.graph._codegen))
    for old, new in twins.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    twin = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    twin.meta = dict(gm.meta)
    for name in _GRAPH_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(twin, name, getattr(gm, name))
    return twin


def flat_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a module that takes its tensors by position and returns a tuple of tensors.

    ``ExportedProgram.module()`` unpacks nested arguments around its graph, which is flat already, and checks
    them in a hook; both stay behind. Arguments that are no tensors were baked in: nobody uses them.
    """
    gm = copy_graph(cast(fx.GraphModule, program.module(check_guards=False)))
    for node in gm.graph.find_nodes(op="placeholder"):
        if not isinstance(fake_value(node), Tensor):
            gm.graph.erase_node(node)
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.recompile()
    return gm


def aoti_package(program: torch.export.ExportedProgram, path: Path, *, metadata: Mapping[str, str]) -> None:
    """Compile an exported program with AOTInductor into one ``.pt2`` file that carries ``metadata``.

    The weights lie at the end of its shared library, which maps them. By default they would be assembled into
    it, by a source that does not say that it needs no executable stack. So the library would demand one: all
    stacks of the process become executable, and C libraries from glibc 2.41 on refuse to load it.
    """
    import torch._inductor

    configs = {
        "aot_inductor.metadata": dict(metadata),
        "aot_inductor.force_mmap_weights": True,
        "aot_inductor.use_consts_asm_build": False,
    }
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def aoti_load(path: Path, device: torch.device) -> Callable[..., Any]:
    """The function of tensors in a ``.pt2`` file."""
    import torch._inductor

    index = -1 if device.index is None else device.index
    return torch._inductor.aoti_load_package(str(path), device_index=index)


def is_fragment(gm: fx.GraphModule) -> bool:
    """Whether Dynamo broke the traced function into several graphs, of which this is one."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and (
        reason.graph_break
        or any(frame.name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX) for frame in reason.user_stack)
    )


def append_static_input(gm: fx.GraphModule, name: str, fake: Tensor) -> fx.Node:
    """Append a placeholder that the caller fills with a tensor of constant address.

    Marked as Dynamo marks a module's buffers: Inductor then mutates it in place and CUDA graphs do not copy
    it. No guard refers to it, since no user variable holds it.
    """
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    first = next(iter(graph.nodes))
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before(first):
        node = graph.placeholder(name, type_expr=Tensor)
    node._dynamo_source = SyntheticLocalSource(name)  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta[_FAKE_KEY["dynamo"]] = fake
    return node


def fake_value(node: fx.Node) -> Any:
    """What the tracer recorded as the node's result, with fake tensors; None where it recorded nothing."""
    return node.meta.get(_FAKE_KEY["dynamo"], node.meta.get(_FAKE_KEY["export"]))


def set_fake_value(node: fx.Node, value: Any, dialect: Dialect) -> None:
    node.meta[_FAKE_KEY[dialect]] = value


def empty_fake(like: Tensor, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous fake tensor on the device and in the fake mode of ``like``; sizes may be symbolic."""
    return _empty(cast(FakeTensor, like).fake_mode, shape, dtype, like.device)


def _empty(mode: Any, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), mode:
        return torch.empty(shape, dtype=dtype, device=device)


def evaluate(node: fx.Node, known: Mapping[fx.Node, Any] | None = None) -> Any:
    """Run a ``call_function`` node on fakes: those in ``known``, else the recorded ones of its inputs."""
    known = known or {}

    def value(n: fx.Node) -> Any:
        return known[n] if n in known else fake_value(n)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    # The mode of the recorded fakes: Dynamo has set up another one by the time it calls a backend.
    leaves = tree_leaves([value(n) for n in node.all_input_nodes])
    fake_mode = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    with torch.no_grad(), fake_mode:
        return cast(Any, node.target)(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Outline:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Outline:
        """Symbolic sizes count as those that the graph was traced with; adds no guard."""
        shape, strides = (tuple(map(_traced_size, sizes)) for sizes in (x.shape, x.stride()))
        return cls(shape, strides, _traced_size(x.storage_offset()), x.dtype, x.device)

    def fake(self) -> Tensor:
        """A fake tensor like it; under a fake mode."""
        reach = sum(step * (size - 1) for step, size in zip(self.strides, self.shape, strict=True))
        storage = torch.empty(self.offset + reach + 1, dtype=self.dtype, device=self.device)
        return storage.as_strided(self.shape, self.strides, self.offset)


@dataclasses.dataclass(frozen=True)
class OutlinedCall:
    """What a node calls, and with what, as an outline: calls of equal outlines do the same work."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, node: fx.Node) -> OutlinedCall:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: Outline.of(fake_value(n)))
        return cls(node.target, tuple(args), tuple(kwargs.items()))

    def run(self, function: Callable[..., Any]) -> None:
        """Call a function in the target's place with fake tensors; what it allocates is fake too."""
        with torch.no_grad(), FakeTensorMode():
            args, kwargs = tree_map_only(Outline, Outline.fake, (self.args, dict(self.kwargs)))
            function(*args, **kwargs)


def _traced_size(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every size the graph may serve; adds no guard."""
    return statically_known_true(condition)


def guarded(condition: bool | torch.SymBool) -> bool:
    """Decide a condition on sizes for the traced size, and guard the graph on the outcome."""
    return guard_or_false(condition)


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The arguments of one ``scaled_dot_product_attention`` node, in either dialect."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


_ATTENTION_TARGETS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def attention_call(node: fx.Node) -> AttentionCall | None:
    """Read a node as scaled dot-product attention; None when it is something else."""
    if node.op != "call_function" or node.target not in _ATTENTION_TARGETS:
        return None
    return AttentionCall(**dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs)  # type: ignore[arg-type]


# Python's operators under the names that aten has for them.
_OPERATORS = {"truediv": "div", "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}


def op_name(node: fx.Node) -> str:
    """What torch calls a node's operation, in either dialect: "add", "layer_norm", "getitem", "copy_".

    Empty for what is not an operation of torch or Python: inputs, modules, custom ops, nested graphs.
    """
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else ""
    name, owner = getattr(target, "__name__", ""), str(getattr(target, "__module__", ""))
    if owner == "_operator":
        return _OPERATORS.get(name, name)
    is_torch = owner.split(".")[0] == "torch" and not isinstance(target, torch._ops.OpOverloadPacket)
    return name if is_torch else ""


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether aten tags an operation of that name as pointwise: each element from its own operands alone."""
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("__") else None
    if packet is None:
        return False
    tags = [getattr(packet, overload).tags for overload in packet.overloads()]
    return any(torch.Tag.pointwise in t and torch.Tag.nondeterministic_seeded not in t for t in tags)


# A step down the module tree: .name, .0, ['name'] or [0].
_STEP = re.compile(r"\.(\w+)|\[['\"]([^'\"]+)['\"]\]|\[(\d+)\]")
# The variable that holds the outermost module: L['self'], G['model'], L['args'][0], a closure's cell.
_ROOT = re.compile(r"^(?:.*\.cell_contents|[LG]\['[^']+'\](?:\[\d+\])?)")
# Steps that are Python's, torch's or a forward hook's bookkeeping and no part of a module path.
_BOOKKEEPING = {"__dict__", "_modules", "_orig_mod", "forward", "_old_forward", "__self__"}


def module_path(node: fx.Node) -> str | None:
    """Dotted path of the module that the node's operation ran in; None when no module is known.

    Dynamo spells it as a source expression, for instance ``L['self'].__dict__['_modules']['blocks'].0.attn1``
    (several spellings by version), torch.export as the path itself. Both give ``blocks.0.attn1``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    spelled = next(reversed(stack.values()))[0]
    if not _ROOT.match(spelled):
        return spelled or None
    steps = (next(filter(None, groups)) for groups in _STEP.findall(_ROOT.sub("", spelled)))
    return ".".join(step for step in steps if step not in _BOOKKEEPING) or None


# Where a graph input comes from: L['timestep'], L['kwargs']['timestep'] or L['args'][1]. accelerate's offload
# hook breaks the graph before the module's own forward, whose (args, kwargs) then lie on the saved stack:
# L['___stack0'][1]['timestep'] or L['___stack0'][0][1].
_KEYWORD_INPUT = re.compile(r"^L(?:\['kwargs'\]|\['___stack\d+'\]\[1\])?\['(\w+)'\]$")
_POSITIONAL_INPUT = re.compile(r"^L(?:\['args'\]|\['___stack\d+'\]\[0\])\[(\d+)\]$")


def argument_positions(gm: fx.GraphModule, signature: Sequence[str]) -> dict[str, int]:
    """Which graph inputs are the named arguments of the compiled function; unseen ones are left out.

    Args:
        gm: a Dynamo graph.
        signature: the function's argument names in order, for calls that pass them by position.
    """
    found: dict[str, int] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        name: Any = node._dynamo_source.name
        source = str(name() if callable(name) else name)  # a method up to torch 2.11, a property since
        if match := _KEYWORD_INPUT.match(source):
            found.setdefault(match[1], position)
        elif (match := _POSITIONAL_INPUT.match(source)) and int(match[1]) < len(signature):
            found.setdefault(signature[int(match[1])], position)
    return {name: found[name] for name in signature if name in found}


class SizeReader:
    """Works out the traced graph's symbolic sizes from the arguments of a call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._symbols = {
            fake.node.expr: position
            for position, node in enumerate(gm.graph.find_nodes(op="placeholder"))
            if isinstance(fake := fake_value(node), torch.SymInt)
        }

    def symbols(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The values that decide every size; equal values, equal sizes."""
        return tuple(args[position] for position in self._symbols.values())

    def size(self, size: int | torch.SymInt, args: Sequence[Any]) -> int:
        if isinstance(size, int):
            return size
        return int(
            size.node.expr.subs({symbol: args[position] for symbol, position in self._symbols.items()})
        )


def compile_processes() -> int:
    """Processes that Inductor compiles kernels in; 1: it does so in the one that calls."""
    from torch._inductor import config

    return config.compile_threads or 1


def compile_pool() -> Any:
    """Inductor's processes, with ``submit``; they leave GPUs alone. One thread at a time may ask."""
    from torch._inductor.async_compile import AsyncCompile

    return AsyncCompile.process_pool()


def name_triton_cache(device: torch.device) -> None:
    """Name the folder of a device's Triton kernels, as Inductor does once it compiles its first."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))


InnerCompiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def inner_compiler(inner: str, mode: str | None) -> InnerCompiler:
    """The backend that compiles the rewritten graph; ``mode`` is one of ``torch.compile`` and needs Inductor.

    In a mode with CUDA graphs results leave as copies: a graph's own outputs are overwritten by its next
    replay, and a pipeline holds the conditional result while it asks for the unconditional one.

    Fakes among its inputs (those of ``append_static_input``) are moved to the fake mode that AOTAutograd is
    going to use, sizes and all.

    Raises:
        OptionError: a mode for another compiler than Inductor, or a mode that torch does not know.
    """
    mode = mode or "default"
    compile_graph = lookup_backend(inner) if mode == "default" else _inductor_in_mode(inner, mode)
    return lambda gm, inputs: compile_graph(gm, [_in_backend_mode(x) for x in inputs])


def _inductor_in_mode(inner: str, mode: str) -> Callable[..., Any]:
    from torch._inductor import list_mode_options  # Inductor takes seconds to import
    from torch._inductor.compile_fx import compile_fx

    modes = list_mode_options()
    if inner != "inductor" or mode not in modes:
        raise OptionError(
            found=f"mode={mode!r} with inner={inner!r}",
            wanted="one of " + ", ".join(map(repr, modes)) + " with inner='inductor'",
            where="torch.compile",
            fix="Leave out mode, or inner.",
        )
    compile_graph = functools.partial(compile_fx, config_patches=modes[mode])
    if not modes[mode].get("triton.cudagraphs"):
        return compile_graph
    return lambda gm, inputs: results_as_copies(compile_graph(gm, inputs))


def results_as_copies(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same callable, whose tensors on a GPU are the caller's own and no memory of a CUDA graph."""

    def call(*args: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.clone() if x.is_cuda else x, compiled(*args))

    return call


def _in_backend_mode(value: Any) -> Any:
    # Dynamo sets up a second fake mode, with the same symbols, before it calls a backend.
    context = TracingContext.try_get()
    if not isinstance(value, FakeTensor) or context is None or context.fake_mode is None:
        return value
    return _empty(context.fake_mode, tuple(value.shape), value.dtype, value.device)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile`` or ``torch.compile`` has been there."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def watch_compiled(module: nn.Module, watch: Callable[[Callable[[], Any]], Any]) -> None:
    """Put ``watch`` around every compiled call of a module; it is handed the call and returns its result."""
    compiled: Any = module._compiled_call_impl
    module._compiled_call_impl = lambda *args, **kwargs: watch(lambda: compiled(*args, **kwargs))


def undo_compile(module: nn.Module) -> None:
    """Undo ``module.compile``, for which torch offers no public way."""
    module._compiled_call_impl = None


def compile_counts() -> tuple[int, int]:
    """Graphs that Dynamo compiled, and graph breaks that it met, in this process so far."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def caches_graphs() -> bool:
    """Whether Inductor keeps compiled graphs on disk."""
    from torch._inductor import config

    return bool(config.fx_graph_cache and not config.force_disable_caches)


def graph_cache_counts() -> tuple[int, int, int]:
    """Graphs that Inductor took from its cache, compiled, and refused to cache, in this process so far."""
    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], found["fxgraph_cache_bypass"]


def through_dynamo(error: HasteError) -> HasteError:
    """The same error in a type that Dynamo hands to the user as it is.

    Dynamo wraps what a backend raises in ``BackendCompilerFailed``, unless it is one of its own
    ``ShortenTraceback``. The result is both, so ``except UnsupportedSiteError`` works around a compiled call.
    """
    kind = type(error)
    names = {
        "__module__": kind.__module__,
        "__str__": lambda self: str(error),  # Dynamo appends advice on its own log switches
        "__reduce__": lambda self: error.__reduce__(),  # this type has no importable name
    }
    twin: Any = Exception.__new__(type(kind.__name__, (kind, ShortenTraceback), names), *error.args)
    twin.__dict__.update(error.__dict__, first_useful_frame=None)
    return twin


def many_graphs() -> contextlib.AbstractContextManager[None]:
    """Let Dynamo keep more graphs of one function than it does by default, while the context lasts."""
    return torch._dynamo.config.patch(recompile_limit=64)
