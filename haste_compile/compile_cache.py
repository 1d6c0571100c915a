"""Warm start: what one process compiled, the next one takes from a folder.

Inductor and Triton keep what they compile on disk anyway, in folders of their own below /tmp, and a graph
with haste's ops is cached like any other: the ops are opaque calls in it, masks and thresholds its inputs.
This module puts it all into a folder that lasts, and counts whether it served. (PyTorch's
``save_cache_artifacts`` is left alone: it does not pack the C++ kernels of a CPU.)
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from haste_compile import _torch
from haste_compile.errors import OptionError, OutputPathError


@dataclasses.dataclass(frozen=True)
class CacheCounts:
    """Graphs that this process took from the folder, compiled anew, and could not cache."""

    hits: int
    misses: int
    bypassed: int


def warm_start(folder: str | Path) -> Path:
    """Keep compiled graphs and kernels in ``folder`` from now on, and use what is there.

    Call it before anything is compiled. Every later ``torch.compile`` of this process and its children uses
    the folder, not only haste's. Keep it where nobody else can write: what lies there is run.

    Returns:
        The folder, absolute; it is made if it is not there.

    Raises:
        OutputPathError: the folder cannot be made or written.
        OptionError: caching is switched off in torch's own settings.
    """
    folder = Path(folder).absolute()
    if not _torch.caches_graphs():
        raise OptionError(
            found="torch's graph cache switched off",
            wanted="fx_graph_cache on and force_disable_caches off in torch._inductor.config",
            where="warm_start()",
            fix="Unset TORCHINDUCTOR_FX_GRAPH_CACHE and TORCHINDUCTOR_FORCE_DISABLE_CACHES.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "a folder that cannot be written")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


def cache_counts() -> CacheCounts:
    """How the graph cache served this process so far."""
    return CacheCounts(*_torch.graph_cache_counts())


def _unwritable(folder: Path, found: str) -> OutputPathError:
    return OutputPathError(
        found=found, wanted="a folder that can be written", where=str(folder), fix="Choose another folder."
    )
