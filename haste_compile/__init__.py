"""haste_compile: a ``torch.compile`` backend that makes pretrained video diffusion transformers fast."""

from __future__ import annotations

import os as _os

__version__ = "0.1.0"

# In a checkout the folders ``passes`` and ``kernels`` lie beside this one, and setuptools' package-dir maps
# them below this package only at install time. Python started in the repository root finds this folder
# first, so look beside it as well, but only when it really is a checkout.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
_here = _os.path.dirname(_os.path.abspath(__file__))
if _os.path.isfile(_os.path.join(_root, "passes", "__init__.py")) and not _os.path.isdir(
    _os.path.join(_here, "passes")
):
    __path__.append(_root)

_PUBLIC = {
    "optimize": "haste_compile.pipeline",
    "Handle": "haste_compile.pipeline",
    "explain": "haste_compile.explanation",
    "export": "haste_compile.artifacts",
    "load": "haste_compile.artifacts",
    "warm_start": "haste_compile.compile_cache",
    "cache_counts": "haste_compile.compile_cache",
    "statistics": "haste_compile.state",
    "reset": "haste_compile.state",
    "calibrate": "haste_compile.calibration.run",
    "CalibrationProfile": "haste_compile.calibration.profile",
    "HasteConfig": "haste_compile.config",
    "HasteError": "haste_compile.errors",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
