"""All that a user can set, in one frozen and validated dataclass; presets are named option sets."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from haste_compile.errors import OptionError, ThresholdError

if TYPE_CHECKING:
    from haste_compile.predictors import Predictor

TOKEN_ORDERS = ("raster", "tile3d", "hilbert")

#: One threshold for all heads, or one row of H values for each of the L rewritten sites, in graph order.
Thresholds = float | tuple[tuple[float, ...], ...]

PRESETS: dict[str, dict[str, Any]] = {
    "haste-v1": {"dense_steps": 0},  # HASTE, v1 of arXiv 2605.14513: no dense warm-up
    "heart-v2": {"dense_steps": 5},  # HEART, v2 of the same paper: 5 of 50 steps
}


@dataclasses.dataclass(frozen=True)
class HasteConfig:
    """Options of the ``haste`` backend; ``torch.compile(..., options={...})`` takes the same names.

    Attributes:
        preset: name in ``PRESETS`` whose values stand where the caller gave none.
        predictor: name in ``predictors.PREDICTORS``: what makes the masks.
        top_p: mass that the kept key blocks of a row must reach, in (0, 1]; a float or an [L][H] table.
        delta: δ of temporal mask reuse, >= 0; a float or an [L][H] table. Raw L1 norm (HASTE §3, 30 for
            XAttention on Wan), or a ratio with ``relative_drift``.
        relative_drift: divide the drift by the L1 norm of the anchors (ours).
        gate: layer gate (HEART): share of heads that want a rebuild, below which none and above which all do.
        reuse: "tmr" (temporal mask reuse: by drift), "never" (plain XAttention), and the ablations "always"
            (keep the first mask), "interval:k" (rebuild every k-th call), "after:k" (rebuild in the first k
            steps of a video, then keep).
        max_age: rebuild a mask that was reused that many calls in a row; 0 sets no limit (ours).
        dense_steps: dense steps at the start of every video.
        dense_layers: indices of self-attention sites, in graph order, that stay dense.
        block_size: tokens a block, 64 or 128.
        stride: s of XAttention's antidiagonals: 4, 8, 16 or 32, at most ``block_size``.
        clusters: of queries and of keys, at most, for SVG2; fewer where a video has few tokens.
        cluster_iterations: of SVG2's k-means, at the first rebuild of a video and at later ones.
        cluster_tolerance: k-means ends early when no centroid moves further; 0 gives up nothing.
        cluster_floor: share of the key clusters that every query cluster keeps, in [0, 1].
        min_tokens: sites with fewer tokens stay dense.
        token_order: order of the video tokens inside the transformer, which decides what shares a block:
            "raster" (as they come), "tile3d" or "hilbert" (``haste_compile.token_order``).
        slots: how many CFG branches (of one or several videos) are remembered at a time.
        strict: a self-attention site that cannot be rewritten is an error, and so is a token order that
            cannot be had.
        stats: record the counters after every call, for ``Statistics.steps``; launches copies, never waits.
        inner: compiler of the rewritten graph: "inductor", "aot_eager" or "eager".
        profile: folder of a calibration profile. It brings ``top_p`` and ``delta`` for every head, which then
            stand in the state and not here, and the options that it was calibrated under.
        profile_checksum: the profile's, filled in when it is read; one that is given must be it.
    """

    preset: str = "haste-v1"
    predictor: str = "xattention"
    top_p: Thresholds = 0.9
    delta: Thresholds = 30.0
    relative_drift: bool = False
    gate: tuple[float, float] = (0.4, 0.8)
    reuse: str = "tmr"
    max_age: int = 0
    dense_steps: int = 0
    dense_layers: tuple[int, ...] = ()
    block_size: int = 128
    stride: int = 16
    clusters: tuple[int, int] = (300, 1000)
    cluster_iterations: tuple[int, int] = (50, 2)
    cluster_tolerance: float = 0.0
    cluster_floor: float = 0.1
    min_tokens: int = 1024
    token_order: str = "raster"
    slots: int = 4
    strict: bool = False
    stats: bool = False
    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    profile: str | None = None
    profile_checksum: str | None = None

    def __post_init__(self) -> None:
        _choice("preset", self.preset, tuple(PRESETS))
        _predictor(self.predictor)
        _choice("block_size", self.block_size, (64, 128))
        _choice("stride", self.stride, (4, 8, 16, 32))
        _choice("token_order", self.token_order, TOKEN_ORDERS)
        _choice("inner", self.inner, ("inductor", "aot_eager", "eager"))
        _thresholds("top_p", self.top_p, low_open=True, high=1.0)
        _thresholds("delta", self.delta, low_open=False, high=math.inf)
        for name, low in (("max_age", 0), ("dense_steps", 0), ("min_tokens", 0), ("slots", 1)):
            _integer(name, getattr(self, name), low)
        for name, low in (("clusters", 2), ("cluster_iterations", 1)):
            _pair(name, getattr(self, name), low)
        _number("cluster_tolerance", self.cluster_tolerance, math.inf)
        _number("cluster_floor", self.cluster_floor, 1.0)
        for index in self.dense_layers:
            _integer("dense_layers", index, 0)
        for name in ("relative_drift", "strict", "stats"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        _gate(self.gate)
        _reuse(self.reuse)
        if self.profile is None and self.profile_checksum is not None:
            raise _wrong("profile_checksum", self.profile_checksum, "None, or the option profile with it")

    @property
    def reuse_rule(self) -> tuple[str, int]:
        """``reuse`` taken apart: the rule's name and its k, 0 where it has none."""
        name, _, k = self.reuse.partition(":")
        return name, int(k or 0)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> HasteConfig:
        """Build a config from ``torch.compile``'s options dict: the caller's values, then the preset's.

        Where neither gives one, a predictor may have a default of its own.

        Raises:
            OptionError: an unknown name or a bad value; the nearest known name is offered.
            ProfileError: a profile that cannot be used.
        """
        given = dict(options or {})
        known = {field.name for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise OptionError(
                    found=repr(name),
                    wanted="one of " + ", ".join(sorted(known)),
                    where="options of the haste backend",
                    fix=f"Did you mean {near[0]!r}?" if near else "Remove it.",
                )
        preset = given.get("preset", cls.preset)
        _choice("preset", preset, tuple(PRESETS))
        brought: dict[str, Any] = {}
        if given.get("profile") is not None:
            from haste_compile.calibration.use import options_of

            brought = options_of(given)
        # A profile's predictor comes with its defaults, as it does when the options name it.
        predictor = _predictor(given.get("predictor", brought.get("predictor", cls.predictor)))
        values = {**predictor.defaults, **PRESETS[preset], **given}
        values.update(
            {name: v for name, v in brought.items() if name not in given or name.startswith("profile")}
        )
        for name in ("top_p", "delta"):
            if name in values:
                values[name] = _freeze_table(name, values[name])
        for name in ("dense_layers", "gate", "clusters", "cluster_iterations"):
            if name in values:
                values[name] = _freeze_list(name, values[name])
        return cls(**values)

    def to_options(self) -> dict[str, Any]:
        """The options dict that gives this config again; JSON-able."""
        options = dataclasses.asdict(self)
        if self.profile is not None:  # its thresholds take their place
            del options["top_p"], options["delta"]
        return options


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from NAME=VALUE pairs as a shell passes them; a value is JSON where it can be, else text.

    Raises:
        OptionError: not a pair, or not an option that ``HasteConfig`` takes.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(
                found=repr(pair), wanted="NAME=VALUE", where="--option", fix="Write it like -o top_p=0.8."
            )
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    HasteConfig.from_options(options)
    return options


def threshold_row(name: str, thresholds: Thresholds, site: int, sites: int, heads: int) -> list[float]:
    """The H thresholds of one of the ``sites`` rewritten sites.

    Raises:
        ThresholdError: the table is not [sites][heads].
    """
    if isinstance(thresholds, float):
        return [thresholds] * heads
    shape = f"[{len(thresholds)}][{'/'.join(str(n) for n in sorted({len(row) for row in thresholds}))}]"
    if len(thresholds) != sites or any(len(row) != heads for row in thresholds):
        raise ThresholdError(
            found=f"a table of shape {shape}",
            wanted=f"one float, or a table [{sites}][{heads}] (sites × heads)",
            where=f"option {name}",
            fix="Give one row for each rewritten self-attention site, in the order explain() lists them.",
        )
    return list(thresholds[site])


def _predictor(name: str) -> Predictor:
    from haste_compile.predictors import get_predictor  # imports torch, which `haste --help` does without

    return get_predictor(name)


def _freeze_table(name: str, value: Any) -> Thresholds:
    if hasattr(value, "tolist"):  # numpy array or tensor
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, (int, float, Sequence)) or isinstance(value, str):
        raise _wrong(name, value, "a number or an [L][H] table of numbers", ThresholdError)
    if isinstance(value, (int, float)):
        return float(value)
    rows: list[tuple[float, ...]] = []
    for row in value:
        numeric = isinstance(row, Sequence) and not isinstance(row, str)
        if not numeric or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in row):
            raise _wrong(name, row, "rows of H numbers", ThresholdError)
        rows.append(tuple(float(x) for x in row))
    if not rows or not all(rows):
        raise _wrong(name, value, "a table that is not empty", ThresholdError)
    return tuple(rows)


def _freeze_list(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _wrong(name, value, "a list of numbers")
    return tuple(value)


def _gate(gate: Any) -> None:
    numbers = isinstance(gate, tuple) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in gate
    )
    if not numbers or len(gate) != 2 or not 0 <= gate[0] <= gate[1] <= 1:
        raise _wrong("gate", gate, "two numbers (low, high) with 0 <= low <= high <= 1")


def _reuse(reuse: Any) -> None:
    name, colon, k = reuse.partition(":") if isinstance(reuse, str) else ("", "", "")
    plain = name in ("tmr", "always", "never") and not colon
    counted = name in ("interval", "after") and k.isdecimal() and int(k) > 0
    if not plain and not counted:
        wanted = "'tmr', 'always', 'never', 'interval:k' or 'after:k' with k of at least 1"
        raise _wrong("reuse", reuse, wanted)


def _thresholds(name: str, value: Thresholds, *, low_open: bool, high: float) -> None:
    rows = ((value,),) if isinstance(value, float) else value
    if not isinstance(rows, tuple):
        raise _wrong(name, value, "a float or an [L][H] table", ThresholdError)
    wanted = f"{'(0' if low_open else '[0'}, {'1]' if high == 1.0 else '∞)'}"
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            if not math.isfinite(x) or x > high or x < 0 or (low_open and x == 0):
                raise ThresholdError(
                    found=f"{x}",
                    wanted=f"a finite number in {wanted}",
                    where=f"option {name}" + ("" if isinstance(value, float) else f", site {i}, head {j}"),
                    fix="Correct the value.",
                )


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise _wrong(name, value, "one of " + ", ".join(map(repr, allowed)))


def _integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _wrong(name, value, f"an integer of at least {low}")


def _pair(name: str, value: Any, low: int) -> None:
    whole = isinstance(value, tuple) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    if not whole or len(value) != 2 or min(value) < low:
        raise _wrong(name, value, f"two integers of at least {low}")


def _number(name: str, value: Any, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= high or not math.isfinite(value):
        raise _wrong(
            name, value, f"a number in [0, {high:g}]" if high < math.inf else "a number of at least 0"
        )


def _wrong(name: str, value: Any, wanted: str, kind: type[OptionError] = OptionError) -> OptionError:
    return kind(found=repr(value), wanted=wanted, where=f"option {name}", fix="Correct the value.")
