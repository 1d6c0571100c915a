"""The rows of the calibration study: settings, each over the same videos, compared with dense."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration_bench import Together
from benchmarks.calibration_workers import Workers
from haste_compile.generation import Request


@dataclasses.dataclass(frozen=True)
class Figures:
    """One setting over all videos; ``psnr``, ``ssim`` and ``latent_error`` have an entry for each.

    Attributes:
        seconds: see ``Bench.seconds``; None where the row was not timed.
    """

    name: str
    density: float
    refresh_rate: float
    psnr: np.ndarray
    ssim: np.ndarray
    latent_error: np.ndarray
    seconds: dict[str, float | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            field.name: value.tolist()
            if isinstance(value := getattr(self, field.name), np.ndarray)
            else value
            for field in dataclasses.fields(self)
        }

    def __str__(self) -> str:
        return (
            f"{self.name:32} {self.density:7.3f} {self.refresh_rate:7.3f}  {self.psnr.mean():7.2f} "
            f"{self.psnr.min():7.2f}  {self.ssim.mean():.4f} {self.latent_error.mean():8.4f}"
        )


class Rows:
    """Has workers generate every evaluation video under one setting after another.

    Args:
        together: how many videos go through the pipeline as one batch.
        record: where the rows are noted as soon as they are there.

    Attributes:
        figures: of every finished row, by name.
        settings: what a row was run under.
    """

    def __init__(self, workers: Workers, requests: Sequence[Request], together: int, record: Record) -> None:
        self.workers, self.requests, self.record = workers, list(requests), record
        self.figures: dict[str, Figures] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        numbered = list(enumerate(self.requests))
        self._batches = [
            tuple(zip(*numbered[i : i + together], strict=True)) for i in range(0, len(numbered), together)
        ]

    def dense(self) -> None:
        """Generate the references."""
        for future in self._submit("dense"):
            future.result()

    def run(self, name: str, options: dict[str, Any]) -> Figures:
        """Generate every video under ``options``; a profile among them may be an object."""
        parts: list[Together] = [future.result() for future in self._submit("compare", options)]
        videos = [len(numbers) for numbers, _ in self._batches]
        row = Figures(
            name,
            float(np.average([part.density for part in parts], weights=videos)),
            float(np.average([part.refresh_rate for part in parts], weights=videos)),
            *(np.concatenate([getattr(part, field) for part in parts]) for field in _EACH),
        )
        self.figures[name], self.settings[name] = row, options
        self.record.row(row)
        print(row, flush=True)
        return row

    def time(self, names: Sequence[str], until: float) -> None:
        """Time finished rows on the first video, each noted at once. To be called while nothing else runs.

        Args:
            until: ``time.monotonic()`` after which no row is begun.

        Raises:
            TimeoutError: some were not begun.
        """
        for place, name in enumerate(names):
            if time.monotonic() > until:
                raise TimeoutError("not begun: " + ", ".join(names[place:]))
            seconds = self.workers.call("seconds", self.requests[0], self.settings[name])
            self.figures[name] = dataclasses.replace(self.figures[name], seconds=seconds)
            self.record.row(self.figures[name])

    def _submit(self, method: str, *args: Any) -> list[Future[Any]]:
        return [self.workers.submit(method, numbers, requests, *args) for numbers, requests in self._batches]


_EACH = ("psnr", "ssim", "latent_error")


class Record:
    """The study's figures, written anew whenever one is added, so that a run cut short keeps what it has.

    Args:
        path: of the JSON file; None: nothing is written.
        order: names of the rows as they are to stand, up to the word "of".
    """

    def __init__(self, path: Path | None, order: Sequence[str]) -> None:
        self.path, self._order = path, list(order)
        self.content: dict[str, Any] = {"rows": [], "failed": {}}
        self._lock = threading.Lock()

    def add(self, **parts: Any) -> None:
        with self._lock:
            self.content |= parts
            self._write()

    def row(self, figures: Figures) -> None:
        with self._lock:
            rows = [row for row in self.content["rows"] if row["name"] != figures.name]
            rows.append(figures.to_dict())
            self.content["rows"] = sorted(rows, key=self._place)
            self._write()

    def failed(self, what: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        with self._lock:
            self.content["failed"][what] = text
            self._write()
        print(f"{what}: {text}", flush=True)

    def _place(self, row: dict[str, Any]) -> int:
        return self._order.index(row["name"].split(" of ")[0])

    def _write(self) -> None:
        if self.path is not None:
            aside = self.path.with_name(f".{self.path.name}")
            aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            os.replace(aside, self.path)


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    generator = np.random.default_rng(0)
    means = generator.choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
