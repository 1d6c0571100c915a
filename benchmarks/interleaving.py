"""Time several calls in one process so that none profits from its neighbours.

A call finds the GPU as the call before it left it: its clock, its L2, its heat. With a fixed order one
version always follows the same other one, which once flattered a version by 7 %. Rounds therefore follow a
Williams design: over one pass every call stands at every place, and directly after every other call, equally
often.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
Timer = Callable[[Call], float]


def balanced_rounds(count: int) -> list[list[int]]:
    """Orders of ``count`` calls in which each follows each other equally often (Williams 1949).

    Returns:
        ``count`` orders for an even count, twice as many for an odd one.
    """
    zigzag = [step // 2 if step % 2 == 0 else count - (step + 1) // 2 for step in range(count)]
    orders = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return orders if count % 2 == 0 else orders + [order[::-1] for order in orders]


def cuda_milliseconds(call: Call) -> float:
    """One call on the current stream, by CUDA events around it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(
    calls: Mapping[str, Call], rounds: int, *, timer: Timer = cuda_milliseconds, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of every call in at least ``rounds`` rounds, in whole balanced passes.

    Two rounds before that warm up and are not counted. ``seed`` shuffles the rounds of a pass.
    """
    names = list(calls)
    for name in names * 2:
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffler = random.Random(seed)
    done = 0
    while done < rounds:
        orders = balanced_rounds(len(names))
        shuffler.shuffle(orders)
        for order in orders:
            for index in order:
                times[names[index]].append(timer(calls[names[index]]))
        done += len(orders)
    return times


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of the ratio of two calls' times, and an interval that holds it at 95 %.

    A round is short, so what drifts over a run, heat above all, is the same for both. The interval lies
    between two of the ordered ratios: the median of what was sampled is below the k-th of n with the chance
    of fewer than k heads in n tosses. With fewer than six rounds it is all of them, at less than 95 %.
    """
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    count = len(ratios)
    chances = itertools.accumulate(math.comb(count, heads) / 2**count for heads in range(count + 1))
    first = max(sum(chance <= 0.025 for chance in chances) - 1, 0)
    return statistics.median(ratios), ratios[first], ratios[-1 - first]


def captured(call: Callable[[], torch.Tensor]) -> tuple[Call, torch.Tensor]:
    """The call as a CUDA graph: a replay costs one launch, whatever Python does in the call.

    Returns:
        the replay, and the tensor that every replay writes.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
