"""A calibration's result: thresholds of every head, what they were chosen from, and what they are valid for.

On disk it is a folder of two files. ``profile.json`` says what was calibrated and how; ``tables.safetensors``
holds the numbers. Loading executes nothing, reads a bounded number of bytes and checks every field; a
checksum over both files finds damage. Nothing in them depends on the time or on the number of machines, so
equal calibrations give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from haste_compile.calibration import schema
from haste_compile.calibration.allocate import Budget, allocate
from haste_compile.calibration.fingerprint import Fingerprint
from haste_compile.calibration.journal import write_atomically
from haste_compile.calibration.quadratic import allocate_quadratic, joint_error
from haste_compile.calibration.validate import (
    MAX_JSON_BYTES,
    MAX_TABLE_BYTES,
    parse_json,
    read_bounded,
    refuse,
)
from haste_compile.errors import OptionError, OutputPathError
from haste_compile.loading import import_optional

JSON_NAME, TABLES_NAME = "profile.json", "tables.safetensors"
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertProfile:
    """What belongs to one transformer of the pipeline; L sites, H heads, K candidates.

    Attributes:
        config_hash: SHA-256 of the transformer's configuration.
        fingerprint: of its weights.
        sites: names of the L self-attention sites, in graph order.
        tokens, head_dim: N and D of the calls that were measured.
        steps: denoising steps it serves, dense warm-up left out.
        states: how many transformer calls were measured.
        candidates: float64 [K], ascending.
        errors, sparsities: E and S of every head and candidate, float64 [L, H, K].
        top_p, delta: the thresholds, float64 [L, H].
        products: the probes' inner products, float32 [R, L, H, K]; None where they were not kept.
        assigned: in the exact form, the video that each head drew, int64 [L, H].
    """

    config_hash: str
    fingerprint: Fingerprint
    sites: tuple[str, ...]
    tokens: int
    head_dim: int
    steps: tuple[int, ...]
    states: int
    candidates: np.ndarray
    errors: np.ndarray
    sparsities: np.ndarray
    top_p: np.ndarray
    delta: np.ndarray
    products: np.ndarray | None = None
    assigned: np.ndarray | None = None

    @property
    def choice(self) -> np.ndarray:
        """Index of every head's candidate, int64 [L, H]."""
        return np.abs(self.candidates - self.top_p[..., None]).argmin(-1)

    @property
    def density(self) -> np.ndarray:
        """Measured share of query-key pairs that every head computes, float64 [L, H]."""
        return 1.0 - np.take_along_axis(self.sparsities, self.choice[..., None], -1)[..., 0]

    @property
    def error(self) -> np.ndarray:
        """Measured E of every head at its threshold, float64 [L, H]."""
        return np.take_along_axis(self.errors, self.choice[..., None], -1)[..., 0]

    @property
    def joint_error(self) -> float | None:
        """What the probes predict for all heads sparse at once; None without ``products``."""
        if self.products is None:
            return None
        flat = self.products.astype(np.float64).reshape(len(self.products), -1, len(self.candidates))
        return joint_error(flat, self.choice.ravel())

    def allocated(self, budget: str, allocator: str) -> ExpertProfile:
        """The same measurements under another budget.

        Raises:
            BudgetError: it cannot be met.
            OptionError: "quadratic" without ``products``.
        """
        heads, options = self.errors[..., 0].size, len(self.candidates)
        errors, sparsity = self.errors.reshape(heads, options), self.sparsities.reshape(heads, options)
        least = Budget.parse(budget).least_sparsity(sparsity, self.candidates.tolist())
        if allocator == "quadratic":
            if self.products is None:
                raise OptionError(
                    found="a profile without the probes' inner products",
                    wanted="one calibrated with keep_products",
                    where="allocator='quadratic'",
                    fix="Calibrate again with keep_products=True, or use allocator='additive'.",
                )
            products = self.products.astype(np.float64).reshape(-1, heads, options)
            choice = allocate_quadratic(products, errors, sparsity, least)
        else:
            choice = allocate(errors, sparsity, least)
        return self.chosen(choice.reshape(self.top_p.shape))

    def without_products(self) -> ExpertProfile:
        """The same without the inner products, which are most of a profile's bytes."""
        return dataclasses.replace(self, products=None)

    def chosen(self, choice: np.ndarray) -> ExpertProfile:
        """With another candidate for every head, int64 [L, H]."""
        return dataclasses.replace(self, top_p=self.candidates[choice])


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationProfile:
    """Per-head thresholds for a pipeline, and their provenance.

    Attributes:
        model: hub id or name; ``pipeline``: its class.
        request: height, width, frames, steps, guidance and negative prompt of the measured videos.
        scheduler: class, flow shift and hash of the configuration.
        options: options of ``HasteConfig`` under which it was measured.
        calibration: the settings, and how much of the planned work was done.
        draws: videos (prompt number, seed, measured steps), measured and held out.
        prompts: number and SHA-256 of the pool.
        experts: component name -> tables.
        held_out: the comparison with dense on held-out prompts; None where there was none.
        versions, device: what it was measured with.
    """

    model: str
    pipeline: str
    request: dict[str, Any]
    scheduler: dict[str, Any]
    options: dict[str, Any]
    calibration: dict[str, Any]
    draws: dict[str, Any]
    prompts: dict[str, Any]
    experts: dict[str, ExpertProfile]
    held_out: dict[str, Any] | None
    versions: dict[str, str]
    device: str

    def with_budget(self, budget: str, allocator: str | None = None) -> CalibrationProfile:
        """The same measurements under another budget; nothing is measured again.

        Raises:
            BudgetError: the budget cannot be met; OptionError: see ``ExpertProfile.allocated``.
        """
        how = allocator or self.calibration["settings"]["allocator"]
        settings = {**self.calibration["settings"], "budget": budget, "allocator": how}
        return dataclasses.replace(
            self,
            experts={name: expert.allocated(budget, how) for name, expert in self.experts.items()},
            calibration={**self.calibration, "settings": settings},
            held_out=None,
        )

    def with_experts(self, experts: Mapping[str, ExpertProfile]) -> CalibrationProfile:
        """With other tables; the held-out comparison no longer holds and is dropped."""
        return dataclasses.replace(self, experts=dict(experts), held_out=None)

    def summary(self) -> str:
        """Text for people."""
        done, planned = self.calibration["units_done"], self.calibration["units_planned"]
        lines = [f"{self.model}: {self.calibration['settings']['method']} form, {done} of {planned} units"]
        for name, expert in self.experts.items():
            low, high = expert.top_p.min(), expert.top_p.max()
            lines.append(
                f"{name}: {expert.top_p.size} heads, top_p {low:g} to {high:g}, density "
                f"{expert.density.mean():.3f}, summed error {expert.error.sum():.3g}"
            )
        if self.held_out is not None:
            psnr, ssim = self.held_out["psnr_db"], self.held_out["ssim"]
            lines.append(
                f"held out, {len(self.held_out['videos'])} videos: PSNR {psnr['mean']:.2f} dB "
                f"(worst {psnr['worst']:.2f}), SSIM {ssim['mean']:.4f}, "
                f"density {self.held_out['density']:.3f}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What ``profile.json`` says, without its checksum."""
        return schema.to_json(self)

    def save(self, folder: str | Path) -> None:
        """Write the two files; the folder is made if it is not there.

        Raises:
            OutputPathError: it cannot be written.
        """
        folder = Path(folder)
        safetensors = import_optional("safetensors.numpy", extra="calibrate")
        tables = safetensors.save(
            {
                f"{name}.{table}": np.ascontiguousarray(value)
                for name, expert in self.experts.items()
                for table, value in schema.tables_of(expert).items()
            }
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / TABLES_NAME, tables)
            write_atomically(folder / JSON_NAME, sign(schema.to_json(self), tables))
        except OSError as error:
            raise OutputPathError(
                found=str(error.strerror),
                wanted="a folder that can be written",
                where=str(folder),
                fix="Give another path with --out.",
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationProfile:
        """Read and check a profile.

        Raises:
            ProfileError: a file is missing, too large, damaged, of an unknown version, or says something
                impossible.
            DependencyError: safetensors is missing.
        """
        folder = Path(folder)
        raw = read_bounded(folder / JSON_NAME, MAX_JSON_BYTES)
        tables = read_bounded(folder / TABLES_NAME, MAX_TABLE_BYTES)
        facts = parse_json(folder / JSON_NAME, raw)
        schema.check_version(folder / JSON_NAME, facts)
        if sign(facts, tables, like=raw) != raw:
            refuse(
                folder / JSON_NAME,
                "checksum",
                "one that does not fit the files",
                "the files as they were saved",
            )
        schema.check_facts(folder / JSON_NAME, facts)
        safetensors = import_optional("safetensors.numpy", extra="calibrate")
        try:
            arrays = safetensors.load(tables)
        except Exception as error:  # the library's own error, or numpy's for a dtype it lacks
            refuse(folder / TABLES_NAME, "its header", str(error)[:200], "tables in the safetensors format")
        return schema.build(cls, ExpertProfile, folder, facts, arrays)


def read_checksum(folder: str | Path) -> str:
    """The checksum that a profile carries; ``CalibrationProfile.load`` checks it against the files."""
    found = _CHECKSUM.search(read_bounded(Path(folder) / JSON_NAME, MAX_JSON_BYTES))
    return found[1].decode() if found else ""


def sign(facts: dict[str, Any], tables: bytes, like: bytes | None = None) -> bytes:
    """The JSON file's bytes with the checksum over itself and the tables.

    Args:
        like: the bytes of a file; its own text is signed again instead of ``facts``.
    """
    blank = b"0" * 64
    if like is None:
        text = json.dumps({"checksum": blank.decode(), **facts}, indent=1, allow_nan=False).encode() + b"\n"
    else:
        text = _CHECKSUM.sub(b'"checksum": "' + blank + b'"', like, count=1)
    digest = hashlib.sha256(hashlib.sha256(tables).digest() + text).hexdigest().encode()
    return _CHECKSUM.sub(b'"checksum": "' + digest + b'"', text, count=1)
