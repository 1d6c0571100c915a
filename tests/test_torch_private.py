"""Every private torch name in ``haste_compile._torch``: a new torch version that moves one fails here."""

from __future__ import annotations

import functools
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_capture import SMALL, Rewriting, capture, export, rewrite, tokens, toy
from tiny_wan import build_transformer, transformer_inputs
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor.utils import run_and_get_code

from haste_compile import _torch
from haste_compile.errors import OptionError, UnsupportedSiteError
from haste_compile.passes import PlaceholderBinding


def compile_with(backend, module=None, *args, **options) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(module or toy({}), backend=backend, **options)(*(args or (tokens(),)))


def test_a_copied_graph_is_still_dynamos_and_shares_no_node():
    graphs: list[fx.GraphModule] = []

    def backend(gm, inputs):
        graphs.append(gm)
        return _torch.copy_graph(gm).forward

    compile_with(backend)
    (gm,) = graphs
    twin = _torch.copy_graph(gm)
    assert twin.code == gm.code and not set(twin.graph.nodes) & set(gm.graph.nodes)
    assert "dynamo_compile_id" in twin.meta and twin.meta == gm.meta and twin.meta is not gm.meta
    assert twin._param_name_to_source is gm._param_name_to_source
    for old, new in zip(gm.graph.nodes, twin.graph.nodes, strict=True):
        assert getattr(old, "_dynamo_source", None) is getattr(new, "_dynamo_source", None)
        assert old.meta.keys() == new.meta.keys()
    output = next(iter(twin.graph.find_nodes(op="output")))
    output.args = ((),)
    assert next(iter(gm.graph.find_nodes(op="output"))).args != ((),)


def test_fragments_of_a_broken_graph():
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    fragments: list[bool] = []

    def backend(gm, inputs):
        fragments.append(_torch.is_fragment(_torch.copy_graph(gm)))
        return gm.forward

    compile_with(backend, broken, torch.ones(2))
    compile_with(backend, toy({}), tokens())
    assert fragments == [True, True, False]


def test_aot_autograd_takes_state_inputs_as_static():
    seen: list[tuple[int, list[int]]] = []

    def count(gm, inputs):
        metadata = TracingContext.get().fw_metadata
        seen.append((len(inputs), metadata.static_input_indices))
        return gm.forward

    class Probe(Rewriting):
        def __call__(self, gm, inputs):
            graph = _torch.copy_graph(gm)
            binding = rewrite(graph, self.config).binding
            assert isinstance(binding, PlaceholderBinding)
            fakes = [_torch.fake_value(node) for node in binding.nodes]
            aot_autograd(fw_compiler=count)(graph, [*inputs, *fakes])
            return gm.forward

    compile_with(Probe())
    ((inputs, static),) = seen
    assert set(range(inputs - 6, inputs)) <= set(static)
    assert 0 not in static  # the activations


def test_inductor_mutates_state_without_a_copy():
    rewriting = Rewriting(SMALL, "inductor")
    torch._dynamo.reset()
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(torch.compile(toy({}), backend=rewriting), tokens())
    assert "torch.ops.haste.refresh_mask_.default(" in code
    for shape in ("(4, 1, 2, 4, 1)", "(4, 1, 2, 2, 64)", "(4, 1, 2, 8)"):  # mask, anchors, counters
        assert shape in code
        assert f"empty_strided_cpu({shape}" not in code


def test_fakes_of_both_dialects():
    for gm, key in ((capture(toy({}), tokens()), "example_value"), (export(toy({}), tokens()), "val")):
        (site,) = [n for n in gm.graph.nodes if _torch.attention_call(n)]
        assert _torch.fake_value(site) is site.meta[key]
        assert tuple(_torch.fake_value(site).shape) == (1, 2, 200, 64)
        assert _torch.fake_value(next(iter(gm.graph.find_nodes(op="output")))) is None
    _torch.set_fake_value(site, 1, "export")
    assert site.meta["val"] == 1


def test_empty_fake_lives_in_the_mode_of_its_model_and_is_no_inference_tensor():
    gm = capture(toy({}), tokens())
    (site,) = [n for n in gm.graph.nodes if _torch.attention_call(n)]
    like = _torch.fake_value(site)
    with torch.inference_mode():
        fake = _torch.empty_fake(like, (3, 5), torch.int32)
    assert fake.fake_mode is like.fake_mode and not fake.is_inference()
    assert (tuple(fake.shape), fake.dtype, fake.device) == ((3, 5), torch.int32, like.device)


def test_evaluate_runs_a_node_on_fakes():
    gm = capture(toy({}), tokens())
    (site,) = [n for n in gm.graph.nodes if _torch.attention_call(n)]
    recorded = _torch.fake_value(site)
    again = _torch.evaluate(site)
    assert (again.shape, again.stride()) == (recorded.shape, recorded.stride())
    short = {n: _torch.empty_fake(recorded, (1, 2, 7, 64), recorded.dtype) for n in site.all_input_nodes}
    assert tuple(_torch.evaluate(site, short).shape) == (1, 2, 7, 64)


def test_conditions_on_symbolic_sizes():
    asked: list[tuple[bool, ...]] = []

    def backend(gm, inputs):
        n = _torch.fake_value(gm.graph.find_nodes(op="placeholder")[0])
        assert isinstance(n, torch.SymInt)
        asked.append((_torch.always(n == n), _torch.always(n > 150), _torch.guarded(n > 150)))
        return gm.forward

    model = toy({})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for count in (200, 300, 100):  # 300 passes the guard n > 150, 100 does not
            compiled(tokens(count))
    assert asked == [(True, False, True), (True, False, False)]
    assert _torch.always(True) and not _torch.guarded(False)


@pytest.mark.parametrize(
    ("spelled", "path"),
    [
        ("L['self'].__dict__['_modules']['blocks'].0.attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0']._modules['attn1']", "blocks.0.attn1"),
        ("L['self'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['self'].blocks[0].attn1", "blocks.0.attn1"),
        ("L['self'].attn1", "attn1"),
        ("L['self']._orig_mod.blocks.0.attn1", "blocks.0.attn1"),
        ("G['model'].blocks.0.attn1", "blocks.0.attn1"),
        ("L['args'][0].blocks.0.attn1", "blocks.0.attn1"),
        ("L['step'].__closure__[0].cell_contents.blocks.0.attn1", "blocks.0.attn1"),
        ("L['function_reference'].forward.__self__.blocks.0.attn1", "blocks.0.attn1"),
        ("L['module']._old_forward.__self__.blocks.0.attn1", "blocks.0.attn1"),
        ("blocks.0.attn1", "blocks.0.attn1"),
        ("L['self']", None),
        ("", None),
    ],
)
def test_module_path_spellings(spelled: str, path: str | None):
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": ("L['self']", nn.Module), "2": (spelled, nn.Module)}
    assert _torch.module_path(node) == path


def test_module_path_of_traced_graphs_and_of_a_node_without_owner():
    pytest.importorskip("diffusers")
    model = build_transformer()
    for trace in (capture, export):
        gm = trace(model, **transformer_inputs())
        paths = [_torch.module_path(n) for n in gm.graph.nodes if _torch.attention_call(n)]
        assert paths == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
    assert _torch.module_path(fx.Graph().placeholder("x")) is None


def test_attention_calls_of_both_dialects_read_alike():
    class Spelled(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=mask, scale=0.5)

    q, mask = torch.randn(1, 2, 8, 64), torch.ones(8, 8)
    for gm in (capture(Spelled(), q, mask), export(Spelled(), q, mask)):
        (call,) = filter(None, map(_torch.attention_call, gm.graph.nodes))
        assert call.query is call.key is call.value
        assert isinstance(call.attn_mask, fx.Node)
        assert (call.dropout_p, call.is_causal, call.scale, call.enable_gqa) == (0.0, False, 0.5, False)
    positional = capture(lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.25, True), q)
    (call,) = filter(None, map(_torch.attention_call, positional.graph.nodes))
    assert (call.attn_mask, call.dropout_p, call.is_causal) == (None, 0.25, True)


def test_argument_positions_by_name_and_through_a_wrapper():
    def forward(self, first, second, third):
        return first + second * third

    class Plain(nn.Module):
        pass

    class Wrapped(nn.Module):
        pass

    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    Plain.forward, Wrapped.forward = forward, wrapper
    names = ("third", "first", "absent")
    x, y, z = (torch.randn(4) for _ in range(3))
    plain = capture(Plain(), x, y, third=z)
    assert _torch.argument_positions(plain, names) == {"third": 1, "first": 2}  # in order of first use
    mixed = capture(Wrapped(), x, y, third=z)
    positions = _torch.argument_positions(mixed, ("first", "second", "third"))
    assert positions == {"second": 0, "third": 1, "first": 2}


def test_argument_positions_after_a_graph_break_before_the_forward():
    """accelerate's offload hook: the rest of the call is traced by itself, its arguments on a saved stack."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._old_forward = self.forward
            self.forward = functools.partial(new_forward, self)  # type: ignore[method-assign]

        def forward(self, first: Tensor, second: Tensor, *, third: Tensor) -> Tensor:
            return first + second * third

    @torch.compiler.disable
    def pre_forward(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = pre_forward(*args, **kwargs)
        return module._old_forward(*args, **kwargs)

    found: list[dict[str, int]] = []

    def backend(gm, inputs):
        found.append(_torch.argument_positions(gm, ("first", "second", "third")))
        return gm.forward

    torch._dynamo.reset()
    x, y, z = (torch.ones(2) * n for n in (1, 2, 3))
    assert torch.equal(torch.compile(Hooked(), backend=backend)(x, y, third=z), x + y * z)
    assert found == [{"first": 2, "second": 0, "third": 1}]


def test_size_reader_works_out_symbolic_sizes():
    found: list[tuple[int, ...]] = []

    def backend(gm, inputs):
        sizes = _torch.SizeReader(gm)
        (site,) = [n for n in gm.graph.nodes if _torch.attention_call(n)]
        shape = _torch.fake_value(site).shape

        def run(*args):
            found.append(tuple(sizes.size(n, args) for n in (*shape, -(-shape[2] // 64))))
            assert sizes.symbols(args) == (found[-1][2],)
            return gm(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(toy({}), backend=backend, dynamic=True)
    with torch.no_grad():
        for count in (200, 129):
            compiled(tokens(count))
    assert found == [(1, 2, 200, 64, 4), (1, 2, 129, 64, 3)]


def test_fakes_reach_the_inner_compiler_in_the_mode_of_aot_autograd(monkeypatch):
    seen: list[tuple[Tensor, Tensor]] = []

    def backend(gm, inputs):
        (site,) = [n for n in gm.graph.nodes if _torch.attention_call(n)]
        recorded = _torch.fake_value(site)

        def inner(gm, inputs):
            seen.append((recorded, inputs[-1]))
            return gm.forward

        monkeypatch.setattr(_torch, "lookup_backend", lambda name: inner)
        return _torch.inner_compiler("eager", None)(gm, [*inputs, recorded])

    compile_with(backend, dynamic=True)
    ((recorded, moved),) = seen
    assert moved.shape == recorded.shape and isinstance(moved.shape[2], torch.SymInt)
    assert moved.fake_mode is not recorded.fake_mode
    assert moved.fake_mode.shape_env is recorded.fake_mode.shape_env


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inner_compilers_run(inner: str):
    model, x = toy({}), tokens()
    with torch.no_grad():
        torch.testing.assert_close(compile_with(_torch.inner_compiler(inner, None), model, x), model(x))


def test_a_mode_reaches_inductor_as_its_settings(monkeypatch):
    calls: list[dict] = []

    def compile_fx(gm, inputs, **options):
        calls.append(options)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    _torch.inner_compiler("inductor", "reduce-overhead")(SimpleNamespace(forward=None), [])
    assert calls == [{"config_patches": {"triton.cudagraphs": True}}]


def test_results_of_a_cuda_graph_leave_as_copies():
    memory = torch.ones(2)
    with torch._subclasses.FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda")
        copied, untouched, number = _torch.results_as_copies(lambda: (on_gpu, memory, 3))()
    assert copied is not on_gpu and copied.device == on_gpu.device
    assert untouched is memory and number == 3


def test_which_modes_replay_cuda_graphs(monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward)
    monkeypatch.setattr(_torch, "results_as_copies", lambda compiled: "copies")
    found = {
        mode: _torch.inner_compiler("inductor", mode)(SimpleNamespace(forward="own"), [])
        for mode in ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    }
    assert found == {
        "reduce-overhead": "copies",
        "max-autotune": "copies",
        "max-autotune-no-cudagraphs": "own",
    }


@pytest.mark.parametrize(("inner", "mode"), [("inductor", "fastest"), ("eager", "reduce-overhead")])
def test_a_mode_that_means_nothing_is_refused(inner: str, mode: str):
    with pytest.raises(OptionError, match=f"found mode='{mode}' with inner='{inner}'.*'max-autotune'"):
        _torch.inner_compiler(inner, mode)


def test_errors_reach_the_user_unwrapped():
    error = UnsupportedSiteError(found="a", wanted="b", where="c", fix="d")

    def backend(gm, inputs):
        raise _torch.through_dynamo(error)

    with pytest.raises(UnsupportedSiteError) as caught:
        compile_with(backend)
    assert str(caught.value) == str(error) and caught.value.found == "a"
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is UnsupportedSiteError and str(copy) == str(error)


def test_other_errors_of_a_backend_are_wrapped_by_dynamo():
    # The reason for through_dynamo; when this fails, it can go.
    def backend(gm, inputs, error):
        raise error

    plain = UnsupportedSiteError(found="a", wanted="b", where="c", fix="d")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compile_with(functools.partial(backend, error=plain))


def test_a_compiled_module_is_known_and_undone():
    module = toy({})
    assert not _torch.is_compiled(module)
    assert _torch.is_compiled(torch.compile(module, backend="eager"))
    calls: list[int] = []

    def backend(gm, inputs):
        calls.append(len(inputs))
        return gm.forward

    torch._dynamo.reset()
    module.compile(backend=backend)
    assert _torch.is_compiled(module)
    x = tokens()
    with torch.no_grad():
        compiled = module(x)
    assert len(calls) == 1
    _torch.undo_compile(module)
    assert not _torch.is_compiled(module)
    torch._dynamo.reset()  # were it still compiled, it would be so again
    with torch.no_grad():
        assert torch.equal(module(x), compiled)
    assert len(calls) == 1


def test_graphs_and_breaks_are_counted():
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    graphs, breaks = _torch.compile_counts()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert _torch.compile_counts() == (graphs + 1, breaks)
    torch.compile(broken, backend="eager")(torch.ones(2))
    assert _torch.compile_counts() == (graphs + 3, breaks + 1)


def test_operations_have_one_name_in_either_dialect():
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.layer_norm(torch.stack([x, x / 2]), (4,))
            y[0] = F.silu(x).flatten(1)
            return y

    x = torch.randn(3, 4)
    for gm, store in ((capture(Module(), x), ["setitem"]), (export(Module(), x), ["select", "copy_"])):
        names = [_torch.op_name(node) for node in gm.graph.nodes]
        assert [n for n in names if n] == ["div", "stack", "layer_norm", "silu", "flatten", *store]
        others = {node.op for node, name in zip(gm.graph.nodes, names, strict=True) if not name}
        assert others <= {"placeholder", "output", "call_module"}


def test_pointwise_operations_are_tagged():
    for name in ("add", "mul_", "div", "silu", "gelu", "where", "clamp", "rsqrt", "neg"):
        assert _torch.is_pointwise(name), name
    for name in (
        "sum",
        "softmax",
        "cumsum",
        "roll",
        "sort",
        "bernoulli",
        "rand_like",
        "nothing",
        "",
        "__add__",
    ):
        assert not _torch.is_pointwise(name), name


def test_an_outline_has_the_traced_sizes_and_adds_no_guard():
    calls: list[_torch.OutlinedCall] = []

    def backend(gm, inputs):
        node = next(n for n in gm.graph.nodes if _torch.attention_call(n) is not None)
        calls.extend(_torch.OutlinedCall.of(node) for _ in range(2))
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(toy({}), backend=backend, dynamic=True)
    with torch.no_grad():
        for count in (192, 320):
            model(tokens(count))
    assert len(calls) == 2, "one graph serves both sizes"
    (call,) = set(calls)
    query = call.args[0]
    assert (query.shape[2], query.dtype, query.strides[3]) == (192, torch.float32, 1)

    seen: list[Tensor] = []
    call.run(lambda *args, **kwargs: seen.extend([*args, torch.empty(1 << 60)]))  # nothing is allocated
    assert seen[0].shape == query.shape and seen[0].stride() == query.strides


def test_an_outline_keeps_strides_and_offset():
    x = torch.randn(4, 8, 16)[1:, ::2, 3:].transpose(0, 1)
    seen: list[Tensor] = []
    _torch.OutlinedCall("target", (_torch.Outline.of(x), 2), (("scale", 0.5),)).run(
        lambda x, *_, **__: seen.append(x)
    )
    (fake,) = seen
    assert (fake.shape, fake.stride(), fake.storage_offset()) == (x.shape, x.stride(), x.storage_offset())


def test_inductor_has_processes_to_compile_in(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", None)
    assert _torch.compile_processes() == 1
    monkeypatch.setattr(config, "compile_threads", 2)
    assert _torch.compile_processes() == 2
    assert _torch.compile_pool().submit(os.getpid).result(timeout=120) not in (os.getpid(), None)


def test_triton_s_cache_is_where_inductor_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    _torch.name_triton_cache(torch.device("cuda", 1))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "1")
    _torch.name_triton_cache(torch.device("cuda", 0))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "1"), "what is named stays"
