"""Load a Wan pipeline, or only the structure of its transformers, and find the transformers in a pipeline."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from haste_compile.errors import DependencyError, DeviceError, ModelPathError, OptionError

#: The embedded default model; its card is README.md in the folder.
NANO_WAN = Path(__file__).parent / "assets" / "nano_wan"
#: Its calibration profile, made by ``haste calibrate``.
NANO_PROFILE = Path(__file__).parent / "assets" / "nano_wan_profile"

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")


def load_pipeline(model: str | Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A Wan pipeline with its transformers and text encoder in ``dtype`` and its VAE in float32.

    Args:
        model: a folder in diffusers' layout, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".
        device: where it goes.
        dtype: bfloat16 or float16 on a GPU; float32 on the CPU.

    Raises:
        ModelPathError: no such folder or hub id, or it holds no Wan pipeline.
        DependencyError: diffusers is missing.
    """
    diffusers = import_optional("diffusers", extra="demo")
    name = _pipeline_class(model)
    kinds: dict[str, torch.dtype] = {"default": dtype, "vae": torch.float32}
    try:
        pipe = getattr(diffusers, name).from_pretrained(str(model), dtype=kinds)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(model, f"{type(error).__name__}: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def shown_path(path: str | Path) -> str:
    """A path for a record: what comes with the package by its place in it, on whatever machine that is."""
    root = Path(__file__).parents[1]
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else str(path)


def transformer_structures(model: str | Path, *, dtype: torch.dtype) -> dict[str, Any]:
    """The pipeline's transformers on the meta device, without weights: cheap at any size.

    Returns:
        component name ("transformer", and "transformer_2" for Wan 2.2) -> module in eval mode.

    Raises:
        ModelPathError: no such folder or hub id, or it holds no Wan pipeline.
        DependencyError: diffusers is missing.
    """
    diffusers = import_optional("diffusers", extra="demo")
    _pipeline_class(model)
    index = _read_json(model, "model_index.json")
    structures = {}
    for component in ("transformer", "transformer_2"):
        _, kind = index.get(component) or (None, None)
        if kind is None:
            continue
        config = _read_json(model, f"{component}/config.json")
        with torch.device("meta"):
            module = getattr(diffusers, kind).from_config(config).eval()
        keep = set(module._keep_in_fp32_modules or ())  # from_pretrained leaves these in float32
        for name, parameter in module.named_parameters():
            if not keep & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        structures[component] = module
    return structures


def find_transformers(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or the module itself as "transformer".

    Raises:
        OptionError: there is none.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return {"transformer": pipe_or_transformer}
    names = ("transformer", "transformer_2")
    found = {name: getattr(pipe_or_transformer, name, None) for name in names}
    modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    if not modules:
        raise OptionError(
            found=f"an object of type {type(pipe_or_transformer).__name__}",
            wanted="a transformer module, or a pipeline with a module `transformer`",
            where="first argument",
            fix="Pass the WanPipeline, or pipe.transformer.",
        )
    return modules


def repeated_blocks(transformer: nn.Module, where: str) -> list[nn.Module]:
    """The transformer's repeated blocks in the order of the module tree.

    Raises:
        OptionError: it names none.
    """
    kinds = getattr(transformer, "_repeated_blocks", None) or ()
    blocks = [module for module in transformer.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise OptionError(
            found=f"a {type(transformer).__name__} that names no repeated blocks",
            wanted="a diffusers transformer with _repeated_blocks",
            where=where,
            fix="Give a Wan transformer; a model without blocks can only be compiled whole.",
        )
    return blocks


def known_device(name: str | None) -> torch.device:
    """The device asked for, whether it is here or not; without a name CUDA where there is one, else the CPU.

    Raises:
        DeviceError: a device that the kernels do not know.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise DeviceError(
            found=repr(name), wanted="cpu or cuda", where="--device", fix="Choose one of the two."
        )
    return torch.device(name)


def pick_device(name: str | None) -> torch.device:
    """As ``known_device``, and the device is here.

    Raises:
        DeviceError: an unknown device, or CUDA where there is none.
    """
    device = known_device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            found=f"no CUDA device for torch {torch.__version__}",
            wanted="a CUDA device and a CUDA build of torch",
            where=f"--device {name}",
            fix="Run with --device cpu, or see `haste doctor`.",
        )
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def import_optional(name: str, *, extra: str) -> Any:
    """Import a package that only an extra of this one installs.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise DependencyError(
            found=f"no package {name}",
            wanted=f"{name}, which the extra {extra!r} installs",
            where="this environment",
            fix=f"pip install 'haste-compile[{extra}]'",
        ) from error


def _pipeline_class(model: str | Path) -> str:
    name = _read_json(model, "model_index.json").get("_class_name")
    if name not in _PIPELINES:
        raise _no_model(model, f"a pipeline of class {name}")
    return name


def _read_json(model: str | Path, name: str) -> dict[str, Any]:
    folder = Path(model)
    if folder.is_dir():
        path = folder / name
        if not path.is_file():
            raise _no_model(model, f"a folder without {name}")
    elif folder.exists() or not _may_be_hub_id(str(model)):
        raise _no_model(model, "a file" if folder.exists() else "nothing there")
    else:
        hub = import_optional("huggingface_hub", extra="demo")
        try:
            path = Path(hub.hf_hub_download(str(model), name))
        except (OSError, ValueError) as error:  # the hub's own errors derive from these
            found = f"neither a folder nor a reachable hub id ({_first_line(error)})"
            raise _no_model(model, found) from error
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _no_model(model, f"{name} that is not JSON ({error})") from error


def _may_be_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _no_model(model: str | Path, found: str) -> ModelPathError:
    return ModelPathError(
        found=found,
        wanted="a diffusers folder of a " + " or ".join(_PIPELINES),
        where=f"model {str(model)!r}",
        fix="Give the folder that holds model_index.json, or nothing for the embedded model.",
    )
