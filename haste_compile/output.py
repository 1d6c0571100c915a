"""Output files that appear whole or not at all: checked before the work, written aside, moved at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haste_compile.errors import OutputPathError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files move into ``folder`` when the block ends without an error.

    Files of the same name are replaced, others in ``folder`` stay. After an error nothing has changed.

    Raises:
        OutputPathError: ``folder`` cannot be written; raised before the block runs.
    """
    if folder.exists() and not folder.is_dir():
        raise _unwritable(folder, "a file", "a folder, or a path that does not exist yet")
    with _aside(folder) as aside:
        yield aside
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(aside.iterdir()):
            os.replace(path, folder / path.name)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there becomes ``path`` when the block ends without an error.

    Raises:
        OutputPathError: ``path`` cannot be written; raised before the block runs.
    """
    if path.is_dir():
        raise _unwritable(path, "a folder", "the path of a file")
    with _aside(path.parent) as aside:
        yield aside / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside / path.name, path)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the file system of ``folder``: in it, or in its nearest parent that exists."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        aside = Path(tempfile.mkdtemp(prefix=".haste-", dir=nearest))
    except OSError as error:
        raise _unwritable(folder, f"{error.strerror} at {nearest}", "a writable place") from error
    try:
        yield aside
    finally:
        shutil.rmtree(aside)


def _unwritable(path: Path, found: str, wanted: str) -> OutputPathError:
    return OutputPathError(found=found, wanted=wanted, where=str(path), fix="Give another path with --out.")
