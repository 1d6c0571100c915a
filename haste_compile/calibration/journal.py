"""Work done so far, on disk: one file for every unit, written whole or not at all.

A calibration that is killed at any moment goes on where it stopped: what is stored is not computed again,
what is missing is computed from the same draws. Ranks of one calibration share the folder, which is how
their results meet.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from haste_compile.errors import OutputPathError, ProfileError
from haste_compile.loading import import_optional

logger = logging.getLogger(__name__)

_PLAN = "plan.json"


class Journal:
    """A folder of finished units.

    Args:
        folder: made if it is not there.
        plan: what the calibration will do, plain data; a journal of another plan is not continued.

    Raises:
        ProfileError: the folder holds the journal of another plan.
        OutputPathError: the folder cannot be written.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self._safetensors = import_optional("safetensors.torch", extra="calibrate")
        text = json.dumps(plan, indent=1, sort_keys=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / _PLAN).exists():
                write_atomically(folder / _PLAN, text.encode())
            found = (folder / _PLAN).read_text(encoding="utf-8")
        except OSError as error:
            raise OutputPathError(
                found=str(error.strerror),
                wanted="a folder that can be written",
                where=str(folder),
                fix="Give another path with --out.",
            ) from error
        if found != text:
            raise ProfileError(
                found="the journal of a calibration with other settings, prompts, weights or versions",
                wanted="this calibration's, or none",
                where=str(folder),
                fix="Repeat the earlier command to go on with it, or remove the folder to start anew.",
            )

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store a unit's tensors; after this returns they survive a crash."""
        write_atomically(self._path(name), self._safetensors.save(tensors))

    def read(self, name: str) -> dict[str, Tensor]:
        """A stored unit's tensors.

        Raises:
            ProfileError: the file is damaged.
        """
        try:
            return self._safetensors.load(self._path(name).read_bytes())
        except Exception as error:
            raise ProfileError(
                found=f"a damaged file ({error})",
                wanted="a unit as it was stored",
                where=str(self._path(name)),
                fix="Remove the file; the unit is then computed again.",
            ) from error

    def remove(self) -> None:
        """Delete the folder: the calibration is done."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, also when the machine loses power."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
