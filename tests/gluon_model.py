"""Runs a warp-specialised Gluon kernel as plain Python: one thread a partition, barriers as PTX defines them.

Triton cannot interpret Gluon. But the source of a kernel is Python, and with its globals replaced by the ones
below it computes with torch tensors. What goes wrong on a GPU when a phase or a release is wrong goes wrong
here too:

* ``mbarrier`` keeps a phase parity, pending arrivals and bytes. A wait that nothing ends raises.
* TMA loads finish late and in any order. Until then their tile is NaN: what is overwritten too early shows.
* Row copies (``cp.async``) likewise; the arrival that is left to them follows the last of its thread's. A
  product that reads what they wrote, with no fence between its thread's wait and itself, raises.
* A product reads its operands when it is waited for, not when it is issued; a TMA store likewise.

The model takes a partition for one thread: barriers among the warps of a partition it does not see. Those are
read off the PTX.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: Seconds after which a wait is a deadlock.
PATIENCE = 20.0
#: What it says of a schedule that is broken; any other error is one of the model or of a test.
FAILURES = (
    "a wait that nothing ends",
    "more arrivals than a barrier counts",
    "a product is read before it was waited for",
    "a product reads row copies that no fence made visible",
)


class Index(int):
    """An integer as a kernel has it: it converts with ``.to``."""

    def to(self, _dtype: Any) -> Index:
        return self

    def __add__(self, other: Any) -> Any:
        return Index(int(self) + int(other)) if isinstance(other, int) else NotImplemented

    __radd__ = __add__

    def __floordiv__(self, other: Any) -> Any:
        return Index(int(self) // int(other))

    def __mod__(self, other: Any) -> Any:
        return Index(int(self) % int(other))


class Pointer:
    """Address of elements of a flat tensor."""

    dtype = types.SimpleNamespace(element_ty=torch.float32)

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset - offset)


class Descriptor:
    """A TMA descriptor of [B, H, N, D]; reads past the end give zeros, writes there vanish."""

    layout = None

    def __init__(self, memory: Tensor, rows: int, dtype: Any) -> None:
        self.memory, self.rows, self.dtype = memory, rows, dtype

    def read(self, place: Sequence[int]) -> Tensor:
        batch, head, start, _ = place
        box = torch.zeros(1, 1, self.rows, self.memory.shape[3], dtype=self.memory.dtype)
        inside = max(0, min(self.rows, self.memory.shape[2] - start))
        box[0, 0, :inside] = self.memory[batch, head, start : start + inside]
        return box

    def write(self, place: Sequence[int], box: Tensor) -> None:
        batch, head, start, _ = place
        inside = max(0, min(self.rows, self.memory.shape[2] - start))
        self.memory[batch, head, start : start + inside] = box[0, 0, :inside]


class Barrier:
    """An mbarrier (PTX ISA, "mbarrier")."""

    def __init__(self, world: World, count: int) -> None:
        self.world, self.count = world, count
        self.parity, self.pending, self.bytes = 0, count, 0

    def change(self, arrivals: int, transfer: int) -> None:
        with self.world.changed:
            self.pending -= arrivals
            self.bytes += transfer
            if self.pending < 0:
                self.world.fail("more arrivals than a barrier counts")
            if self.pending == 0 and self.bytes == 0:
                self.parity, self.pending = self.parity ^ 1, self.count
            self.world.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.world.changed:
            over = self.world.changed.wait_for(
                lambda: self.parity != parity or self.world.failure is not None, PATIENCE
            )
            if not over:
                self.world.fail("a wait that nothing ends")
            if self.world.failure is not None:
                raise RuntimeError(self.world.failure)


class Shared:
    """A view of shared memory, or of barriers in it."""

    def __init__(self, data: Tensor, barriers: list[Barrier | None]) -> None:
        self.data, self.barriers = data, barriers

    def index(self, i: int) -> Shared:
        one = _Cell(self.barriers, i) if len(self.barriers) else self.barriers
        return Shared(self.data[i], one)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(shape), self.barriers)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(tuple(order)), self.barriers)

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def load(self, _layout: Any) -> Tensor:
        return self.data.clone()


class _Cell(list):
    """One barrier of several, by reference."""

    def __init__(self, barriers: list[Barrier | None], place: int) -> None:
        super().__init__()
        self.barriers, self.place = barriers, place


class Product:
    """An asynchronous product; its value exists once it was waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.value = (a, b, acc, use_acc), None

    def evaluate(self) -> None:
        a, b, acc, use_acc = self.operands
        left = a.data if isinstance(a, Shared) else a
        start = acc.value if isinstance(acc, Product) else acc
        self.value = left @ b.data + (start if use_acc else 0.0)


class RowCopy:
    """Rows on their way into shared memory."""

    def __init__(self) -> None:
        self.done = False


class World:
    """The state of one launch, and the namespaces that stand in for Gluon's."""

    def __init__(self, programs: int, seed: int) -> None:
        self.programs, self.random = programs, random.Random(seed)
        self.changed = threading.Condition()
        self.failure: str | None = None
        self.loads: list[Callable[[], None]] = []
        self.arrivals: list[tuple[list[RowCopy], Barrier, int]] = []
        self.ticks, self.copied = itertools.count(1), dict[int, int]()
        self.here = threading.local()
        self.busy = True

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self.changed.notify_all()

    def globals(self) -> dict[str, Any]:
        """Names of a kernel's module that are replaced."""
        gl = types.SimpleNamespace(
            int32=torch.int32, int64=torch.int64, float32=torch.float32, constexpr=lambda x: x,
            static_range=range,
            maximum=lambda a, b: a.clamp(min=b) if isinstance(a, Tensor) else max(a, b),
            minimum=lambda a, b: a.clamp(max=b) if isinstance(a, Tensor) else min(a, b),
            exp2=torch.exp2, log2=torch.log2, where=torch.where, sum=lambda x, axis: x.sum(axis),
            max=lambda x, axis: Index(x.item()) if x.numel() == 1 else x.amax(axis),
            zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            arange=lambda start, end, layout: torch.arange(start, end),
            convert_layout=lambda x, _layout: x,
            load=self._load,
            store=self._store, atomic_add=self._atomic_add,
            program_id=lambda _axis: Index(self.here.program),
            num_programs=lambda _axis: Index(self.programs),
            allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            **dict.fromkeys(
                ("BlockedLayout", "SwizzledSharedLayout", "SliceLayout", "DotOperandLayout",
                 "NVMMADistributedLayout", "NVMMASharedLayout"), lambda *_, **__: None,
            ),
        )  # fmt: skip
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers",
            init=self._init,
            wait=lambda place, phase: self._barrier(place).wait(phase),
            arrive=lambda place: self._barrier(place).change(1, 0),
            expect=lambda place, size: self._barrier(place).change(1, size),
        )
        tma = types.SimpleNamespace(
            async_copy_global_to_shared=self._load_tile,
            async_copy_shared_to_global=lambda to, place, tile: self.here.stores.append((to, place, tile)),
            store_wait=self._finish_stores,
        )
        async_copy = types.SimpleNamespace(
            async_copy_global_to_shared=self._copy_rows, mbarrier_arrive=self._arrive_behind_copies
        )
        return {
            "gl": gl, "mbarrier": mbarrier, "tma": tma, "async_copy": async_copy,
            "warpgroup_mma": self._multiply, "warpgroup_mma_wait": self._wait_for_products,
            "fence_async_shared": self._fence,
            "_synchronise": lambda: None,
            "rescale_rows": lambda out, factor, _layout: out * factor[:, None],
            "times_rows": lambda sums, factor: sums * factor[:, None],
        }  # fmt: skip

    def run(self, kernel: Callable[..., None], arguments: dict[str, Any]) -> None:
        """Every program of the grid, side by side."""
        engine = threading.Thread(target=self._move_tiles, daemon=True)
        engine.start()
        with self._threads() as start:
            for program in range(self.programs):
                start(program, 4, kernel, (), arguments)
        with self.changed:
            self.busy = False
            self.changed.notify_all()
        engine.join()
        if self.failure is not None:
            raise RuntimeError(self.failure)

    @contextlib.contextmanager
    def _threads(self) -> Iterator[Callable[..., None]]:
        threads: list[threading.Thread] = []

        def start(
            program: int, warps: int, work: Callable[..., None], args: tuple[Any, ...], named: dict[str, Any]
        ) -> None:
            def body() -> None:
                self.here.program, self.here.products, self.here.stores = program, [], []
                self.here.lanes, self.here.copies, self.here.fenced = 32 * warps, [], 0
                try:
                    work(*args, **named)
                except Exception as error:
                    with self.changed:
                        self.fail(f"{type(error).__name__}: {error}")

            threads.append(threading.Thread(target=body, daemon=True))
            threads[-1].start()

        yield start
        for thread in threads:
            thread.join()

    def _specialize(self, partitions: Sequence[Any], warps: Sequence[int], _registers: Any) -> None:
        with self._threads() as start:
            for (work, args), count in zip(partitions, (4, *warps), strict=True):
                start(self.here.program, count, work, args, {})

    def _allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        if layout == "barriers":
            return Shared(torch.zeros(shape), [None] * shape[0])
        kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
        empty = torch.full(tuple(shape), -(2**31) if kind == torch.int32 else float("nan"), dtype=kind)
        return Shared(empty, [])

    def _init(self, place: Shared, count: int) -> None:
        cell: Any = place.barriers
        cell.barriers[cell.place] = Barrier(self, count)

    def _barrier(self, place: Shared) -> Barrier:
        cell: Any = place.barriers
        return cell.barriers[cell.place]

    def _load_tile(self, source: Descriptor, place: Sequence[int], barrier: Shared, tile: Shared) -> None:
        tile.data.fill_(float("nan"))

        def finish() -> None:
            tile.data.copy_(source.read(place))
            self._barrier(barrier).change(0, -tile.data.numel() * 2)

        with self.changed:
            self.loads.append(finish)
            self.changed.notify_all()

    def _copy_rows(self, tile: Shared, source: Pointer) -> None:
        tile.data.fill_(float("nan"))
        copy = RowCopy()
        self.here.copies.append(copy)

        def finish() -> None:
            tile.data.copy_(source.memory[source.offset])
            with self.changed:
                self.copied[tile.data.data_ptr()] = next(self.ticks)
                copy.done = True
                self._settle_arrivals()

        with self.changed:
            self.loads.append(finish)
            self.changed.notify_all()

    def _arrive_behind_copies(self, place: Shared, increment_count: bool) -> None:
        with self.changed:
            if increment_count:
                self.fail("arrivals that the barrier's count already holds")
            behind = [copy for copy in self.here.copies if not copy.done]
            self.arrivals.append((behind, self._barrier(place), self.here.lanes))
            self._settle_arrivals()

    def _settle_arrivals(self) -> None:
        over = [arrival for arrival in self.arrivals if all(copy.done for copy in arrival[0])]
        for arrival in over:
            self.arrivals.remove(arrival)
            arrival[1].change(arrival[2], 0)

    def _fence(self) -> None:
        with self.changed:
            self.here.fenced = next(self.ticks)

    def _move_tiles(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.loads or not self.busy or self.failure is not None)
                if not self.loads:
                    return
                finish = self.loads.pop(self.random.randrange(len(self.loads)))
            finish()

    def _multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, *, is_async: bool) -> Product:
        for operand in (a, b):
            copied = self.copied.get(operand.data.data_ptr(), 0) if isinstance(operand, Shared) else 0
            if copied > self.here.fenced:
                raise RuntimeError("a product reads row copies that no fence made visible")
        self.here.products.append(Product(a, b, acc, use_acc))
        return self.here.products[-1]

    def _wait_for_products(self, outstanding: int, *, deps: Sequence[Product]) -> Tensor:
        while len(self.here.products) > outstanding:
            self.here.products.pop(0).evaluate()
        (product,) = deps
        if product.value is None:
            raise RuntimeError("a product is read before it was waited for")
        return product.value

    def _finish_stores(self, _outstanding: int) -> None:
        while self.here.stores:
            to, place, tile = self.here.stores.pop(0)
            to.write(place, tile.data)

    def _atomic_add(self, pointer: Pointer, value: int, sem: str = "acq_rel") -> Index:
        with self.changed:
            before = Index(pointer.memory[pointer.offset])
            pointer.memory[pointer.offset] += value
        return before

    def _load(self, pointer: Pointer, mask: Any = None, other: int = 0) -> Any:
        if mask is None or isinstance(mask, bool):
            return Index(pointer.memory[pointer.offset]) if mask is not False else other
        inside = torch.as_tensor(mask).expand(pointer.offset.shape)
        found = torch.full(pointer.offset.shape, other, dtype=pointer.memory.dtype)
        found[inside] = pointer.memory[pointer.offset[inside]]
        return found

    def _store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        inside = mask.expand(value.shape)
        pointer.memory[pointer.offset[inside]] = value[inside]


def launch(
    module: types.ModuleType, entry: str, programs: int, arguments: dict[str, Any], seed: int = 0
) -> None:
    """Run a Gluon kernel of a module on ``programs`` programs.

    Raises:
        RuntimeError: a deadlock, a barrier with too many arrivals, or any error in a partition.
    """
    world = World(programs, seed)
    replaced = world.globals()
    names: dict[str, Any] = {**vars(module), **replaced}
    for name, value in vars(module).items():
        if name in replaced:
            continue
        if type(value).__name__ == "constexpr":
            names[name] = value.value
        elif type(value).__name__ == "GluonJITFunction":
            names[name] = _within(names, value.fn)
        elif isinstance(value, types.FunctionType) and value.__globals__ is vars(module):
            names[name] = _within(names, value)
    world.run(names[entry], arguments)


def _within(names: dict[str, Any], function: types.FunctionType) -> types.FunctionType:
    """The function with other globals."""
    return types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
