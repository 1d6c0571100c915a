"""Bring a profile's thresholds to the transformer they were calibrated for.

A compiled graph is shared by instances of equal shape and Wan 2.2 has two transformers, so which table a call
needs is decided where the instance's state is made, by its weights. Thresholds are constants of that state.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.calibration.profile import JSON_NAME, TABLES_NAME, CalibrationProfile, read_checksum
from haste_compile.calibration.scheduler import describe_scheduler
from haste_compile.errors import OptionError, ProfileError

logger = logging.getLogger(__name__)

Rows = tuple[tuple[float, ...], ...]

#: Options whose other values would change what the thresholds mean.
_FIXED = (
    *("predictor", "block_size", "stride", "relative_drift", "token_order"),
    *("clusters", "cluster_iterations", "cluster_tolerance", "cluster_floor"),
)
_THRESHOLDS = ("top_p", "delta")

_warming_up = contextvars.ContextVar("warming_up", default=False)
_pipes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to its pipeline


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a profile brings, beside those given with it.

    Args:
        given: options of the user; ``profile`` is the folder.

    Raises:
        OptionError: thresholds are given too, or an option that the profile was not measured under.
        ProfileError: the profile cannot be used, or has another checksum than the one given.
    """
    folder = given["profile"]
    if not isinstance(folder, (str, Path)):
        raise OptionError(
            found=repr(folder), wanted="the folder of a profile", where="option profile", fix="Give its path."
        )
    options = load_cached(folder).options
    for name in _THRESHOLDS:
        if name in given:
            raise OptionError(
                found=f"{name} beside profile",
                wanted="one of the two: a profile brings thresholds for every head",
                where="options of the haste backend",
                fix=f"Drop {name}, or drop profile.",
            )
    for name in _FIXED:
        if name in given and _plain(given[name]) != _plain(options[name]):
            raise OptionError(
                found=f"{name}={given[name]!r}",
                wanted=f"{options[name]!r}, under which the profile was calibrated",
                where=f"option {name}",
                fix=f"Drop {name}, or calibrate with it.",
            )
    checksum = read_checksum(folder)
    if given.get("profile_checksum") not in (None, checksum):
        raise _changed(folder, checksum, given["profile_checksum"])
    return {**options, "profile": str(Path(folder).absolute()), "profile_checksum": checksum}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_cached(folder: str | Path) -> CalibrationProfile:
    """The profile in a folder, read again when its files have changed.

    Raises:
        ProfileError: see ``CalibrationProfile.load``.
    """
    paths = [Path(folder).absolute() / name for name in (JSON_NAME, TABLES_NAME)]
    stamps = tuple((s.st_mtime_ns, s.st_size) if (s := _stat(path)) else None for path in paths)
    return _load(str(paths[0].parent), stamps)


def _changed(folder: str | Path, found: str, wanted: str) -> ProfileError:
    return ProfileError(
        found=f"checksum {found}",
        wanted=f"{wanted}, of the profile that was asked for",
        where=f"profile {folder}",
        fix="Call optimize or torch.compile again for the profile that lies there now.",
    )


def thresholds(
    folder: str,
    checksum: str | None,
    parameters: Sequence[Tensor],
    *,
    sites: int,
    heads: int,
    tokens: int,
) -> dict[str, Rows]:
    """The tables of the transformer that ``parameters`` belong to; reads a few values of each of them.

    Args:
        folder: of the profile.
        checksum: of the profile that the graph was compiled for.
        parameters: all of the transformer's, or those of one block.
        sites, heads, tokens: of the transformer and this call.

    Returns:
        "top_p" and "delta", each [sites][heads].

    Raises:
        ProfileError: other weights, another number of sites or heads, or another profile in the folder.
    """
    profile = load_cached(folder)
    if (found := read_checksum(folder)) != checksum:
        raise _changed(folder, found, str(checksum))
    name = find_expert(profile, parameters, folder)
    expert = profile.experts[name]
    if expert.top_p.shape != (sites, heads):
        raise ProfileError(
            found=f"{sites} rewritten sites of {heads} heads",
            wanted=f"{expert.top_p.shape[0]} sites of {expert.top_p.shape[1]} heads, as calibrated",
            where=f"profile {folder}, {name}",
            fix="Leave dense_layers and min_tokens to the profile, or calibrate for these sites.",
        )
    if tokens != expert.tokens:
        size = "{frames} frames of {height}×{width}".format(**profile.request)
        logger.warning(
            "haste: the profile was calibrated with %d tokens (%s), this video has %d: densities and errors "
            "will differ from those measured",
            *(expert.tokens, size, tokens),
        )
    pipe = _pipes[parameters[0]]() if parameters and parameters[0] in _pipes else None
    if pipe is not None:
        steps = getattr(pipe.scheduler, "num_inference_steps", None)
        _warn_steps(profile, steps)
    return {table: tuple(map(tuple, getattr(expert, table).tolist())) for table in _THRESHOLDS}


def find_expert(profile: CalibrationProfile, parameters: Sequence[Tensor], where: Any) -> str:
    """Which of the profile's transformers has these weights.

    Raises:
        ProfileError: none has.
    """
    mine = Fingerprint.of(parameters)
    unknown = {name: expert.fingerprint.unknown(mine) for name, expert in profile.experts.items()}
    name, count = min(unknown.items(), key=lambda item: item[1])
    if count or not len(mine.sizes):
        raise ProfileError(
            found=f"{count} of {len(mine.sizes)} parameters with other values",
            wanted=f"the weights of {profile.model} that were calibrated",
            where=f"profile {where}",
            fix="Calibrate for these weights (adapters change them too), or drop option profile.",
        )
    return name


def check_pipeline(pipe: Any, transformers: Mapping[str, nn.Module], folder: str) -> None:
    """Before anything is compiled: refuse other weights, warn of another scheduler, remember the pipeline.

    Raises:
        ProfileError: a transformer's weights are not those that were calibrated.
    """
    profile = load_cached(folder)
    for transformer in transformers.values():
        parameters = list(transformer.parameters())
        if not any(parameter.is_meta for parameter in parameters):  # offloaded weights are looked at later
            find_expert(profile, parameters, folder)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return
    found = describe_scheduler(scheduler)
    if found != profile.scheduler:
        logger.warning(
            "haste: the profile was calibrated with %s, this pipeline has %s: errors will differ from those "
            "measured",
            *(_name(profile.scheduler), _name(found)),
        )
    for transformer in transformers.values():
        for parameter in transformer.parameters():
            _pipes[parameter] = weakref.ref(pipe)


@contextlib.contextmanager
def warming_up() -> Iterator[None]:
    """Around calls that only compile: their number of steps is no video's."""
    token = _warming_up.set(True)
    try:
        yield
    finally:
        _warming_up.reset(token)


def mismatches(folder: str | Path, request: Any) -> list[str]:
    """In words, how a request differs from what a profile was calibrated for."""
    calibrated = load_cached(folder).request
    return [
        f"{name} {getattr(request, name)} instead of {calibrated[name]}"
        for name in ("height", "width", "frames", "steps", "guidance")
        if getattr(request, name) != calibrated[name]
    ]


def _warn_steps(profile: CalibrationProfile, steps: int | None) -> None:
    if steps is not None and steps != profile.request["steps"] and not _warming_up.get():
        logger.warning(
            "haste: the profile was calibrated for %d steps, this video has %d: errors will differ from those"
            " measured",
            *(profile.request["steps"], steps),
        )


def _name(scheduler: Mapping[str, Any]) -> str:
    return f"{scheduler['class']} (shift {scheduler['shift']}, {scheduler['config_hash'][:8]})"


def _stat(path: Path) -> Any:
    return path.stat() if path.is_file() else None


@functools.lru_cache(maxsize=8)
def _load(folder: str, _stamps: Any) -> CalibrationProfile:
    return CalibrationProfile.load(folder)
