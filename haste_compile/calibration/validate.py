"""Check what a profile's files say, field by field, before anything uses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from haste_compile.errors import ProfileError

#: Largest files that are read at all.
MAX_JSON_BYTES, MAX_TABLE_BYTES = 8 << 20, 1 << 30

Check = Callable[[Any], bool]


def refuse(path: Path, where: str, found: str, wanted: str, fix: str = "Calibrate again.") -> NoReturn:
    """Raise ``ProfileError`` for a place in a file."""
    raise ProfileError(found=found, wanted=wanted, where=f"profile {path}, {where}", fix=fix)


def read_bounded(path: Path, limit: int) -> bytes:
    """A file's bytes.

    Raises:
        ProfileError: no such file, or a larger one than ``limit``.
    """
    if not path.is_file():
        refuse(path, path.name, "no such file", "a file of the profile", "Give the folder that holds it.")
    size = path.stat().st_size
    if size > limit:
        refuse(path, path.name, f"{size:,} bytes", f"at most {limit:,}")
    return path.read_bytes()


def parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """JSON without NaN and infinities, an object at the top.

    Raises:
        ProfileError: anything else.
    """

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"the number {name}")

    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        refuse(path, "its text", f"no JSON ({str(error).splitlines()[0]})", "the JSON of a profile")
    if not isinstance(found, dict):
        refuse(path, "its text", f"a {type(found).__name__}", "a JSON object")
    return found


def check_fields(path: Path, where: str, value: Any, fields: Mapping[str, tuple[str, Check]]) -> None:
    """Every field is there and right, and there is no other.

    Args:
        fields: name -> what is wanted in words, and the test.

    Raises:
        ProfileError: see above.
    """
    if not isinstance(value, dict):
        refuse(path, where, f"a {type(value).__name__}", "an object")
    if set(value) != set(fields):
        odd = sorted(set(value) ^ set(fields))
        refuse(
            path, where, "fields missing or unknown: " + ", ".join(map(repr, odd[:5])), "those of the schema"
        )
    for name, (wanted, right) in fields.items():
        if not right(value[name]):
            refuse(path, f"{where}.{name}", repr(value[name])[:80], wanted)


def check_table(
    path: Path, name: str, table: np.ndarray, shape: tuple[int, ...], dtype: str, low: float, high: float
) -> None:
    """A table has its shape and dtype, and every number is finite and within [low, high].

    Raises:
        ProfileError: see above.
    """
    if table.shape != shape or table.dtype != np.dtype(dtype):
        refuse(path, name, f"{table.dtype} {list(table.shape)}", f"{dtype} {list(shape)}")
    if table.size and not (np.isfinite(table).all() and table.min() >= low and table.max() <= high):
        bad = table[~(np.isfinite(table) & (table >= low) & (table <= high))]
        refuse(path, name, f"{bad.flat[0]}", f"finite numbers in [{low:g}, {high:g}]")


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 10_000


def is_integer(value: Any, low: int = 0, high: int = 1 << 40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )


def is_list(value: Any, of: Check, *, most: int = 100_000) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(of, value))
