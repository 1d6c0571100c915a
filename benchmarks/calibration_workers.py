"""Processes that share a study's work: each holds a pipeline and does one thing after another.

A task is the name of a ``Bench`` method and its arguments; a free worker takes the next. What a task gives
depends on its arguments alone, so the number of workers changes no result. After a failure a worker begins
anew in a fresh process, since a GPU's context may be beyond use; the task's future holds the error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.calibration_bench import Bench

_Task = tuple[str, tuple[Any, ...], dict[str, Any], "Future[Any]"]


class Workers:
    """Where tasks are done: in processes, or one after another in this process.

    Args:
        args: the script's arguments, for every process's ``Bench``.
        folder: that all share.
        devices: of each process, such as ["cuda:0", "cuda:0", "cuda:1"]; None: no other process.
        deadline: ``time.monotonic()`` after which no task is begun.

    Attributes:
        deadline: may be put off.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        devices: Sequence[str] | None,
        deadline: float = float("inf"),
    ) -> None:
        self._args, self._folder, self.deadline = args, folder, deadline
        self.count = 1 if devices is None else len(devices)
        self.bench = Bench(args, None, folder) if devices is None else None
        self._tasks: queue.Queue[_Task | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._serve, args=(device,)) for device in devices or ()]
        self._chains = concurrent.futures.ThreadPoolExecutor(64)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chains.shutdown(cancel_futures=True)
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        """Have a worker call a method of its ``Bench``."""
        future: Future[Any] = Future()
        if self.bench is None:
            self._tasks.put((method, args, keywords, future))
        else:
            self._do(lambda: getattr(self.bench, method)(*args, **keywords), future)
        return future

    def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        """``submit``, and wait for the result."""
        return self.submit(method, *args, **keywords).result()

    def chain(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run a function that waits for tasks beside others of its kind; with no other process, at once."""
        if self.bench is None:
            return self._chains.submit(function, *args)
        future: Future[Any] = Future()
        self._do(lambda: function(*args), future)
        return future

    def _do(self, work: Callable[[], Any], future: Future[Any]) -> bool:
        """Give a future its result or its error; False if it was an error."""
        try:
            if time.monotonic() > self.deadline:
                raise TimeoutError("not begun: the time was up")
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
            return isinstance(error, TimeoutError)
        return True

    def _serve(self, device: str) -> None:
        process = self._process(device)
        while (task := self._tasks.get()) is not None:
            method, args, keywords, future = task
            begin = functools.partial(process.submit, _call, method, args, keywords)
            if not self._do(lambda begin=begin: begin().result(), future):  # type: ignore[misc]
                process.shutdown(wait=False, cancel_futures=True)
                process = self._process(device)
        process.shutdown()

    def _process(self, device: str) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._args, device, self._folder),
        )


_bench: Bench | None = None  # of a worker process


def _begin(args: argparse.Namespace, device: str, folder: Path) -> None:
    global _bench
    # Many processes share the cores; without this each starts a thread for every one of them.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // args.workers)))
    _bench = Bench(args, device, folder)


def _call(method: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if _bench is None:
        raise RuntimeError("a worker that was not begun")
    return getattr(_bench, method)(*args, **keywords)
