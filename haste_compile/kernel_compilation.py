"""Our kernels are compiled in Inductor's processes while Inductor works on the rest of the graph.

Ten kernels take a machine that has not seen them as long as Inductor takes for a transformer block. What they
are specialised on is known once the graph is rewritten: each op's implementation is walked with fake tensors,
and what it would launch is compiled elsewhere, into Triton's cache on disk. (Threads were not enough: a
compilation holds Python's lock for half of its time.)

Nothing depends on it: a kernel that is not there compiles at its first launch, and tells its errors there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from haste_compile import _torch
from haste_compile.kernels.launching import ON_CUDA, NotedLaunch, noted_launches
from haste_compile.passes import PassContext

if TYPE_CHECKING:
    from haste_compile.kernels.ahead import Compilation

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling_kernels(context: PassContext) -> Iterator[None]:
    """Compile what the ops of the rewritten sites launch while the body runs, and wait for it at the end.

    Does nothing off CUDA, and where Inductor compiles nothing or is told to do so in one process.
    """
    device = context.rewritten[0].device
    wanted: list[Compilation] = []
    if device.type == "cuda" and context.config.inner == "inductor" and _torch.compile_processes() > 1:
        try:
            wanted = _put_off(_launches(context), device)
        except Exception as error:
            logger.debug("haste: kernels compile at their first launch: %r", error)
    if not wanted:
        yield
        return
    with ThreadPoolExecutor(len(wanted), "haste-kernels") as threads:
        for compilation in wanted:
            threads.submit(_load, compilation, device)
        yield


def _launches(context: PassContext) -> list[NotedLaunch]:
    """All launches of the sites' ops; of ops called alike only once."""
    nodes = [node for site in context.rewritten for node in site.inserted if node.target in ON_CUDA]
    with noted_launches() as launches:
        for call in dict.fromkeys(map(_torch.OutlinedCall.of, nodes)):
            call.run(ON_CUDA[call.target])
    return launches


def _put_off(launches: list[NotedLaunch], device: torch.device) -> list[Compilation]:
    """What this process has not compiled yet. What takes longest comes first: attention, the last launch."""
    from haste_compile.kernels.ahead import put_off  # needs Triton

    _torch.name_triton_cache(device)
    with torch.cuda.device(device):
        found = [put_off(launch) for launch in reversed(launches)]
    return list({compilation.order: compilation for compilation in found if compilation}.values())


def _load(compilation: Compilation, device: torch.device) -> None:
    """Have the kernel compiled in another process, unless the disk has it, and load it."""
    from haste_compile.kernels.ahead import compile_order

    try:
        if not compilation.on_disk:
            _torch.compile_elsewhere(compile_order, compilation.order).result()
        with torch.cuda.device(device):
            compilation.load()
    except Exception as error:
        logger.debug("haste: %s compiles at its first launch: %r", compilation.order.name, error)
