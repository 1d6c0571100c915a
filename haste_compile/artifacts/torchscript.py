"""TorchScript: the rewritten graph as ``torch.jit.trace`` records it. Legacy: PyTorch deprecates TorchScript.

The ops stay ops, so that the artifact skips masked work as the live graph does. It runs where they are
defined, in a process with haste_compile; elsewhere ``torch.jit.load`` says "Unknown builtin op:
haste::refresh_mask_".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from haste_compile.artifacts.base import Call, Written
from haste_compile.artifacts.capture import Captured
from haste_compile.artifacts.manifest import Manifest


def write(captured: Captured, path: Path) -> Written:
    """Trace the "live" form, freeze the weights into it and save it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(captured.module("live"), captured.examples, check_trace=False)
        torch.jit.save(torch.jit.freeze(traced.eval()), str(path))
    return Written((path,))


def open_(manifest: Manifest, path: Path, device: torch.device) -> Call:
    """Load it; the state is updated in place.

    Raises:
        ArtifactVersionError: made with another torch.
    """
    manifest.require("torch", torch.__version__)
    import haste_compile.predictors  # noqa: F401  (defines the ops)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(str(path), map_location=device)

    def call(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        return module(*inputs, *state)[0], state

    return call
