"""The captured graph: its forms, its explicit state, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from artifact_case import OPTIONS
from torch import Tensor, nn

from haste_compile.artifacts import Size
from haste_compile.artifacts.capture import Captured, capture
from haste_compile.config import HasteConfig
from haste_compile.errors import ArtifactError, UnsupportedSiteError
from haste_compile.predictors import PREDICTORS
from haste_compile.predictors.base import OpCall
from haste_compile.predictors.xattention import XAttention

SCALES = (4, 8)
SIZE = Size(tiny_wan.HEIGHT, tiny_wan.WIDTH, tiny_wan.FRAMES, text_tokens=16)


def make(model: nn.Module | None = None, size: Size = SIZE, **changes: Any) -> Captured:
    config = HasteConfig.from_options({**OPTIONS, **changes})
    return capture(tiny_wan.build_transformer() if model is None else model, size, SCALES, config)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return make()


def arguments(captured: Captured) -> list[Tensor]:
    """Fresh tensors for one call of the graph in any form: a first call of slot 0."""
    video = tiny_wan.transformer_inputs()
    own = [video["hidden_states"], video["timestep"], video["encoder_hidden_states"]]
    return [x.clone() for x in (*own, *captured.examples[len(own) :])]


def test_inputs_and_state_stand_in_their_order(captured: Captured):
    layouts = (*captured.inputs, *captured.state)
    placeholders = captured.module("live").graph.find_nodes(op="placeholder")
    assert [node.target for node in placeholders] == [layout.name for layout in layouts]
    assert [tuple(x.shape) for x in captured.examples] == [layout.shape for layout in layouts]
    constants = dict(captured.module("live").named_buffers())
    assert {"haste_0_top_p", "haste_1_delta"} <= set(constants)
    assert not {layout.name for layout in captured.state} & set(constants)


def test_the_forms_compute_the_same(captured: Captured):
    live = arguments(captured)
    (sample,) = captured.module("live")(*live)
    state = live[len(captured.inputs) :]
    for form in ("named", "plain"):
        before = arguments(captured)
        found, *updated = captured.module(form)(*before)
        assert torch.equal(before[-1], arguments(captured)[-1]), "state was changed in place"
        torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-5)
        assert len(updated) == len(captured.state)
        for layout, mine, theirs in zip(captured.state, updated, state, strict=True):
            exact = "anchors" not in layout.name
            torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_the_named_form_holds_ops_and_the_plain_form_none(captured: Captured):
    def ops(form: Any) -> list[str]:
        names = (str(node.target) for node in captured.program(form).graph.nodes)
        return [name for name in names if name.startswith("haste.")]

    named = ["haste.refresh_mask.default", "haste.block_sparse_attention.default"]
    assert ops("named") == named * tiny_wan.LAYERS
    assert ops("plain") == []


def test_no_state_tensor_has_one_element():
    """AOTInductor would take it for a constant (see test_aoti)."""
    model = tiny_wan.build_transformer(num_attention_heads=1, num_layers=1)
    assert min(x.numel() for x in make(model, slots=1).examples[3:]) >= 2


def test_thresholds_are_constants_of_their_site():
    table = [[0.5, 0.625], [0.75, 0.875]]
    captured = make(top_p=table, delta=3)
    assert captured.thresholds == {"top_p": table, "delta": [[3.0, 3.0]] * 2}
    for form in ("live", "plain"):
        held = dict(captured.module(form).named_buffers())
        assert [held[f"haste_{i}_top_p"].tolist() for i in range(2)] == table


def test_a_site_that_stays_dense_has_no_state():
    captured = make(dense_layers=[0])
    assert [spec.name for spec in captured.specs] == ["blocks.1.attn1"]
    assert [x.name for x in captured.state] == ["haste_0_mask", "haste_0_anchors", "haste_0_counters"]


def test_an_image_to_video_transformer():
    model = tiny_wan.build_transformer(in_channels=12, image_dim=32, added_kv_proj_dim=128, num_layers=1)
    captured = make(model)
    assert [x.name for x in captured.inputs][2:4] == ["encoder_hidden_states", "encoder_hidden_states_image"]
    assert captured.inputs[3].shape == (1, 257, 32)


def test_nothing_that_can_be_rewritten():
    with pytest.raises(ArtifactError, match=r"320 tokens, fewer than min_tokens=4000"):
        make(min_tokens=4000)
    with pytest.raises(UnsupportedSiteError):
        make(min_tokens=4000, strict=True)


def test_a_module_that_cannot_be_traced():
    class Loop(nn.Module):
        config = tiny_wan.build_transformer().config
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states * 2 if hidden_states.sum() > 0 else hidden_states

    with pytest.raises(ArtifactError, match="wanted a transformer that torch.export can trace"):
        make(Loop())


def test_a_predictor_whose_ops_cannot_be_spelled_out_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As SVG2's: its ops run as ops alone, so formats without them say so."""
    torch.library.define("haste_test::refresh_", "(Tensor q, Tensor k, Tensor(a!) counters) -> ()")
    torch.library.register_fake("haste_test::refresh_", lambda q, k, counters: None)

    class Other(XAttention):
        def refresh(self, config: HasteConfig, scale: float) -> OpCall:
            known = super().refresh(config, scale)
            return OpCall(torch.ops.haste_test.refresh_.default, known.fields, known.options)

    monkeypatch.setitem(PREDICTORS, "xattention", Other())
    captured = object.__new__(Captured)
    object.__setattr__(captured, "config", HasteConfig())
    with pytest.raises(ArtifactError, match="'plain' form.*haste_test.refresh_.*runs as an op alone"):
        captured.module("plain")


_TRITON_FORM = """
import test_capture, torch
captured = test_capture.make(block_size=128)
program = captured.program("triton").run_decompositions({})
names = [str(node.target) for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
updated = set(program.graph_signature.user_inputs_to_mutate.values())
print(len(names), {layout.name for layout in captured.state} <= updated)
"""


def test_the_triton_form_holds_every_kernel_as_a_node():
    """In a process of its own: kernels that Triton interprets cannot be traced."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n" + _TRITON_FORM
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Means (2), decision, log-sum-exps, selection, lists, attention: seven kernels a site.
    assert done.stdout.split() == [str(7 * tiny_wan.LAYERS), "True"]
