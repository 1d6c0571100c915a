"""Artifacts for deployment: one transformer, one video size, its thresholds as constants, its state explicit.

    export(pipe, "wan.pt2", format="aoti", height=480, width=832, num_frames=81)   -> Manifest
    pipe.transformer = load("wan.pt2", trust=True)                                 -> Runner

| step     | where                | what                                                                     |
|----------|----------------------|--------------------------------------------------------------------------|
| capture  | ``capture.py``       | torch.export → the same PASSES as live graphs → state as inputs, outputs |
| write    | ``<format>.py``      | a captured transformer → the artifact's files                            |
| describe | ``manifest.py``      | what the files are, beside them: ``wan.pt2.json``                        |
| open     | ``<format>.py``      | the files → a function of tensors                                        |
| run      | ``runner.py``        | owns the state and the clock, stands in for the transformer              |

A format is one module, named in ``FORMATS``, that fulfils ``Format`` with two functions:

``write(captured, path)`` writes the artifact. ``captured.module(form)`` or ``captured.program(form)`` gives
the graph. Its inputs are ``captured.inputs`` (the transformer's tensors by name, then ``haste_ctl``), then
``captured.state`` (``haste_0_mask``, ``haste_0_anchors``, ``haste_0_counters``, ``haste_1_mask``, …), all
by position; thresholds are constants in it. It comes in four forms:

* "live": the ops of ``kernels.ops``. State inputs are updated in place; one output, the sample.
* "named": ``haste::refresh_mask`` and ``haste::block_sparse_attention``, both without side effects: for
  formats that have operators of those names. Outputs: the sample, then the new state.
* "plain": PyTorch's own operators alone (``kernels.functional``). Outputs as in "named".
* "triton": the kernels that the ops launch on CUDA, launched by the graph itself, or attention by an operator
  that ``native`` built. In place, as in "live".

It returns ``Written``: the files it made, the versions that matter, and what it wants to find again.

``open_(manifest, path, device)`` gives ``call(inputs, state) -> (sample, new state)``. Inputs and state come
as contiguous tensors in the order above, on ``device``; what is returned as new state the runner passes in at
the next call, so it may be the same tensors, updated in place, or others (two sets used in turns). ``open_``
refuses versions that cannot run the files (``Manifest.require``) and devices that they were not made for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

from torch import nn

from haste_compile.artifacts.base import Format
from haste_compile.artifacts.capture import capture
from haste_compile.artifacts.manifest import Manifest, Size
from haste_compile.artifacts.runner import Runner
from haste_compile.config import HasteConfig
from haste_compile.errors import ArtifactTrustError, OptionError
from haste_compile.explanation import TEXT_TOKENS, VAE_SCALES
from haste_compile.loading import find_transformers, pick_device
from haste_compile.output import new_folder

__all__ = ["FORMATS", "Manifest", "Runner", "Size", "export", "load"]

#: Format -> the module that writes and opens it; imported when it is asked for.
FORMATS = {
    "aoti": "haste_compile.artifacts.aoti",
    "onnx": "haste_compile.artifacts.onnx",
    "tensorrt": "haste_compile.artifacts.tensorrt",
    "torchscript": "haste_compile.artifacts.torchscript",
}


def export(
    pipe_or_transformer: Any,
    path: str | Path,
    *,
    format: str,
    height: int,
    width: int,
    num_frames: int,
    batch: int = 1,
    text_tokens: int = TEXT_TOKENS,
    component: str | None = None,
    **options: Any,
) -> Manifest:
    """Write a transformer with sparse self-attention as an artifact, and its manifest beside it.

    Args:
        pipe_or_transformer: as for ``optimize``; it stays as it is. The artifact is for its device and dtype.
        path: the artifact's main file; the manifest gets the same name with ``.json`` after it.
        format: a key of ``FORMATS``.
        height, width, num_frames: of the video, in pixels and frames: the only size that the artifact takes.
        batch: videos at a time.
        text_tokens: length of the text embeddings; pipelines pad prompts to 512.
        component: which of a pipeline's transformers, for Wan 2.2's two; each is an artifact of its own.
        options: fields of ``HasteConfig``; ``inner`` does not matter.

    Returns:
        The manifest; ``manifest.digest`` is what ``load`` takes for ``sha256``.

    Raises:
        OptionError: bad options, an unknown format, or no transformer in the argument.
        ArtifactError: the transformer has no form in this format.
        UnsupportedSiteError: ``strict`` and a self-attention site cannot be rewritten.
        DependencyError: a package that the format needs is missing.
        OutputPathError: the files cannot be written.
    """
    module = _format(format)
    config = HasteConfig.from_options(options)
    scales = (
        getattr(pipe_or_transformer, "vae_scale_factor_temporal", VAE_SCALES[0]),
        getattr(pipe_or_transformer, "vae_scale_factor_spatial", VAE_SCALES[1]),
    )
    size = Size(height, width, num_frames, batch, text_tokens)
    transformer, path = _component(pipe_or_transformer, component), Path(path)
    with new_folder(path.parent) as folder:
        aside = folder / path.name
        captured = capture(transformer, size, scales, config)
        manifest = Manifest.describe(format, captured, module.write(captured, aside), aside)
        manifest.save(aside)
    return manifest


def load(
    path: str | Path, *, trust: bool = False, sha256: str | None = None, device: str | None = None
) -> Runner:
    """Open an artifact as a stand-in for the transformer that it was exported from.

    An artifact holds code that runs with the rights of this process. So the caller has to say that it comes
    from a trusted place, or which digest it must have.

    Args:
        path: the artifact's main file; its manifest lies beside it.
        trust: the caller vouches for the files.
        sha256: the digest that ``export`` returned in its manifest; files and manifest must match it.
        device: "cpu", "cuda" or "cuda:1"; by default the kind of device that it was exported on.

    Raises:
        ArtifactTrustError: neither trust nor digest, or another digest.
        ArtifactFileError: a file is missing, truncated or edited.
        ArtifactVersionError: made by or for another version.
        DependencyError: the runtime of the format is missing.
        DeviceError: the device is not here, or the artifact does not run on it.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    if sha256 is not None and sha256 != manifest.digest:
        raise ArtifactTrustError(
            found=f"digest {manifest.digest}",
            wanted=sha256,
            where=str(path),
            fix="Get the artifact again from where the digest comes from.",
        )
    if sha256 is None and not trust:
        raise ArtifactTrustError(
            found="an artifact that nobody vouches for",
            wanted="trust=True or sha256=...",
            where=str(path),
            fix="Artifacts hold executable code: load only those you made, or whose digest you know "
            f"(this one claims {manifest.digest}).",
        )
    manifest.check_files(path)
    target = pick_device(device or manifest.device)
    call = _format(manifest.format).open_(manifest, path, target)
    return Runner(manifest, call, target)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise OptionError(
            found=repr(name),
            wanted="one of " + ", ".join(map(repr, FORMATS)),
            where="option format",
            fix="Choose one of them.",
        )
    return cast(Format, importlib.import_module(FORMATS[name]))


def _component(pipe_or_transformer: Any, name: str | None) -> nn.Module:
    transformers = find_transformers(pipe_or_transformer)
    if name is None and len(transformers) == 1:
        return next(iter(transformers.values()))
    if name not in transformers:
        raise OptionError(
            found=repr(name),
            wanted="one of " + ", ".join(map(repr, transformers)),
            where="option component",
            fix="An artifact holds one transformer: name it, and export the other one by itself.",
        )
    return transformers[name]
