"""Which CFG branch, denoising step and video a transformer call belongs to, decided on the device.

A compiled transformer sees no loop: it is called with latents, a timestep and text embeddings, once for each
CFG branch and step, for one video after another and perhaps for several in turn. The clock recognises the
branch from those three tensors alone, so it needs no hook, no order of calls and no host read (ours). A slot
remembers, of the last call it served, a fingerprint of the text, the timestep and a sample of the latents. A
call continues a slot when

* its text has the slot's fingerprint, and
* its timestep is lower than the slot's, and
* its latents still point the slot's way (cosine above ``CONTINUITY`` in every batch sample), as one solver
  step leaves them and as another seed's noise never does;

if several slots qualify, the one with the nearest latents. Every other call starts a new video in the slot
that was used longest ago, and all masks there count as absent. So an interrupted run, a changed prompt,
another size, guidance switched off or a third branch ends in a rebuild, never in a stale mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from haste_compile.kernels.layout import CTL_COLUMNS, Ctl

#: Least cosine between the latents of consecutive steps of one video. One Euler step from pure noise to the
#: half-way point of flow matching gives 0.71 on unit-variance data; unrelated noise 0 ± 0.06 on 256 samples.
CONTINUITY = 0.5
_SAMPLES = 256
_PROJECTIONS = 8


class Clock(nn.Module):
    """The clock of one transformer instance; ``ctl`` is what the ops read.

    Args:
        slots: how many branches are remembered (two for one video with guidance).
        dense_steps: steps at the start of each video for which ``ctl`` asks for dense attention.
        rebuild_steps: steps at the start of each video in which every mask is rebuilt.
        device: where the transformer runs.

    Attributes:
        ctl: int32 [8]; columns ``haste_compile.kernels.layout.Ctl``. Its address never changes.
    """

    ctl: Tensor

    def __init__(
        self, *, slots: int, device: torch.device, dense_steps: int = 0, rebuild_steps: int = 0
    ) -> None:
        super().__init__()
        self.slots, self.dense_steps, self.rebuild_steps = slots, dense_steps, rebuild_steps
        with torch.inference_mode(False):
            ctl = torch.zeros(CTL_COLUMNS, dtype=torch.int32, device=device)
            self.register_buffer("ctl", ctl, persistent=False)
            # Counts calls for the clock's whole life, so that a call's number can serve as the epoch of the
            # video that it starts. It begins at 1: epoch 1 is that of untracked calls.
            self._calls = torch.ones(1, dtype=torch.int64, device=device)
        self._memory: _Memory | None = None
        self.untracked()

    def reset(self) -> None:
        """Forget every video: the next call of each branch rebuilds its masks."""
        self.untracked()
        self._memory = None

    def untracked(self) -> None:
        """Make ``ctl`` stand for a call of which nothing is known: slot 0, every mask is rebuilt."""
        row = [0] * CTL_COLUMNS
        row[Ctl.SLOT], row[Ctl.EPOCH], row[Ctl.FORCE] = 0, 1, 1
        self.ctl.copy_(torch.tensor(row, dtype=torch.int32), non_blocking=True)

    @torch.no_grad()
    def tick(self, latents: Tensor, timestep: Tensor, text: Tensor) -> None:
        """Recognise the call and write ``ctl``; launches device work only, reads nothing back.

        Args:
            latents: [B, ...], the transformer's ``hidden_states``.
            timestep: any shape; the largest value counts (image-to-video gives clean frames a zero).
            text: [B, L, C], the transformer's ``encoder_hidden_states``.
        """
        # Tensors made under inference mode could not be updated outside of it.
        with torch.inference_mode(False):
            memory = self._memory
            if memory is None or not memory.fits(latents):
                memory = self._memory = _Memory(self.slots, latents, self.ctl.device)
            self._calls += 1
            slot, epoch, step = memory.advance(self._calls, latents, timestep, text)
            dense = (step < self.dense_steps).to(torch.int32)
            zero = torch.zeros_like(dense)
            row = [zero] * CTL_COLUMNS
            row[Ctl.SLOT], row[Ctl.EPOCH], row[Ctl.STEP], row[Ctl.DENSE] = slot, epoch, step, dense
            row[Ctl.FORCE] = (step < self.rebuild_steps).to(torch.int32)
            self.ctl.copy_(torch.cat(row))


class _Memory:
    """What every slot remembers; all tensors have a leading slot axis and stay on the device."""

    def __init__(self, slots: int, latents: Tensor, device: torch.device) -> None:
        batch, features = latents.shape[0], latents[0].numel()
        self.shape, self.device = latents.shape, device
        count = min(_SAMPLES, features)
        self.where = torch.linspace(0, features - 1, count, dtype=torch.float64).long().to(device)
        self.weights: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self.text = torch.zeros(slots, batch, _PROJECTIONS, device=device)
        self.latents = torch.zeros(slots, batch, count, device=device)
        self.timestep = torch.zeros(slots, device=device)
        self.step = torch.zeros(slots, dtype=torch.int32, device=device)
        self.epoch = torch.zeros(slots, dtype=torch.int32, device=device)
        # Call number of the last use; 0: never.
        self.used = torch.zeros(slots, dtype=torch.int64, device=device)

    def fits(self, latents: Tensor) -> bool:
        return self.shape == latents.shape

    def fingerprint(self, text: Tensor) -> Tensor:
        """[B, P]: fixed random projections of [B, L, C]; equal text gives equal bits."""
        shape = text.shape[1:]
        if shape not in self.weights:
            generator = torch.Generator().manual_seed(0)
            self.weights[shape] = (
                torch.randn(shape[0], 1, generator=generator).to(self.device),
                torch.randn(shape[1], _PROJECTIONS, generator=generator).to(self.device),
            )
        by_token, by_channel = self.weights[shape]
        return (text.float() * by_token).sum(1) @ by_channel

    def advance(
        self, call: Tensor, latents: Tensor, timestep: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The slot, epoch and step of call number ``call``, int32 [1] each; the slot now remembers it."""
        now = timestep.float().amax()
        fingerprint = self.fingerprint(text)
        sample = latents.flatten(1).index_select(1, self.where).float()

        cosine = torch.cosine_similarity(self.latents, sample, dim=-1).amin(1)
        known = (self.used > 0) & (self.text == fingerprint).flatten(1).all(1)
        continues = known & (now < self.timestep) & (cosine > CONTINUITY)
        nearest = torch.where(continues, cosine, -torch.inf).argmax()
        found = continues.any()
        slot = torch.where(found, nearest, self.used.argmin()).reshape(1)

        step = torch.where(found, self.step.index_select(0, slot) + 1, 0).to(torch.int32)
        epoch = torch.where(found, self.epoch.index_select(0, slot), call.to(torch.int32))
        for remembered, value in (
            (self.text, fingerprint.unsqueeze(0)),
            (self.latents, sample.unsqueeze(0)),
            (self.timestep, now.reshape(1)),
            (self.step, step),
            (self.epoch, epoch),
            (self.used, call),
        ):
            remembered.index_copy_(0, slot, value)
        return slot.to(torch.int32), epoch, step
