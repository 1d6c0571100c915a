"""The manifest of an artifact: JSON beside it that says what it is, what it needs and what it hashes to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import haste_compile
from haste_compile.config import HasteConfig
from haste_compile.errors import (
    ArtifactFileError,
    ArtifactSizeError,
    ArtifactVersionError,
    OptionError,
)
from haste_compile.state import StateSpec

if TYPE_CHECKING:
    from haste_compile.artifacts.base import Written
    from haste_compile.artifacts.capture import Captured

#: Version of the manifest's form and of what it promises about inputs and state.
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Size:
    """The one video size of an artifact: pixels and frames, videos at a time, and length of the text."""

    height: int
    width: int
    num_frames: int
    batch: int = 1
    text_tokens: int = 512

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(
                    found=repr(value),
                    wanted="an integer of at least 1",
                    where=f"option {name}",
                    fix="Correct the value.",
                )

    def latent(self, scales: tuple[int, int]) -> tuple[int, int, int]:
        """Latent frames, height and width, for a VAE that packs ``scales`` frames and pixels into one."""
        return (self.num_frames - 1) // scales[0] + 1, self.height // scales[1], self.width // scales[1]

    def __str__(self) -> str:
        return f"{self.height}×{self.width}, {self.num_frames} frames"


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """Name, shape and dtype of one tensor; ``dtype`` is torch's name without the module."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorLayout:
        return cls(name, tuple(int(n) for n in tensor.shape), str(tensor.dtype).removeprefix("torch."))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact is; equal to the JSON file, field by field.

    Attributes:
        schema: ``SCHEMA`` of the version that wrote it.
        format: key of ``artifacts.FORMATS``.
        versions: of haste_compile, torch and what else the format names.
        device: kind of device that it was exported on, "cpu" or "cuda".
        dtype: of the latents.
        size: video size.
        vae_scales: frames and pixels for one latent position.
        options: of ``HasteConfig``; in place of a calibration profile the thresholds that it gave.
        thresholds: sha256 of the baked thresholds, which tells profiles apart.
        sites: name and attention shape [B, H, N, D] of every rewritten site.
        skipped: attention sites that stayed dense, with the reasons.
        transformer: class name and config of the transformer.
        inputs, state, outputs: tensors in order; state is input and, updated, output.
        files: name in the artifact's folder -> bytes and sha256; the main file first.
        extra: what the format wants to find again.
        digest: sha256 of all other fields.
    """

    schema: int
    format: str
    versions: Mapping[str, str]
    device: str
    dtype: str
    size: Size
    vae_scales: tuple[int, int]
    options: Mapping[str, Any]
    thresholds: str
    sites: tuple[Mapping[str, Any], ...]
    skipped: Mapping[str, str]
    transformer: Mapping[str, Any]
    inputs: tuple[TensorLayout, ...]
    state: tuple[TensorLayout, ...]
    outputs: tuple[TensorLayout, ...]
    files: Mapping[str, Mapping[str, Any]]
    extra: Mapping[str, Any]
    digest: str

    @classmethod
    def describe(cls, format: str, captured: Captured, written: Written, path: Path) -> Manifest:
        """The manifest of files that a format has just written, with ``path`` as the main one."""
        kind, config = captured.transformer
        options = captured.config.to_options()
        del options["profile_checksum"]
        if options.pop("profile", None) is not None:  # where it lies matters no more: its values are baked in
            options.update(captured.thresholds)
        fields: dict[str, Any] = {
            "schema": SCHEMA,
            "format": format,
            "versions": {
                "haste_compile": haste_compile.__version__,
                "torch": torch.__version__,
                **written.versions,
            },
            "device": captured.device.type,
            "dtype": str(captured.dtype).removeprefix("torch."),
            "size": dataclasses.asdict(captured.size),
            "vae_scales": captured.vae_scales,
            "options": options,
            "thresholds": _digest(captured.thresholds),
            "sites": [
                {"name": spec.name, "B": spec.B, "H": spec.H, "N": spec.N, "D": spec.D}
                for spec in captured.specs
            ],
            "skipped": {site.name: site.reason for site in captured.report.skipped},
            "transformer": {"class": kind, "config": config},
            "inputs": [dataclasses.asdict(layout) for layout in captured.inputs],
            "state": [dataclasses.asdict(layout) for layout in captured.state],
            "outputs": [dataclasses.asdict(layout) for layout in captured.outputs],
            "files": {
                str(file.relative_to(path.parent)): {
                    "bytes": file.stat().st_size,
                    "sha256": file_digest(file),
                }
                for file in written.files
            },
            "extra": dict(written.extra),
        }
        return cls._from_json({**fields, "digest": _digest(fields)})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of the artifact with main file ``path``.

        Raises:
            ArtifactFileError: it is missing, not JSON, or edited.
            ArtifactVersionError: a form that this version does not know.
        """
        file = manifest_path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise _damaged(
                file, error.strerror or "unreadable", "the manifest that export() wrote"
            ) from error
        except ValueError as error:
            raise _damaged(file, f"no JSON ({error})", "the manifest that export() wrote") from error
        if not isinstance(values, dict) or "schema" not in values:
            raise _damaged(file, "JSON of another kind", "the manifest of an artifact")
        if values["schema"] != SCHEMA:
            raise ArtifactVersionError(
                found=f"a manifest of form {values['schema']}",
                wanted=f"form {SCHEMA}, which haste_compile {haste_compile.__version__} reads",
                where=str(file),
                fix="Export again with this version.",
            )
        digest = values.pop("digest", None)
        if digest != _digest(values):
            raise _damaged(file, f"contents of digest {_digest(values)}", f"those of its own digest {digest}")
        return cls._from_json({**values, "digest": digest})

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> Manifest:
        layouts = {
            name: tuple(TensorLayout(x["name"], tuple(x["shape"]), x["dtype"]) for x in values[name])
            for name in ("inputs", "state", "outputs")
        }
        return cls(
            **{
                **values,
                **layouts,
                "size": Size(**values["size"]),
                "vae_scales": tuple(values["vae_scales"]),
                "sites": tuple(values["sites"]),
            }
        )

    def save(self, path: Path) -> None:
        """Write the JSON beside the artifact with main file ``path``."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        manifest_path(path).write_text(text + "\n", encoding="utf-8")

    def check_files(self, path: Path) -> None:
        """Hold the files against sizes and hashes.

        Raises:
            ArtifactFileError: one is missing, truncated or changed.
        """
        for name, wanted in self.files.items():
            file = path.parent / name
            if not file.is_file():
                raise _damaged(file, "nothing there", "a file of the artifact")
            found = file.stat().st_size
            if found != wanted["bytes"]:
                raise _damaged(file, f"{found} bytes", f"{wanted['bytes']}, as its manifest says")
            if (digest := file_digest(file)) != wanted["sha256"]:
                raise _damaged(
                    file, f"contents of sha256 {digest}", f"{wanted['sha256']}, as its manifest says"
                )

    def require(self, package: str, version: str, *, parts: int = 2) -> None:
        """Demand that ``package`` was of this version when the artifact was written.

        Args:
            version: what is installed here.
            parts: how many numbers of a version have to agree.

        Raises:
            ArtifactVersionError: another version.
        """
        made = self.versions.get(package, "none")
        if made.split(".")[:parts] != version.split(".")[:parts]:
            raise ArtifactVersionError(
                found=f"an artifact made with {package} {made}",
                wanted=f"one made with {package} {'.'.join(version.split('.')[:parts])}, as installed here",
                where=f"format {self.format}",
                fix="Export again here, or install that version.",
            )

    def check_call(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold the tensors of a call, by name, against the layout.

        Raises:
            ArtifactSizeError: a shape is another one; both sizes are named.
        """
        wrong = [
            layout
            for layout in self.inputs
            if layout.name in tensors and tuple(tensors[layout.name].shape) != layout.shape
        ]
        if not wrong:
            return
        found = ", ".join(str(TensorLayout.of(layout.name, tensors[layout.name])) for layout in wrong)
        video = self._video_size(tensors["hidden_states"])
        raise ArtifactSizeError(
            found=f"{found} (a video of {video})",
            wanted=f"{', '.join(map(str, wrong))} (a video of {self.size})",
            where=f"a call of a {self.format} artifact",
            fix="Ask the pipeline for the size of the artifact, or export one for that size.",
        )

    def _video_size(self, latents: Tensor) -> str:
        if latents.dim() != 5:
            return "no known size"
        frames, pixels = self.vae_scales
        count, height, width = latents.shape[2:]
        return str(Size(height * pixels, width * pixels, (count - 1) * frames + 1))

    @property
    def config(self) -> HasteConfig:
        return HasteConfig.from_options(self.options)

    def specs(self, device: torch.device) -> tuple[StateSpec, ...]:
        return tuple(StateSpec(**site, device=device) for site in self.sites)


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(file: Path, found: str, wanted: str) -> ArtifactFileError:
    return ArtifactFileError(
        found=found,
        wanted=wanted,
        where=str(file),
        fix="Copy the artifact again with all its files, or export it again.",
    )
