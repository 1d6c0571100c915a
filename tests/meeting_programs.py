"""Run a cooperative kernel in Triton's interpreter with several programs, which really take turns.

The interpreter runs programs one after the other, so the first that waits for another would wait for ever.
Here each has a thread of its own, of which one runs at a time: until it comes to a meeting, or, every other
time, has drawn an item of work; the others then draw theirs before it does anything.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import triton.language as tl  # noqa: F401  (the interpreter patches it where it finds it)
from triton.runtime import interpreter


class Programs:
    """Makes a kernel of ``module`` run with several programs that wait in ``_meet``.

    Attributes:
        meetings: how many there were in the last launch.
        launches: of any kernel, so far.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        module: Any,
        kernel: str,
        count: int,
        skipped: Sequence[int] = (),
    ):
        """``skipped``: meetings at which nobody waits, to see that it matters."""
        self.meetings = self.launches = 0
        self._count, self._skipped = count, skipped
        whole = getattr(module, kernel)
        self._program = whole.rewrite()

        @functools.wraps(self._program)
        def first_runs_all(*args: Any, **kwargs: Any) -> None:
            if interpreter.interpreter_builder.grid_idx[0] == 0:
                self._run(*args, **kwargs)

        first_runs_all.__signature__ = inspect.signature(self._program)  # type: ignore[attr-defined]
        monkeypatch.setattr(whole, "rewrite", lambda: first_runs_all)
        monkeypatch.setattr(module, "_programs", lambda *_: count)
        monkeypatch.setattr(module, "_meet", self._meet)
        self._drawn = module._draw
        monkeypatch.setattr(module, "_draw", self._draw)
        call = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.launches += 1
            call(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def _meet(self, _progress: Any, meeting: Any) -> None:
        me = int(threading.current_thread().name)
        self._met[me] += 1
        assert meeting == self._met[me], "a program waits for more or for fewer than will come"
        if self._met[me] not in self._skipped:
            self._pause(me)

    def _draw(self, deals: Any) -> Any:
        me = int(threading.current_thread().name)
        item = self._drawn(deals)
        if self._chance.random() < 0.5:
            self._drawing.add(me)
            self._pause(me)
            self._drawing.remove(me)
        return item

    def _pause(self, me: int) -> None:
        self._back.release()
        self._go[me].acquire()
        interpreter.interpreter_builder.set_grid_idx(me, 0, 0)

    def _run(self, *args: Any, **kwargs: Any) -> None:
        self._go = [threading.Semaphore(0) for _ in range(self._count)]
        self._back = threading.Semaphore(0)
        self._met = [0] * self._count
        self._drawing: set[int] = set()
        self._chance = random.Random(0)
        running = set(range(self._count))
        errors: list[BaseException] = []

        def one(me: int) -> None:
            self._go[me].acquire()
            interpreter.interpreter_builder.set_grid_idx(me, 0, 0)
            try:
                self._program(*args, **kwargs)
            except BaseException as error:
                errors.append(error)
            running.remove(me)
            self._back.release()

        threads = [
            threading.Thread(target=one, args=(me,), name=str(me), daemon=True) for me in range(self._count)
        ]
        for thread in threads:
            thread.start()
        self.meetings, forth = 0, True
        while running:
            coming = set(running)
            while coming:
                for me in sorted(coming, reverse=not forth):  # whoever comes first must make no difference
                    self._go[me].release()
                    self._back.acquire()
                    if me not in self._drawing:
                        coming.remove(me)
                if errors:
                    raise errors[0]
            assert len(running) in (0, self._count), "some left while others wait for them"
            assert len(set(self._met)) == 1
            self.meetings, forth = self._met[0], not forth
