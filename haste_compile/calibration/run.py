"""``calibrate``: draw, run dense videos, measure, allocate, compare; resumable at every unit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_compile import doctor
from haste_compile.calibration import exact, gradient, held_out
from haste_compile.calibration.assemble import assemble
from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.journal import Journal
from haste_compile.calibration.plan import Plan, make_plan
from haste_compile.calibration.profile import CalibrationProfile
from haste_compile.calibration.ranks import Ranks, ranks
from haste_compile.calibration.settings import Settings
from haste_compile.calibration.states import record_video
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError
from haste_compile.generation import Request, default_request
from haste_compile.loading import find_transformers

#: (what is going on, steps done, steps in all)
Progress = Callable[[str, int, int], None]

_FORMS = {"gradient": gradient.measure, "exact": exact.measure}


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    method: str = "gradient",
    candidates: Sequence[float] = (0.85, 0.90, 0.95),
    budget: str | float = "shared:0.9",
    request: Request | None = None,
    options: dict[str, Any] | None = None,
    out: str | Path | None = None,
    model: str | None = None,
    budget_minutes: float | None = None,
    progress: Progress = lambda _what, _done, _total: None,
    **settings: Any,
) -> CalibrationProfile:
    """Give every attention head its own threshold, under one budget of sparsity.

    The pipeline's weights stay as they are, and so does the pipeline: nothing is left compiled.

    Args:
        pipe: a diffusers Wan pipeline, text- or image-to-video, with one or two transformers.
        prompts: the pool; videos and held-out prompts are drawn from it.
        method: "gradient", or "exact" (the paper's form, many times as expensive).
        candidates: thresholds that a head may get.
        budget: "sparsity:S", "density:D", or "shared:τ", the sparsity that τ for all heads realises.
        request: size, steps, guidance (and image) of the videos; by default Wan 2.1's at 480p.
        options: of ``HasteConfig``: block size, stride, dense steps, δ and so on.
        out: folder for the profile; the journal lies in it until the profile is complete, and a call with the
            same arguments goes on where an earlier one was stopped. None: nothing is kept.
        model: name for the profile; by default the pipeline's own.
        budget_minutes: stop measuring after so long and allocate with what there is; the journal stays.
        progress: called after every step and unit.
        settings: fields of ``Settings``.

    Returns:
        The profile, saved in ``out``.

    Raises:
        OptionError: a setting, option or prompt pool that cannot be.
        BudgetError: no choice of candidates meets the budget; it gives the feasible range.
        ProfileError: ``out`` holds the journal of another calibration, or time ran out before every head
            was measured.
        StateError: the pipeline is compiled already.
        OutputPathError: ``out`` cannot be written.
        DependencyError: scipy or safetensors is missing.
    """
    plan = plan_for(
        pipe,
        prompts,
        request=request,
        options=options,
        settings=make_settings(method=method, candidates=candidates, budget=budget, **settings),
    )
    deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
    with ranks() as group, _folder(out, group) as folder:
        return _Run(pipe, plan, folder, group, model or model_name(pipe), deadline, progress).finish()


def make_settings(**given: Any) -> Settings:
    """Settings from what a caller gave, lists made tuples.

    Raises:
        OptionError: an unknown name or a bad value.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(set(given) - known):
        raise OptionError(
            found=", ".join(map(repr, unknown)),
            wanted="some of " + ", ".join(sorted(known)),
            where="settings of a calibration",
            fix="Correct the name; options of the backend go into options={...}.",
        )
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, (list, tuple)) else v for name, v in given.items()
    }
    if isinstance(values.get("intervals"), tuple):
        values["intervals"] = tuple(map(tuple, values["intervals"]))
    if "candidates" in values:
        values["candidates"] = tuple(sorted(map(float, values["candidates"])))
    if "budget" in values:
        values["budget"] = str(values["budget"])
    return Settings(**values)


def plan_for(
    pipe: Any,
    prompts: Sequence[str],
    *,
    request: Request | None,
    options: dict[str, Any] | None,
    settings: Settings,
) -> Plan:
    """What ``calibrate`` would do with these arguments; nothing runs.

    Raises:
        OptionError: as ``calibrate``.
    """
    if options and "profile" in options:
        raise OptionError(
            found="option profile",
            wanted="options without thresholds",
            where="calibrate()",
            fix="Drop it: a profile is what comes out.",
        )
    config = HasteConfig.from_options({**(options or {}), "inner": "eager"})
    if config.token_order != "raster":
        raise OptionError(
            found=f"token_order={config.token_order!r}",
            wanted="'raster': blocks are measured one by one; only a whole transformer can permute tokens",
            where="calibrate()",
            fix="Drop it.",
        )
    return make_plan(pipe, prompts, request or default_request(model_name(pipe)), config, settings)


def model_name(pipe: Any) -> str:
    """The hub id a pipeline was loaded by, or its folder's name."""
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return Path(name).name if Path(name).is_absolute() else name


class _Run:
    """One call of ``calibrate``."""

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        folder: Path,
        group: Ranks,
        model: str,
        deadline: float | None,
        progress: Progress,
    ) -> None:
        self.pipe, self.plan, self.folder, self.group = pipe, plan, folder, group
        self.model, self.deadline, self.progress = model, deadline, progress
        self.transformers = find_transformers(pipe)
        self.journal = Journal(folder / "journal", self._identity())
        self._videos: dict[int, dict[str, Tensor]] = {}

    def finish(self) -> CalibrationProfile:
        with contextlib.ExitStack() as stack, deterministic():
            interceptions = {
                name: stack.enter_context(Interception(transformer, self.plan.config, name))
                for name, transformer in self.transformers.items()
            }
            self._record_videos(interceptions)
            self._measure(interceptions)
        units = self.plan.units()
        measured = {unit: self.journal.read(unit.name) for unit in units if unit.name in self.journal}
        sites = self._sites()

        def build(compared: dict[str, Any] | None = None) -> CalibrationProfile:
            return assemble(self.pipe, self.model, self.plan, self.transformers, sites, measured, compared)

        profile = build()
        complete = len(measured) == len(units)
        if complete and self.plan.held_out:
            profile = build(self._compare(profile))
        self.group.wait()  # the first rank removes the journal that the others read
        if self.group.first:
            profile.save(self.folder)
            if complete:
                self.journal.remove()
        self.group.wait()
        return profile

    def _identity(self) -> dict[str, Any]:
        """What a journal is recognised by."""
        fingerprints = {
            name: Fingerprint.of(transformer.parameters()).digest()
            for name, transformer in self.transformers.items()
        }
        return {
            "plan": self.plan.to_dict(),
            "weights": fingerprints,
            "dtype": str(next(next(iter(self.transformers.values())).parameters()).dtype),
            "versions": doctor.versions(),
            "model": self.model,
        }

    def _record_videos(self, interceptions: dict[str, Interception]) -> None:
        for index in self.group.mine(range(len(self.plan.videos))):
            steps = self.plan.videos[index].needed_steps
            name = f"video-{index}"
            if name in self.journal:
                continue
            what = f"dense video {index + 1} of {len(self.plan.videos)}"
            kept = record_video(self.pipe, interceptions, self.plan, index, self._counting(what, 1, steps))
            self.journal.write(name, kept)
            for expert, interception in interceptions.items():
                self._note_sites(expert, interception)
        self.group.wait()

    def _counting(self, what: str, first: int, total: int) -> Callable[[int], None]:
        return lambda step: self.progress(what, step + first, total)

    def _measure(self, interceptions: dict[str, Interception]) -> None:
        units = self.group.mine(self.plan.units())
        form = _FORMS[self.plan.settings.method]
        longest = 0.0
        for done, unit in enumerate(units):
            self.progress("measuring", done, len(units))
            if unit.name in self.journal:
                continue
            started = time.monotonic()
            if self.deadline is not None and started + longest > self.deadline:
                break
            kept = self._video(unit.video)
            self.journal.write(unit.name, form(interceptions[unit.expert], self.plan, unit, kept))
            longest = max(longest, time.monotonic() - started)
        else:
            self.progress("measuring", len(units), len(units))
        for interception in interceptions.values():
            interception.forget()
        self.group.wait()

    def _video(self, index: int) -> dict[str, Tensor]:
        if index not in self._videos:
            self._videos = {index: self.journal.read(f"video-{index}")}  # one at a time: they may be large
        return self._videos[index]

    def _note_sites(self, expert: str, interception: Interception) -> None:
        """Names and shape of an expert's sites, seen in the first dense video."""
        rows = [interception.sites[block] for block in self.plan.experts[expert].layers]
        if f"sites-{expert}" not in self.journal and all(rows):
            names = "\n".join(row.name for row in rows if row is not None).encode()
            shape = next(row.shape for row in rows if row is not None)
            self.journal.write(
                f"sites-{expert}",
                {
                    "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
                    "shape": torch.tensor(shape),
                },
            )

    def _sites(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        found = {}
        for expert in self.transformers:
            stored = self.journal.read(f"sites-{expert}")
            names = bytes(stored["names"].tolist()).decode().split("\n")
            found[expert] = (tuple(names), tuple(stored["shape"].tolist()))
        return found

    def _compare(self, profile: CalibrationProfile) -> dict[str, Any]:
        preliminary = self.journal.folder / f"profile-{self.group.rank}"
        profile.save(preliminary)
        steps = 2 * self.plan.request.steps
        count = len(self.plan.held_out)
        for index in self.group.mine(range(count)):
            if f"held-out-{index}" not in self.journal:
                what = f"held-out video {index + 1} of {count}, dense and sparse"
                figures = held_out.compare(
                    self.pipe,
                    self.plan,
                    index,
                    preliminary,
                    self._counting(what, 1, steps),
                )
                self.journal.write(f"held-out-{index}", figures)
        self.group.wait()
        return held_out.summarise(self.plan, [self.journal.read(f"held-out-{i}") for i in range(count)])


@contextlib.contextmanager
def _folder(out: str | Path | None, group: Ranks) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
    elif group.count > 1:
        raise OptionError(
            found=f"{group.count} ranks and no folder",
            wanted="a folder that all ranks share",
            where="option out",
            fix="Give out=...",
        )
    else:
        with tempfile.TemporaryDirectory(prefix="haste-calibration-") as folder:
            yield Path(folder)


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for reproducible kernels, so that a resumed run repeats the bits of an unbroken one.

    What is timed for a calibration runs under it, too: such kernels may be slower.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    cublas = os.environ.get(_CUBLAS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Without it torch refuses matrix products where determinism is demanded and not just wished.
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nobody reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        if cublas is None:
            del os.environ[_CUBLAS]
        torch.utils.deterministic.fill_uninitialized_memory = filled
