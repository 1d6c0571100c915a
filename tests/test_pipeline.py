"""``optimize``: pipelines go on working, the handle tells the truth and undoes everything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch

from haste_compile import _torch, backend
from haste_compile.errors import OptionError, StateError
from haste_compile.explanation import explain
from haste_compile.pipeline import optimize
from haste_compile.state import HasteState, states_of

#: Everything is computed eagerly, so that tests need no C++ compiler runs.
OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "min_tokens": 64,
    "inner": "eager",
    "top_p": 0.5,
    "delta": 1e6,
}


@pytest.fixture
def pipe() -> Any:
    torch._dynamo.reset()
    return tiny_wan.build_pipeline()


def run(
    pipe: Any, *, seed: int = 0, steps: int = 3, frames: int = tiny_wan.FRAMES, **keywords: Any
) -> torch.Tensor:
    return pipe(
        prompt="a red circle moves left",
        num_frames=frames,
        height=tiny_wan.HEIGHT,
        width=tiny_wan.WIDTH,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **keywords,
    ).frames


def test_density_one_equals_dense(pipe: Any) -> None:
    dense = run(pipe)
    with optimize(pipe, **{**OPTIONS, "top_p": 1.0}) as handle:
        full = run(pipe)
        assert handle.statistics()["transformer"].density == 1.0
    torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", ["whole", "blocks"])
def test_dense_steps_run_the_dense_graph_where_the_pipeline_tells_the_step(
    pipe: Any, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU our op's dense step is PyTorch's attention itself, so both ways must give the same bits."""
    options = {**OPTIONS, "dense_steps": 2, "delta": 5.0}
    forward = pipe.transformer.forward
    with optimize(pipe, compile=compile, **options) as handle:
        by_op = [run(pipe, seed=seed, steps=4) for seed in (0, 1)]
        expected = handle.statistics()
    torch._dynamo.reset()
    counted: list[HasteState] = []
    count = HasteState.count_dense_call
    monkeypatch.setattr(HasteState, "count_dense_call", lambda self: (counted.append(self), count(self))[1])
    monkeypatch.setattr(backend, "needs_dense_graph", lambda _device: True)
    with optimize(pipe, compile=compile, **options) as handle:
        by_graph = [run(pipe, seed=seed, steps=4) for seed in (0, 1)]
        assert handle.statistics() == expected
    graphs = 1 if compile == "whole" else tiny_wan.LAYERS
    assert len(counted) == 2 * 2 * 2 * graphs  # videos × dense steps × branches
    assert all(torch.equal(a, b) for a, b in zip(by_op, by_graph, strict=True))
    assert pipe.transformer.forward == forward, "restore() takes the hook away"


def test_sparse_differs_and_restore_brings_dense_back(pipe: Any) -> None:
    dense = run(pipe)
    handle = optimize(pipe, **OPTIONS)
    sparse = run(pipe)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    handle.restore()
    handle.restore()
    assert torch.equal(run(pipe), dense)
    assert not _torch.is_compiled(pipe.transformer)


def test_context_manager_restores_after_an_exception(pipe: Any) -> None:
    with pytest.raises(RuntimeError, match="broken off"), optimize(pipe, **OPTIONS):
        assert _torch.is_compiled(pipe.transformer)
        raise RuntimeError("broken off")
    assert not _torch.is_compiled(pipe.transformer)


def test_statistics_and_summary(pipe: Any) -> None:
    with optimize(pipe, **OPTIONS) as handle:
        assert handle.summary() == "transformer: not called yet, nothing is compiled"
        run(pipe)
        figures = handle.statistics()["transformer"]
        assert figures.sites == ("blocks.0.attn1", "blocks.1.attn1")
        assert figures.calls == 3 * 2 * tiny_wan.LAYERS * tiny_wan.HEADS  # steps × branches × L × H
        assert figures.refreshes == 2 * tiny_wan.LAYERS * tiny_wan.HEADS  # a huge δ: the first step only
        assert 0.2 <= figures.density < 0.9
        text = handle.summary()
        assert "2 attention sites rewritten" in text
        assert "left dense 2 × cross-attention (320 queries, 512 keys)" in text
        assert "masks rebuilt in 33.3% of 24 head calls" in text
        handle.reset()
        assert handle.statistics()["transformer"].calls == 0


def test_transformers_that_share_a_graph_have_a_report_each() -> None:
    torch._dynamo.reset()
    experts = tiny_wan.build_pipeline(experts=2)
    graphs, _ = _torch.compile_counts()
    with optimize(experts, **OPTIONS) as handle:
        run(experts)
        assert _torch.compile_counts()[0] - graphs == 1
        sites = handle.sites()
        assert sites["transformer"] == sites["transformer_2"]
        kinds = [(site.name, site.kind, site.status) for site in sites["transformer"]]
        assert kinds == [
            ("blocks.0.attn1", "self", "rewritten"),
            ("blocks.0.attn2", "cross", "skipped"),
            ("blocks.1.attn1", "self", "rewritten"),
            ("blocks.1.attn2", "cross", "skipped"),
        ]
        assert handle.summary().count("2 attention sites rewritten") == 2
        assert handle.summary().count("left dense 2 × cross-attention") == 2


def test_blocks_have_a_report_each(pipe: Any) -> None:
    with optimize(pipe, compile="blocks", **OPTIONS) as handle:
        run(pipe, steps=1)
        names = [site.name for site in handle.sites()["transformer"]]
        assert names == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]
        assert "2 attention sites rewritten" in handle.summary()


def test_a_handle_tells_nothing_of_an_earlier_one(pipe: Any) -> None:
    with optimize(pipe, **OPTIONS) as earlier:
        run(pipe, steps=1)
    assert "2 attention sites rewritten" in earlier.summary()
    with optimize(pipe, **OPTIONS) as handle:
        assert handle.summary() == "transformer: not called yet, nothing is compiled"
        assert handle.statistics()["transformer"].calls == 0
        run(pipe, steps=1)
        assert "2 attention sites rewritten" in handle.summary()


def test_double_use_is_refused(pipe: Any) -> None:
    with optimize(pipe, **OPTIONS):
        for again in (pipe, pipe.transformer):
            with pytest.raises(StateError, match="compiled already"):
                optimize(again, **OPTIONS)
    optimize(pipe, **OPTIONS).restore()


def test_what_is_compiled_elsewhere_is_refused(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(StateError, match="compiled already"):
        optimize(pipe, **OPTIONS)


@pytest.mark.parametrize(
    ("target", "keywords", "message"),
    [
        ("pipe", {"topp": 0.5}, "Did you mean 'top_p'"),
        ("pipe", {"top_p": 1.5}, r"\(0, 1\]"),
        ("pipe", {"compile": "half"}, "'whole' or 'blocks'"),
        ("text", {}, "pipeline with a module `transformer`"),
        ("linear", {"compile": "blocks"}, "_repeated_blocks"),
    ],
)
def test_bad_input(pipe: Any, target: str, keywords: dict[str, Any], message: str) -> None:
    value = {"pipe": pipe, "text": "a path", "linear": torch.nn.Linear(2, 2)}[target]
    with pytest.raises(OptionError, match=message):
        optimize(value, **keywords)
    assert not _torch.is_compiled(pipe.transformer)


def test_blocks_equal_whole(pipe: Any) -> None:
    """One compiled block serves all; its masks stay apart by block, branch and step all the same."""
    with optimize(pipe, **OPTIONS) as handle:
        whole = run(pipe)
        expected = handle.statistics()["transformer"]
    torch._dynamo.reset()
    other = tiny_wan.build_pipeline()
    with optimize(other, compile="blocks", **OPTIONS) as handle:
        assert other.transformer._compiled_call_impl is None
        blocks = run(other)
        figures = handle.statistics()["transformer"]
        assert "2 attention sites rewritten" in handle.summary()
    torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-4)
    assert figures == expected
    assert all(block._compiled_call_impl is None for block in other.transformer.blocks)


def test_two_experts() -> None:
    """Wan 2.2: both transformers are compiled, and each has masks of its own."""
    torch._dynamo.reset()
    pipe = tiny_wan.build_pipeline(experts=2)
    with optimize(pipe, **OPTIONS) as handle:
        run(pipe, steps=4)
        figures = handle.statistics()
        assert handle.summary().count("2 attention sites rewritten") == 2
    assert list(figures) == ["transformer", "transformer_2"]
    heads = 2 * tiny_wan.LAYERS * tiny_wan.HEADS
    assert figures["transformer"].calls + figures["transformer_2"].calls == 4 * heads
    assert min(f.calls for f in figures.values()) >= heads
    assert all(f.refreshes == heads for f in figures.values())


def test_image_to_video() -> None:
    """Wan 2.1's form: each block has cross-attention to the text and to the image."""
    from PIL import Image

    torch._dynamo.reset()
    pipe = tiny_wan.build_image_pipeline()
    image = Image.new("RGB", (tiny_wan.WIDTH, tiny_wan.HEIGHT), "red")
    dense = run(pipe, image=image)
    said = explain(pipe, height=128, width=128, num_frames=17, **OPTIONS)["transformer"].report
    assert (len(said.rewritten), len(said.skipped)) == (2, 4)
    with optimize(pipe, **OPTIONS) as handle:
        sparse = run(pipe, image=image)
        assert "2 attention sites rewritten" in handle.summary()
        assert "left dense 2 × cross-attention (320 queries, 257 keys)" in handle.summary()
        assert handle.statistics()["transformer"].density < 0.9
    assert sparse.shape == dense.shape and not torch.allclose(sparse, dense, atol=1e-4)


def test_two_sizes_in_one_process(pipe: Any) -> None:
    with optimize(pipe, **OPTIONS):
        small, large = run(pipe, frames=9), run(pipe)
        assert torch.equal(run(pipe, frames=9), small)
        assert torch.equal(run(pipe), large)


def test_mode_reaches_the_inner_compiler(pipe: Any) -> None:
    with optimize(pipe, mode="default", **OPTIONS) as handle:
        run(pipe, steps=1)
        assert handle.statistics()["transformer"].calls > 0


@pytest.mark.parametrize("compile", ["whole", "blocks"])
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_offloading_after_optimize(pipe: Any, compile: Any, dense_steps: int) -> None:
    """accelerate's hook breaks the graph before the module's forward; the clock still sees every call."""
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    with optimize(pipe, compile=compile, dense_steps=dense_steps, **OPTIONS) as handle:
        plain = run(pipe)
        expected = handle.statistics()
        handle.reset()
        add_hook_to_module(pipe.transformer, CpuOffload(execution_device="cpu"))
        torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)
        seen = handle.statistics()
        remove_hook_from_module(pipe.transformer)
    assert seen["transformer"].refreshes == expected["transformer"].refreshes
    assert seen["transformer"].calls == expected["transformer"].calls
    assert seen["transformer"].sites == ("blocks.0.attn1", "blocks.1.attn1")


def test_sites_keep_their_names_behind_the_step_hook(pipe: Any) -> None:
    """diffusers' hooks replace ``forward`` too; threshold tables and profiles go by these names."""
    with optimize(pipe, dense_steps=1, **OPTIONS) as handle:
        run(pipe, steps=2)
        assert handle.statistics()["transformer"].sites == ("blocks.0.attn1", "blocks.1.attn1")
        names = [site.name for site in handle.sites()["transformer"]]
        assert names == ["blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2"]


@pytest.mark.parametrize("compile", ["whole", "blocks"])
def test_a_size_beyond_dynamos_limit_is_told(
    pipe: Any, compile: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(recompile_limit=1), optimize(pipe, compile=compile, **OPTIONS) as handle:
        run(pipe, steps=1)
        assert "uncompiled" not in handle.summary() + caplog.text
        run(pipe, steps=1, frames=9)
        calls = 2 * (1 if compile == "whole" else tiny_wan.LAYERS)
        assert f"dense, because Dynamo ran them uncompiled: {calls} calls" in handle.summary()
        assert caplog.text.count("Raise torch._dynamo.config.recompile_limit") == 1


def test_a_size_beyond_dynamos_limit_is_an_error_with_strict(pipe: Any) -> None:
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        optimize(pipe, strict=True, **OPTIONS),
        pytest.raises(StateError, match="Dynamo ran uncompiled.* 1 are kept"),
    ):
        run(pipe, steps=1)
        run(pipe, steps=1, frames=9)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_before_and_after(tmp_path: Path, pipe: Any) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    donor = tiny_wan.build_transformer()
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor))

    with optimize(pipe, **OPTIONS) as handle:
        plain = run(pipe)
        pipe.load_lora_weights(tmp_path)
        adapted = run(pipe)
        assert not torch.allclose(adapted, plain, atol=1e-4)
        assert all(len(report.rewritten) == tiny_wan.LAYERS for report in handle.reports()["transformer"])
        pipe.unload_lora_weights()
        torch.testing.assert_close(run(pipe), plain, rtol=1e-5, atol=1e-5)

    torch._dynamo.reset()
    other = tiny_wan.build_pipeline()
    other.load_lora_weights(tmp_path)
    with optimize(other, **OPTIONS):
        torch.testing.assert_close(run(other), adapted, rtol=1e-5, atol=1e-5)


def test_explain_says_what_optimize_then_does(pipe: Any) -> None:
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    with optimize(pipe, **OPTIONS) as handle:
        said = handle.explain(**size)["transformer"]
        run(pipe, steps=1)
        done = handle.reports()["transformer"][0]
    assert [(s.name, s.status, s.reason) for s in said.report.sites] == [
        (s.name, s.status, s.reason) for s in done.sites
    ]
    assert (said.tokens, said.blocks) == (tiny_wan.TOKENS, 5)
    (state,) = states_of(pipe.transformer)
    assert said.state_bytes == state.nbytes()


def test_explain_uses_up_none_of_dynamos_graphs(pipe: Any) -> None:
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    with torch._dynamo.config.patch(recompile_limit=1), optimize(pipe, strict=True, **OPTIONS) as handle:
        for frames in (9, tiny_wan.FRAMES):
            handle.explain(**{**size, "num_frames": frames})
        run(pipe, steps=1)
        assert "uncompiled" not in handle.summary()


def test_explain_counts_operations() -> None:
    """A forward of 320 tokens, counted by hand."""
    transformer = tiny_wan.build_transformer()
    size = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
    found = explain(transformer, **size, block_size=64, min_tokens=64)["transformer"]
    n, width, text = tiny_wan.TOKENS, tiny_wan.HEADS * tiny_wan.HEAD_DIM, 512
    attention = tiny_wan.LAYERS * 4 * n * n * width
    cross = tiny_wan.LAYERS * 4 * n * text * width
    block = 2 * n * width * (4 * width + 2 * width + 2 * 64) + 2 * text * width * 2 * width
    embedding = (
        2 * n * width * tiny_wan.LATENT_CHANNELS * 4 * 2  # patches in and out
        + 2 * text * width * (tiny_wan.TEXT_DIM + width)
        + 2 * width * (32 + width + 6 * width)  # time
    )
    assert found.attention_flops == attention
    assert found.flops == attention + cross + tiny_wan.LAYERS * block + embedding
    assert found.ceiling(1.0) == 1.0
    assert found.ceiling(0.0) == pytest.approx(1 / (1 - attention / found.flops))


def test_explain_leaves_the_transformer_as_it_was(pipe: Any) -> None:
    dense = run(pipe)
    explain(pipe, height=128, width=128, num_frames=17, block_size=64)
    assert torch.equal(run(pipe), dense)
    assert not _torch.is_compiled(pipe.transformer)
