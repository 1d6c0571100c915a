"""The backend on a tiny random Wan transformer: what is compiled, how often, and what a bad call says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_wan import build_transformer, transformer_inputs
from torch import Tensor, nn

from haste_compile.backend import reports
from haste_compile.config import HasteConfig
from haste_compile.errors import (
    AutogradError,
    NoAttentionSitesError,
    OptionError,
    StateError,
    ThresholdError,
    UnsupportedSiteError,
)
from haste_compile.state import Attachment, states_of, statistics

OPTIONS: dict[str, Any] = {"block_size": 64, "stride": 8, "min_tokens": 64, "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compile_haste(module: nn.Module, *, dynamic: bool | None = False, **options: Any) -> Any:
    return torch.compile(module, backend="haste", dynamic=dynamic, options={**OPTIONS, **options})


def run(model: Any, timestep: float = 900.0, /, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**transformer_inputs(), **inputs, "timestep": torch.tensor([timestep])})[0]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_all_blocks_kept_equals_dense(inner: str):
    transformer = build_transformer()
    dense = run(transformer)
    sparse = run(compile_haste(transformer, inner=inner, top_p=1.0, strict=True))
    assert statistics(transformer).density == 1.0
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)


def test_inductor_updates_the_state_in_place_and_agrees_with_eager():
    outputs = {}
    for inner in ("eager", "inductor"):
        transformer = build_transformer()
        model = compile_haste(transformer, inner=inner, top_p=0.7, delta=10.0)
        outputs[inner] = [run(model, t) for t in (900.0, 800.0, 700.0)]
        assert statistics(transformer).calls == 3 * 2 * 2  # calls × sites × heads
        assert statistics(transformer).density < 0.9
    for eager, inductor in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(eager, inductor, rtol=1e-4, atol=1e-5)


def test_one_graph_and_no_recompile_over_steps_branches_and_videos():
    model = compile_haste(build_transformer())
    text = transformer_inputs()["encoder_hidden_states"]
    for _ in range(2):
        for timestep in (900.0, 500.0, 100.0):
            for branch in (text, -text):
                run(model, timestep, encoder_hidden_states=branch)
    assert graphs() == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["recompiles"]


def test_fullgraph_holds():
    transformer = build_transformer()
    run(torch.compile(transformer, backend="haste", fullgraph=True, options=OPTIONS))
    (report,) = reports(transformer)
    assert [site.name for site in report.rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert {site.name for site in report.skipped} == {"blocks.0.attn2", "blocks.1.attn2"}
    assert all("cross" in site.reason for site in report.skipped)


def test_positional_arguments_reach_the_clock():
    transformer = build_transformer()
    model = compile_haste(transformer, delta=1e9)
    inputs = transformer_inputs()
    with torch.no_grad():
        for timestep in (900.0, 800.0):
            model(inputs["hidden_states"], torch.tensor([timestep]), inputs["encoder_hidden_states"])
    assert statistics(transformer).refresh_rate == 0.5


def test_dynamic_shapes_serve_every_size_with_state_of_its_own():
    """With dynamic=None the second size makes the graph symbolic; it must serve old and new sizes alike."""
    transformer, twin = build_transformer(), build_transformer()
    model = compile_haste(transformer, dynamic=None, top_p=0.7, delta=10.0)
    sizes = [transformer_inputs(width=width) for width in (128, 192, 160, 128, 256)]
    served = [run(model, 900.0, **inputs) for inputs in sizes]
    assert graphs() == 2
    torch._dynamo.reset()
    static = compile_haste(twin, top_p=0.7, delta=10.0)
    for inputs, output in zip(sizes, served, strict=True):
        torch.testing.assert_close(output, run(static, 900.0, **inputs), rtol=1e-4, atol=1e-5)
    assert len(list(states_of(transformer))) == 4
    run(model, 900.0, **transformer_inputs(width=320))
    kept = [state.specs[0].N for state in states_of(transformer)]
    assert kept == [5 * 8 * 10, 5 * 8 * 8, 5 * 8 * 16, 5 * 8 * 20], "the size unused for longest goes first"


def test_dynamic_shapes_through_inductor():
    transformer = build_transformer(num_layers=1)
    model = compile_haste(transformer, dynamic=None, inner="inductor", top_p=1.0)
    for width in (128, 192, 256):
        inputs = transformer_inputs(width=width)
        torch.testing.assert_close(run(model, **inputs), run(transformer, **inputs), rtol=1e-4, atol=1e-5)
    assert graphs() == 2


class TestBlocks:
    """Regional compilation: one graph for all blocks, which sees neither timestep nor text."""

    def compile_blocks(self, transformer: nn.Module, *, attach: bool = True, **options: Any) -> None:
        blocks = list(transformer.blocks)
        if attach:
            Attachment(transformer, blocks, HasteConfig.from_options({**OPTIONS, **options}))
        for block in blocks:
            block.compile(backend="haste", dynamic=False, options={**OPTIONS, **options})

    def test_attached_blocks_equal_the_whole(self):
        options = {"top_p": 0.7, "delta": 10.0}
        whole = compile_haste(build_transformer(), **options)
        expected = [run(whole, t) for t in (900.0, 800.0, 700.0)]
        transformer = build_transformer()
        before = graphs()
        self.compile_blocks(transformer, **options)
        for timestep, output in zip((900.0, 800.0, 700.0), expected, strict=True):
            torch.testing.assert_close(run(transformer, timestep), output, rtol=1e-4, atol=1e-5)
        assert graphs() - before == 1
        found = statistics(transformer)
        assert found.sites == ("blocks.0.attn1", "blocks.1.attn1")
        assert found.refresh_rate < 1

    @pytest.mark.parametrize("options", [{"dense_steps": 1}, {"reuse": "after:2"}], ids=str)
    def test_blocks_without_an_attachment_refuse_to_count_steps(self, options: dict[str, Any]):
        transformer = build_transformer()
        self.compile_blocks(transformer, attach=False, **options)
        with pytest.raises(StateError, match="compile='blocks'"):
            run(transformer)

    def test_blocks_without_an_attachment_rebuild_every_mask(self, caplog: pytest.LogCaptureFixture):
        transformer = build_transformer()
        self.compile_blocks(transformer, attach=False, delta=1e9)
        for timestep in (900.0, 800.0):
            run(transformer, timestep)
        assert statistics(transformer).refresh_rate == 1.0
        assert "rebuilt at every call" in caplog.text

    def test_each_block_takes_its_row_of_thresholds(self):
        transformer = build_transformer()
        self.compile_blocks(transformer, top_p=[[1.0, 1.0], [0.3, 1.0]])
        run(transformer)
        first, second = statistics(transformer).density_by_head
        assert first == (1.0, 1.0) and second[0] < 0.7 and second[1] == 1.0


@pytest.mark.parametrize(
    ("reuse", "rebuilt"),
    [
        ("never", [1, 1, 1, 1, 1]),
        ("always", [1, 0, 0, 0, 0]),
        ("interval:2", [1, 0, 1, 0, 1]),
        ("after:3", [1, 1, 1, 0, 0]),
    ],
)
def test_reuse_rules_and_recorded_steps(reuse: str, rebuilt: list[int]):
    transformer = build_transformer()
    model = compile_haste(transformer, reuse=reuse, delta=0.0, stats=True, top_p=0.6)
    for timestep in (900.0, 800.0, 700.0, 600.0, 500.0):
        run(model, timestep)
    found = statistics(transformer)
    assert [call.refresh_rate for call in found.steps] == rebuilt
    assert [call.step for call in found.steps] == [0, 1, 2, 3, 4]
    average = sum(call.density for call in found.steps) / 5
    assert average == pytest.approx(found.density) and 0 < average < 1


def test_nothing_is_recorded_unasked():
    transformer = build_transformer()
    run(compile_haste(transformer))
    assert statistics(transformer).steps == ()


def test_the_gate_of_the_layer():
    """One head of two wants a mask (δ of 0 and of a million): a share of 0.5 passes or not by the gate."""
    for gate, rate in (((0.4, 0.8), 0.75), ((0.6, 0.8), 0.5), ((0.2, 0.4), 1.0)):
        transformer = build_transformer()
        model = compile_haste(transformer, delta=[[0.0, 1e6], [0.0, 1e6]], gate=gate)
        run(model, 900.0), run(model, 800.0)
        assert statistics(transformer).refresh_rate == rate
        torch._dynamo.reset()


def test_thresholds_of_single_heads():
    transformer = build_transformer()
    run(compile_haste(transformer, top_p=[[0.2, 1.0], [1.0, 0.2]]))
    (low, full), (full_too, low_too) = statistics(transformer).density_by_head
    assert full == full_too == 1.0 and max(low, low_too) < 0.6


def test_dense_layers_and_warm_up():
    transformer = build_transformer()
    dense = run(transformer)
    model = compile_haste(transformer, dense_steps=1, top_p=0.2)
    torch.testing.assert_close(run(model, 900.0), dense, rtol=1e-4, atol=1e-5)
    assert (run(model, 800.0) - run(transformer, 800.0)).abs().max() > 1e-3
    torch._dynamo.reset()
    other = build_transformer()
    run(compile_haste(other, dense_layers=[0]))
    assert [site.name for site in reports(other)[0].rewritten] == ["blocks.1.attn1"]


def test_forward_works_in_grad_mode_and_backward_says_no():
    transformer = build_transformer()
    model = compile_haste(transformer, inner="aot_eager")
    output = model(**transformer_inputs())[0]
    with pytest.raises(AutogradError, match=r"torch\.no_grad"):
        output.sum().backward()


class TestBadInput:
    """Errors keep their class through Dynamo and say what was found, what was wanted, and what to do."""

    def test_unknown_option(self):
        with pytest.raises(OptionError, match="'topp'.*Did you mean 'top_p'"):
            run(compile_haste(build_transformer(), topp=0.9))

    @pytest.mark.parametrize("top_p", [0.0, 1.5, -0.1, float("nan"), [[0.9, 2.0], [0.9, 0.9]]])
    def test_threshold_out_of_range(self, top_p: Any):
        with pytest.raises(ThresholdError, match=r"\(0, 1\]"):
            run(compile_haste(build_transformer(), top_p=top_p))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"reuse": "drift"},
            {"reuse": "interval"},
            {"reuse": "after:0"},
            {"reuse": "tmr:2"},
            {"gate": (0.8, 0.4)},
            {"gate": 0.5},
            {"gate": (0.1, 2.0)},
            {"stats": 1},
            {"relative_drift": "yes"},
            {"block_size": 32},
            {"dense_layers": "0"},
            {"preset": "haste-v9"},
        ],
        ids=str,
    )
    def test_option_out_of_range(self, wrong: dict[str, Any]):
        with pytest.raises(OptionError, match=f"option {next(iter(wrong))}: found .* wanted "):
            run(compile_haste(build_transformer(), **wrong))

    @pytest.mark.parametrize("top_p", [[[0.9, 0.9]], [[0.9], [0.9]], [[0.9] * 3] * 2])
    def test_threshold_table_of_another_shape(self, top_p: Any):
        with pytest.raises(ThresholdError, match=r"\[2\]\[2\]"):
            run(compile_haste(build_transformer(), top_p=top_p))

    def test_strict_refuses_a_head_dim(self):
        transformer = build_transformer(attention_head_dim=32)
        with pytest.raises(UnsupportedSiteError, match=r"blocks\.0\.attn1.*32"):
            run(compile_haste(transformer, strict=True))

    def test_without_strict_the_same_site_is_skipped_with_its_reason(self, caplog: pytest.LogCaptureFixture):
        transformer = build_transformer(attention_head_dim=32)
        dense = run(transformer)
        torch.testing.assert_close(run(compile_haste(transformer)), dense)
        (report,) = reports(transformer)
        assert not report.rewritten
        assert any("32" in site.reason for site in report.skipped if site.kind == "self")
        assert "stays dense" in caplog.text

    def test_no_attention_in_the_graph(self):
        module = nn.Linear(4, 4)
        with pytest.raises(NoAttentionSitesError, match="set_attention_backend"):
            torch.compile(module, backend="haste")(torch.randn(2, 4))

    def test_a_failed_compilation_leaves_the_model_usable(self):
        transformer = build_transformer()
        dense = run(transformer)
        with pytest.raises(OptionError):
            run(compile_haste(transformer, top_q=1))
        assert torch.equal(run(transformer), dense)
        torch._dynamo.reset()
        assert run(compile_haste(transformer)).shape == dense.shape
