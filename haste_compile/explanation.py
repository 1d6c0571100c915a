"""``explain``: what the passes would make of a transformer, before anything is compiled or computed."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.config import HasteConfig
from haste_compile.loading import find_transformers
from haste_compile.passes import check_eligibility, find_attention_sites, permute_tokens
from haste_compile.passes.base import PassContext, PlaceholderBinding
from haste_compile.report import GraphReport
from haste_compile.token_order import ORDER_FIELDS, Grid

#: Pixels and frames for one latent position of Wan 2.1's VAE, used where no VAE is at hand.
VAE_SCALES = (4, 8)
#: Length of the text that Wan pipelines pad prompts to, and of the CLIP image embedding of image-to-video.
TEXT_TOKENS, IMAGE_TOKENS = 512, 257


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What one transformer would become.

    Attributes:
        report: every attention site and its fate; "rewritten" means that it would be.
        tokens: video tokens N of a rewritten site; 0 if none is rewritten.
        blocks, key_blocks: rows and columns of a mask.
        grid: [T, H, W] of the tokens where they are put in another order than raster; else None.
        state_bytes: memory of thresholds, masks and all else that is kept from call to call.
        flops: floating-point operations of one forward, matrix products and convolutions only.
        attention_flops: the part of ``flops`` in the sites that would be rewritten.
    """

    report: GraphReport
    tokens: int
    blocks: int
    key_blocks: int
    grid: Grid | None
    state_bytes: int
    flops: int
    attention_flops: int

    @property
    def attention_share(self) -> float:
        return self.attention_flops / self.flops if self.flops else 0.0

    def ceiling(self, density: float) -> float:
        """Amdahl's bound on the speed-up of one forward when a share ``density`` of attention is left.

        It counts matrix products only, so that normalisation, rotary embedding and the predictor, which take
        time too, put the real figure below it.
        """
        return 1.0 / (1.0 - self.attention_share * (1.0 - density))

    def to_dict(self) -> dict[str, Any]:
        return {
            "report": self.report.to_dict(),
            "tokens": self.tokens,
            "blocks": self.blocks,
            "key_blocks": self.key_blocks,
            "state_bytes": self.state_bytes,
            "flops": self.flops,
            "attention_share": self.attention_share,
            "ceiling": {str(density): self.ceiling(density) for density in (0.5, 0.25, 0.0)},
        }

    def __str__(self) -> str:
        ceilings = ", ".join(f"{self.ceiling(rest):.2f}× at density {rest:g}" for rest in (0.5, 0.25, 0.0))
        square = self.blocks == self.key_blocks
        blocks = f"{self.blocks:,}" if square else f"{self.blocks:,} × {self.key_blocks:,}"
        memory = f"{self.state_bytes / 2**20:.1f} MiB"
        return "\n".join(
            [
                str(self.report),
                f"tokens {self.tokens:,} in {blocks} blocks; mask state {memory}",
                f"{self.flops / 1e12:.3g} TFLOP a forward, {self.attention_share:.0%} of it in these sites: "
                f"at most {ceilings}",
            ]
        )


def explain(
    pipe_or_transformer: Any,
    *,
    height: int,
    width: int,
    num_frames: int,
    device: torch.device | str | None = None,
    **options: Any,
) -> dict[str, Explanation]:
    """Trace the transformers for a video of that size and tell every attention site's fate.

    The graph is traced with the real module, LoRA and fused projections included, and never run. A module on
    the meta device needs no weights.

    Args:
        pipe_or_transformer: as for ``optimize``.
        height, width, num_frames: of the video, in pixels and frames.
        device: the device it would run on; by default the module's own. Needed on the meta device.
        options: fields of ``HasteConfig``.

    Returns:
        component name -> explanation.

    Raises:
        OptionError: bad options, or no transformer in the argument.
        NoAttentionSitesError: the traced graph has no attention that a pass can see.
        UnsupportedSiteError: ``strict`` and a self-attention site would be skipped.
        TokenOrderError: ``strict`` and the tokens would stay in raster order unasked.
    """
    config = HasteConfig.from_options(options)
    scales = (
        getattr(pipe_or_transformer, "vae_scale_factor_temporal", VAE_SCALES[0]),
        getattr(pipe_or_transformer, "vae_scale_factor_spatial", VAE_SCALES[1]),
    )
    latent_size = ((num_frames - 1) // scales[0] + 1, height // scales[1], width // scales[1])
    return {
        name: _explain(transformer, latent_size, config, device)
        for name, transformer in find_transformers(pipe_or_transformer).items()
    }


def _explain(
    transformer: nn.Module,
    latent_size: tuple[int, int, int],
    config: HasteConfig,
    device: torch.device | str | None,
) -> Explanation:
    graph = trace(transformer, example_inputs(transformer, latent_size))
    if device is not None:
        _move_fakes(graph, torch.device(device))
    context = PassContext(config=config, dialect="dynamo", binding=PlaceholderBinding())
    find_attention_sites(graph, context)
    check_eligibility(graph, context)
    permute_tokens(graph, context)
    eligible = [site for site in context.sites if site.status == "eligible"]
    tensors = {
        (None if field == "ctl" else site.index, field): layout
        for site in eligible
        for field, layout in context.layouts(site).items()
    }
    if context.order.gathers:
        tensors.update({(None, field): context.layout(eligible[0], field) for field in ORDER_FIELDS})
    tokens = max((int(site.shape[2]) for site in eligible), default=0)
    blocks, key_blocks = map(int, context.predictor.blocks(tokens, config))
    return Explanation(
        report=_in_prospect(GraphReport.from_context(context)),
        tokens=tokens,
        blocks=blocks,
        key_blocks=key_blocks,
        grid=context.order.grid,
        state_bytes=sum(math.prod(map(int, shape)) * dtype.itemsize for shape, dtype in tensors.values()),
        flops=sum(_flops(node) for node in graph.graph.nodes),
        attention_flops=sum(_flops(site.node) for site in eligible),
    )


def _in_prospect(report: GraphReport) -> GraphReport:
    prospect = {"eligible": "rewritten", "skipped": "skipped"}
    sites = tuple(dataclasses.replace(site, status=prospect[site.status]) for site in report.sites)
    return dataclasses.replace(report, sites=sites)


def example_inputs(
    transformer: nn.Module,
    latent_size: tuple[int, int, int],
    *,
    batch: int = 1,
    text_tokens: int = TEXT_TOKENS,
) -> dict[str, Any]:
    """Keyword arguments of one call of a Wan transformer, zeros, for latents of [frames, height, width]."""
    config: Any = transformer.config
    device = next(transformer.parameters()).device
    make = {"device": device, "dtype": transformer.dtype}  # diffusers' dtype passes over float32 norms
    inputs: dict[str, Any] = {
        "hidden_states": torch.zeros(batch, config.in_channels, *latent_size, **make),
        "timestep": torch.zeros(batch, device=device),
        "encoder_hidden_states": torch.zeros(batch, text_tokens, config.text_dim, **make),
        "return_dict": False,
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.zeros(batch, IMAGE_TOKENS, config.image_dim, **make)
    return inputs


def trace(transformer: nn.Module, inputs: dict[str, Any]) -> fx.GraphModule:
    """The Dynamo graph of one call; nothing is computed and the transformer stays as it is."""
    captured: list[fx.GraphModule] = []

    def capture(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append(_torch.copy_graph(gm))
        output = next(node for node in gm.graph.nodes if node.op == "output")
        fakes = [_torch.fake_value(node) for node in output.args[0]]
        return lambda *_args: tuple(torch.zeros(f.shape, dtype=f.dtype, device=f.device) for f in fakes)

    def call(**keywords: Any) -> Any:
        return transformer.forward(**keywords)

    # Dynamo keeps a few graphs for each code object. A code object of its own leaves the transformer's alone.
    own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    with torch.no_grad():
        torch.compile(own, backend=capture, fullgraph=True, dynamic=False)(**inputs)
    return captured[0]


def _move_fakes(graph: fx.GraphModule, device: torch.device) -> None:
    """Let every traced tensor stand for one on ``device``, which need not exist here."""
    for node in graph.graph.nodes:
        fake = node.meta.get("example_value")
        if isinstance(fake, Tensor):
            with fake.fake_mode:  # type: ignore[attr-defined]
                moved = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)
            _torch.set_fake_value(node, moved, "dynamo")


def _flops(node: fx.Node) -> int:
    """Two for each multiply-add of a matrix product, convolution or attention; nothing for the rest."""
    call = _torch.attention_call(node)
    if call is not None:
        query, key, value = (_torch.fake_value(n) for n in (call.query, call.key, call.value))
        return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if node.target in (F.linear, torch.conv3d):
        weight = _torch.fake_value(node.all_input_nodes[1])
        output = _torch.fake_value(node)
        return 2 * output.numel() * math.prod(weight.shape[1:])
    return 0
