"""What a format of artifact has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from haste_compile.artifacts.capture import Captured
    from haste_compile.artifacts.manifest import Manifest

#: (inputs, state) -> (sample, new state); orders as in the manifest.
Call: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


@dataclasses.dataclass(frozen=True)
class Written:
    """What ``write`` made.

    Attributes:
        files: every file, the main one first; all lie in its folder.
        versions: package -> version, of whatever decides whether the files run elsewhere; torch and
            haste_compile are noted anyway.
        extra: JSON-able facts that ``open_`` needs again.
    """

    files: tuple[Path, ...]
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Format(Protocol):
    """A module that writes and opens one format; the seam is described in ``haste_compile.artifacts``."""

    def write(self, captured: Captured, path: Path) -> Written:
        """Write the artifact with ``path`` as its main file."""
        ...

    def open_(self, manifest: Manifest, path: Path, device: torch.device) -> Call:
        """Make the files that ``write`` made callable on ``device``."""
        ...


class StateInTurns:
    """Output tensors for a runtime that does not update state in place: two sets, used in turns.

    What a call has read, the next call may overwrite: by then the runner holds what came out.
    """

    def __init__(self) -> None:
        self._spare: list[Tensor] = []

    def outputs_for(self, state: Sequence[Tensor]) -> list[Tensor]:
        """Tensors for the new state of a call that reads ``state``; they share no memory with it."""
        outputs = self._spare or [torch.empty_like(x) for x in state]
        self._spare = list(state)
        return outputs
