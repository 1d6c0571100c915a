"""The form of a profile on disk: its version, its fields, its tables, and what every one of them may hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from haste_compile.calibration.fingerprint import SAMPLES, Fingerprint
from haste_compile.calibration.validate import (
    check_fields,
    check_table,
    is_integer,
    is_list,
    is_number,
    is_text,
    refuse,
)
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError

if TYPE_CHECKING:
    from haste_compile.calibration.profile import CalibrationProfile, ExpertProfile

FORMAT, VERSION = "haste-calibration-profile", 1

#: Options of the backend that a profile sets: all that bear on which blocks a head keeps.
OPTIONS = (
    *("predictor", "relative_drift", "gate", "reuse", "max_age", "dense_steps", "dense_layers"),
    *("block_size", "stride", "min_tokens", "token_order"),
    *("clusters", "cluster_iterations", "cluster_tolerance", "cluster_floor"),
)
EXPERTS = ("transformer", "transformer_2")

_HASH = re.compile(r"[0-9a-f]{64}")
_TOP = (
    *("model", "pipeline", "request", "scheduler", "options", "calibration", "draws", "prompts"),
    *("held_out", "versions", "device"),
)
_SPREAD = {name: ("a number", is_number) for name in ("mean", "std", "worst")}


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def to_json(profile: CalibrationProfile) -> dict[str, Any]:
    """All of a profile but its tables."""
    experts = {
        name: {
            "config_hash": expert.config_hash,
            "fingerprint": expert.fingerprint.digest(),
            "sites": list(expert.sites),
            "heads": int(expert.top_p.shape[1]),
            "tokens": expert.tokens,
            "head_dim": expert.head_dim,
            "steps": list(expert.steps),
            "states": expert.states,
            "density": float(expert.density.mean()),
            "summed_error": float(expert.error.sum()),
            "joint_error": expert.joint_error,
        }
        for name, expert in profile.experts.items()
    }
    return {
        "format": FORMAT,
        "schema": VERSION,
        **{name: getattr(profile, name) for name in _TOP},
        "experts": experts,
    }


def tables_of(expert: ExpertProfile) -> dict[str, np.ndarray]:
    """The tables of one expert; density and error of the chosen thresholds among them, for other readers."""
    tables = {
        "top_p": expert.top_p,
        "delta": expert.delta,
        "density": expert.density,
        "error": expert.error,
        "candidates": expert.candidates,
        "errors": expert.errors,
        "sparsities": expert.sparsities,
        "fingerprint_sizes": expert.fingerprint.sizes,
        "fingerprint_values": expert.fingerprint.values,
    }
    optional = {"products": expert.products, "assigned": expert.assigned}
    return tables | {name: table for name, table in optional.items() if table is not None}


def check_version(path: Path, facts: dict[str, Any]) -> None:
    """Raise ``ProfileError`` unless this is a profile of the one version there is."""
    if facts.get("format") != FORMAT:
        refuse(path, "format", repr(facts.get("format"))[:80], repr(FORMAT), "Give the folder of a profile.")
    if facts.get("schema") != VERSION or isinstance(facts["schema"], bool):
        fix = "Update haste_compile, or calibrate again."
        refuse(path, "schema", repr(facts.get("schema"))[:80], f"version {VERSION}", fix)


def check_facts(path: Path, facts: dict[str, Any]) -> None:
    """Raise ``ProfileError`` for the first field that is missing, unknown or wrong."""
    an_object = ("an object", lambda v: isinstance(v, dict))
    text = ("text", is_text)
    check_fields(
        path,
        "top level",
        facts,
        {
            "checksum": ("64 hexadecimal digits", _is_hash),
            "format": text,
            "schema": ("a version", is_integer),
            "model": text,
            "pipeline": text,
            "device": text,
            "request": an_object,
            "scheduler": an_object,
            "options": an_object,
            "calibration": an_object,
            "draws": an_object,
            "prompts": an_object,
            "experts": (
                "one or two transformers",
                lambda v: isinstance(v, dict) and bool(v) and set(v) <= set(EXPERTS),
            ),
            "held_out": ("an object or null", lambda v: v is None or isinstance(v, dict)),
            "versions": (
                "names and versions",
                lambda v: isinstance(v, dict) and all(is_text(x) for x in (*v, *v.values())),
            ),
        },
    )
    size = ("a positive integer", lambda v: is_integer(v, 1, 1 << 20))
    check_fields(
        path,
        "request",
        facts["request"],
        {name: size for name in ("height", "width", "frames", "steps")}
        | {"guidance": ("a number", is_number), "negative_prompt": text},
    )
    check_fields(
        path,
        "scheduler",
        facts["scheduler"],
        {
            "class": text,
            "shift": ("a number or null", lambda v: v is None or is_number(v)),
            "config_hash": text,
        },
    )
    check_fields(
        path,
        "calibration",
        facts["calibration"],
        {
            "settings": an_object,
            "units_done": ("a count", is_integer),
            "units_planned": ("a count", is_integer),
        },
    )
    videos = ("a list of videos", lambda v: is_list(v, lambda x: isinstance(x, dict)))
    check_fields(path, "draws", facts["draws"], {"videos": videos, "held_out": videos})
    check_fields(path, "prompts", facts["prompts"], {"count": ("a count", is_integer), "sha256": text})
    _check_options(path, facts["options"])
    for name, expert in facts["experts"].items():
        _check_expert(path, f"experts.{name}", expert)
    if facts["held_out"] is not None:
        _check_held_out(path, facts["held_out"])


def _check_options(path: Path, options: dict[str, Any]) -> None:
    check_fields(path, "options", options, {name: ("anything", lambda v: True) for name in OPTIONS})
    try:
        HasteConfig.from_options(options)
    except (OptionError, TypeError, ValueError) as error:
        refuse(path, "options", str(error)[:200], "options that the backend takes")


def _check_expert(path: Path, where: str, expert: Any) -> None:
    size = ("a positive integer", lambda v: is_integer(v, 1))
    number = ("a number of at least 0", lambda v: is_number(v, 0))
    check_fields(
        path,
        where,
        expert,
        {
            "config_hash": ("text", is_text),
            "fingerprint": ("64 hexadecimal digits", _is_hash),
            "sites": ("names of sites", lambda v: is_list(v, is_text, most=10_000) and bool(v)),
            "heads": ("a positive integer", lambda v: is_integer(v, 1, 10_000)),
            "tokens": size,
            "head_dim": size,
            "steps": ("a list of steps", lambda v: is_list(v, is_integer)),
            "states": size,
            "density": ("a number in [0, 1]", lambda v: is_number(v, 0, 1)),
            "summed_error": number,
            "joint_error": ("a number or null", lambda v: v is None or is_number(v, 0)),
        },
    )


def _check_held_out(path: Path, held_out: dict[str, Any]) -> None:
    share = ("a number in [0, 1]", lambda v: is_number(v, 0, 1))
    check_fields(
        path,
        "held_out",
        held_out,
        {
            "psnr_db": ("an object", lambda v: isinstance(v, dict)),
            "ssim": ("an object", lambda v: isinstance(v, dict)),
            "density": share,
            "refresh_rate": share,
            "videos": ("a list of videos", lambda v: is_list(v, lambda x: isinstance(x, dict)) and bool(v)),
        },
    )
    for name in ("psnr_db", "ssim"):
        check_fields(path, f"held_out.{name}", held_out[name], _SPREAD)


def build(
    kind: type[CalibrationProfile],
    expert_kind: type[ExpertProfile],
    folder: Path,
    facts: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> CalibrationProfile:
    """The profile that checked facts and still unchecked tables describe.

    Raises:
        ProfileError: a table is missing, unknown, of the wrong shape or holds an impossible number.
    """
    experts = {}
    left = dict(arrays)
    for name, fact in facts["experts"].items():
        mine = {
            key.removeprefix(f"{name}."): left.pop(key) for key in list(left) if key.startswith(f"{name}.")
        }
        experts[name] = _build_expert(expert_kind, folder / "tables.safetensors", name, fact, mine)
    if left:
        refuse(
            folder / "tables.safetensors", "its tables", f"an unknown table {min(left)!r}", "known ones only"
        )
    return kind(experts=experts, **{name: facts[name] for name in _TOP})


def _build_expert(
    kind: type[ExpertProfile], path: Path, name: str, fact: dict[str, Any], tables: dict[str, np.ndarray]
) -> ExpertProfile:
    L, H = len(fact["sites"]), fact["heads"]
    required = {
        *("top_p", "delta", "density", "error", "candidates", "errors", "sparsities"),
        *("fingerprint_sizes", "fingerprint_values"),
    }
    if not required <= set(tables) <= required | {"products", "assigned"}:
        odd = sorted(required ^ set(tables))
        refuse(path, f"tables of {name}", f"missing or unknown: {', '.join(odd)[:80]}", "those of the schema")
    K = tables["candidates"].size
    if not 1 <= K <= 1000:
        refuse(path, f"{name}.candidates", f"{K} candidates", "1 to 1000")
    P = len(tables["fingerprint_sizes"]) if tables["fingerprint_sizes"].ndim else 0
    most = float(np.finfo(np.float32).max)
    layout: dict[str, tuple[tuple[int, ...], str, float, float]] = {
        "top_p": ((L, H), "float64", np.nextafter(0, 1), 1.0),
        "delta": ((L, H), "float64", 0.0, most),
        "density": ((L, H), "float64", 0.0, 1.0),
        "error": ((L, H), "float64", 0.0, most),
        "candidates": ((K,), "float64", np.nextafter(0, 1), 1.0),
        "errors": ((L, H, K), "float64", 0.0, most),
        "sparsities": ((L, H, K), "float64", 0.0, 1.0),
        "fingerprint_sizes": ((P,), "int64", 1, 2**62),
        "fingerprint_values": ((P, SAMPLES), "float32", -most, most),
    }
    if "products" in tables:
        rows = len(tables["products"]) if tables["products"].ndim else 0
        layout["products"] = ((rows, L, H, K), "float32", -most, most)
    if "assigned" in tables:
        layout["assigned"] = ((L, H), "int64", 0, 2**31)
    for table, (shape, dtype, low, high) in layout.items():
        check_table(path, f"{name}.{table}", tables[table], shape, dtype, low, high)
    if not np.isin(tables["top_p"], tables["candidates"]).all() or (np.diff(tables["candidates"]) <= 0).any():
        refuse(
            path, f"{name}.top_p", "a threshold that is no candidate", "ascending candidates, and these alone"
        )
    fingerprint = Fingerprint(tables["fingerprint_sizes"], tables["fingerprint_values"])
    if fingerprint.digest() != fact["fingerprint"]:
        refuse(path, f"{name}.fingerprint_values", "samples of another hash", "those of profile.json")
    return kind(
        config_hash=fact["config_hash"],
        fingerprint=fingerprint,
        sites=tuple(fact["sites"]),
        tokens=fact["tokens"],
        head_dim=fact["head_dim"],
        steps=tuple(fact["steps"]),
        states=fact["states"],
        candidates=tables["candidates"],
        errors=tables["errors"],
        sparsities=tables["sparsities"],
        top_p=tables["top_p"],
        delta=tables["delta"],
        products=tables.get("products"),
        assigned=tables.get("assigned"),
    )
