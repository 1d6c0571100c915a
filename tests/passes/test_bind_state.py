"""How state enters a graph: names, order, shapes, and the contents of exported buffers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graph_capture import SMALL, capture, export, rewrite, tokens, toy

from haste_compile import _torch
from haste_compile.errors import ThresholdError
from haste_compile.kernels.layout import Ctl
from haste_compile.passes import PlaceholderBinding, StateInput

NAMES = ["haste_ctl"] + [
    f"haste_{site}_{field}" for site in (0, 1) for field in ("top_p", "delta", "mask", "anchors", "counters")
]


def test_state_inputs_follow_the_model_inputs_in_the_recorded_order():
    gm = capture(toy({}, {}), tokens())
    own = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    binding = rewrite(gm).binding
    assert isinstance(binding, PlaceholderBinding)
    assert [n.name for n in gm.graph.find_nodes(op="placeholder")] == own + NAMES
    assert [i.name for i in binding.inputs] == [n.name for n in binding.nodes] == NAMES
    assert binding.inputs[0] == StateInput(None, "ctl")
    assert binding.inputs[-1] == StateInput(1, "counters")


def test_shapes_and_dtypes_are_those_of_the_ops():
    gm = capture(toy({"heads": 3}), tokens(4100, 192, batch=2))
    binding = rewrite(gm, dataclasses.replace(SMALL, slots=3)).binding
    fakes = {wanted.field: _torch.fake_value(node) for node, wanted in zip(binding.nodes, binding.inputs)}  # noqa: B905
    assert {field: (tuple(fake.shape), fake.dtype) for field, fake in fakes.items()} == {
        "ctl": ((8,), torch.int32),
        "top_p": ((3,), torch.float32),
        "delta": ((3,), torch.float32),
        "mask": ((3, 2, 3, 65, 3), torch.int32),  # 4100 tokens: 65 blocks of 64, 3 words of 32 bits
        "anchors": ((3, 2, 3, 2, 64), torch.float32),
        "counters": ((3, 2, 3, 8), torch.int64),
    }


def test_no_state_tensor_has_a_single_element():
    gm = export(toy({"heads": 1}), tokens(65, 64))
    rewrite(gm, dataclasses.replace(SMALL, slots=1), "export")
    sizes = {name: buffer.numel() for name, buffer in gm.named_buffers() if name.startswith("haste_")}
    assert len(sizes) == 6 and min(sizes.values()) == 2


def test_exported_buffers_hold_the_thresholds_of_their_site():
    config = dataclasses.replace(SMALL, top_p=((0.5, 0.6), (0.7, 0.8)), delta=3.0)
    gm = export(toy({}, {"is_causal": True}, {}), tokens())
    rewrite(gm, config, "export")
    buffers = dict(gm.named_buffers())
    assert [name for name in buffers if name.startswith("haste_")] == NAMES
    torch.testing.assert_close(buffers["haste_0_top_p"], torch.tensor([0.5, 0.6]))
    torch.testing.assert_close(buffers["haste_1_top_p"], torch.tensor([0.7, 0.8]))
    torch.testing.assert_close(buffers["haste_1_delta"], torch.tensor([3.0, 3.0]))
    assert buffers["haste_ctl"][Ctl.EPOCH] == 1 and buffers["haste_ctl"].sum() == 1
    assert all(not buffers[name].any() for name in NAMES if name.endswith(("mask", "anchors", "counters")))


def test_a_threshold_table_of_another_shape_is_refused():
    config = dataclasses.replace(SMALL, top_p=((0.5, 0.6),))
    with pytest.raises(ThresholdError, match=r"wanted one float, or a table \[2\]\[2\]"):
        rewrite(export(toy({}, {}), tokens()), config, "export")


def test_a_graph_without_rewritten_sites_gets_no_inputs():
    gm = capture(toy({"is_causal": True}), tokens())
    before = gm.code
    binding = rewrite(gm).binding
    assert isinstance(binding, PlaceholderBinding) and binding.inputs == []
    assert gm.code == before
