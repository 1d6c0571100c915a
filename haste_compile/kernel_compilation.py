"""Our kernels are compiled in Inductor's processes while Inductor works on the rest of the graph.

On a machine that has not seen them they take as long as Inductor takes for a transformer block. What they are
specialised on is known once the graph is rewritten: each op's implementation is walked with fake tensors, and
what it would launch is compiled elsewhere, into Triton's cache on disk. (Threads were not enough: a
compilation holds Python's lock for half of its time.)

Nothing depends on it: a kernel that is not there compiles at its first launch, and tells its errors there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from haste_compile import _torch
from haste_compile.kernels.launching import ON_CUDA, NotedLaunch, noted_launches
from haste_compile.passes import PassContext

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def compiling_kernels(context: PassContext) -> Iterator[None]:
    """Compile what the ops of the rewritten sites launch while the body runs, and wait for it at the end.

    Does nothing off CUDA, and where Inductor compiles nothing or is told to do so in one process.
    """
    device = context.rewritten[0].device
    pool, kernels = None, {}
    if device.type == "cuda" and context.config.inner == "inductor" and _torch.compile_processes() > 1:
        try:
            pool = _torch.compile_pool()
            _torch.name_triton_cache(device)
            kernels = _launches_by_kernel(context)
        except Exception as error:
            logger.debug("haste: kernels compile at their first launch: %r", error)
    if not kernels:
        yield
        return
    with ThreadPoolExecutor(len(kernels), "haste-kernels") as threads:
        # What takes longest comes first: attention, the last launch.
        for launches in reversed(kernels.values()):
            threads.submit(_have, launches, pool, device)
        yield


def _launches_by_kernel(context: PassContext) -> dict[Any, list[NotedLaunch]]:
    """All launches of the sites' ops; of ops called alike only once."""
    nodes = [node for site in context.rewritten for node in site.inserted if node.target in ON_CUDA]
    with noted_launches() as launches:
        for call in dict.fromkeys(map(_torch.OutlinedCall.of, nodes)):
            call.run(ON_CUDA[call.target])
    found: dict[Any, list[NotedLaunch]] = {}
    for launch in launches:
        found.setdefault(launch.kernel, []).append(launch)
    return found


def _have(launches: list[NotedLaunch], pool: Any, device: torch.device) -> None:
    """Have a kernel on the device, compiled in another process unless the disk has it."""
    from haste_compile.kernels import ahead  # needs Triton

    try:
        with torch.cuda.device(device):
            for launch in launches:
                compilation = ahead.put_off(launch)
                if compilation is not None:
                    if not compilation.on_disk:
                        pool.submit(ahead.compile_order, compilation.order).result()
                    compilation.load()
    except Exception as error:
        logger.debug("haste: %s compiles at its first launch: %r", launches[0].kernel, error)
