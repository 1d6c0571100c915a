"""HASTE_DUMP=folder: what every pass did, as readable code.

Each compiled graph gets a folder of its own, ``graph_000``, ``graph_001``, …: a process compiles several
graphs (two transformers, a second resolution), and none may overwrite another.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch import fx

from haste_compile.errors import OutputPathError

VARIABLE = "HASTE_DUMP"


class GraphDump:
    """Writes graphs below ``root``, or nothing when there is no root."""

    def __init__(self, root: Path | None) -> None:
        self._folder = None if root is None else _new_folder(root)

    @classmethod
    def from_environment(cls) -> GraphDump:
        """The dump that HASTE_DUMP asks for.

        Raises:
            OutputPathError: the folder cannot be made.
        """
        value = os.environ.get(VARIABLE)
        return cls(Path(value) if value else None)

    def write(self, name: str, gm: fx.GraphModule) -> None:
        """Write ``<name>.txt``: the graph's code with shapes, strides and dtypes.

        Raises:
            OutputPathError: the file cannot be written.
        """
        if self._folder is None:
            return
        path = self._folder / f"{name}.txt"
        code = gm.print_readable(print_output=False, include_stride=True, include_device=True)
        try:
            path.write_text(code, encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error


def _new_folder(root: Path) -> Path:
    for number in itertools.count():
        folder = root / f"graph_{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if root.is_dir():
                continue
            raise _unwritable(root, NotADirectoryError("not a folder")) from None
        except OSError as error:
            raise _unwritable(root, error) from error
        return folder
    raise AssertionError("itertools.count ended")


def _unwritable(path: Path, error: OSError) -> OutputPathError:
    return OutputPathError(
        found=f"{path} ({error.strerror or error})",
        wanted="a folder that can be made and written",
        where=f"environment variable {VARIABLE}",
        fix=f"Set {VARIABLE} to another folder, or unset it.",
    )
