"""What of a scheduler bears on a calibration."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def describe_scheduler(scheduler: Any) -> dict[str, Any]:
    """Class, flow shift (None where it has none) and a hash of the whole configuration."""
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift"))
    return {
        "class": type(scheduler).__name__,
        "shift": None if shift is None else float(shift),
        "config_hash": config_hash(scheduler.config),
    }


def config_hash(config: Any) -> str:
    """SHA-256 of a diffusers configuration, without what only says where it came from."""
    plain = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
