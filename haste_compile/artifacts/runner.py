"""Run an artifact in place of the transformer that it was exported from."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from haste_compile.artifacts.base import Call
from haste_compile.artifacts.manifest import Manifest
from haste_compile.errors import DeviceError, InputError
from haste_compile.state import CLOCK_INPUTS, HasteState, Statistics, clock_for, statistics_of


class Runner(nn.Module):
    """An artifact with the call signature of a Wan transformer, for use as ``pipe.transformer``.

    It owns the mask state and the clock, which recognises guidance branches, steps and videos as in a live
    graph: an artifact is told neither and needs no reset between videos. One runner serves one size, one
    call at a time.

    Attributes:
        manifest: what the artifact is.
        config: the transformer's config, read by pipelines.
        state: masks, anchors and counters, shaped as in ``haste_compile.kernels.ops``.
    """

    def __init__(self, manifest: Manifest, call: Call, device: torch.device) -> None:
        super().__init__()
        self.manifest, self.device, self._call = manifest, device, call
        self.config = types.SimpleNamespace(**manifest.transformer["config"])
        specs, options = manifest.specs(device), manifest.config
        self.state = HasteState(
            specs, options, clock=clock_for(options, device), rows=(range(len(specs)), len(specs))
        )
        # "haste_0_mask" -> (0, "mask")
        self._fields = [(int(i), field) for _, i, field in (s.name.split("_", 2) for s in manifest.state)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents and text embeddings that a call takes."""
        return self.manifest.inputs[0].torch_dtype

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """As ``WanTransformer3DModel.forward``.

        Raises:
            ArtifactSizeError: another video size, batch or text length than the artifact's.
            InputError: a wrong dtype or device, an image too many or missing, or attention_kwargs, whose
                effects (such as LoRA scales) an artifact has baked in.
        """
        tensors = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_image": encoder_hidden_states_image,
        }
        self._check(tensors, attention_kwargs)
        clock = self.state.clock
        clock.tick(*(tensors[name] for name in CLOCK_INPUTS))  # type: ignore[arg-type]
        tensors["haste_ctl"] = clock.ctl
        inputs = [tensors[x.name].to(x.torch_dtype).contiguous() for x in self.manifest.inputs]  # type: ignore[union-attr]
        state = [self.state.tensor(site, field) for site, field in self._fields]
        sample, updated = self._call(inputs, state)
        for (site, field), old, new in zip(self._fields, state, updated, strict=True):
            if new is not old:
                self.state.replace(site, field, new)
        if self.state.config.stats:
            self.state.record()
        return _as_output(sample) if return_dict else (sample,)

    def cache_context(self, name: str, *_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        """Pipelines enter this around every call; the clock needs no such hint."""
        return contextlib.nullcontext()

    def statistics(self) -> Statistics:
        """Density and refresh rate in the videos still remembered. Reads the device."""
        return statistics_of([self.state])

    def reset(self) -> None:
        """Forget every mask. Not needed between videos: they are told apart without help."""
        self.state.reset()

    def extra_repr(self) -> str:
        return f"{self.manifest.format}, {self.manifest.size}, {self.device}"

    def _check(self, tensors: dict[str, Tensor | None], attention_kwargs: dict[str, Any] | None) -> None:
        if attention_kwargs:
            raise _bad("attention_kwargs", repr(attention_kwargs), "none: what they do is baked in")
        wanted = {layout.name: layout for layout in self.manifest.inputs}
        for name, tensor in tensors.items():
            if (tensor is not None) != (name in wanted):
                found = "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
                raise _bad(name, found, "a tensor" if tensor is None else "none, as when it was exported")
            if tensor is None:
                continue
            # Schedulers give timesteps as integers or floats, and both name the same step.
            if name != "timestep" and tensor.dtype != wanted[name].torch_dtype:
                raise _bad(name, str(tensor.dtype), str(wanted[name].torch_dtype))
            if tensor.device.type != self.device.type:
                raise _bad(name, f"a tensor on {tensor.device}", f"one on {self.device}")
        self.manifest.check_call({name: x for name, x in tensors.items() if x is not None})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Runner:
        """Refuse to be moved; conversions to another dtype pass it by, since its dtype is baked in."""
        moved = fn(torch.empty(1, device=self.device)).device
        if moved != torch.empty(1, device=self.device).device:
            raise DeviceError(
                found=f"a move to {moved}",
                wanted=f"{self.device}",
                where=f"a {self.manifest.format} artifact",
                fix="Load it for the device that it should run on.",
            )
        return self


def _as_output(sample: Tensor) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _bad(where: str, found: str, wanted: str) -> InputError:
    return InputError(
        found=found, wanted=wanted, where=f"{where} of an artifact's call", fix="Call it as it was exported."
    )
