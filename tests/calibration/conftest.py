"""A finished calibration, for tests that only look at the result."""

from __future__ import annotations

import pytest
import tiny_wan
from tiny_calibration import OPTIONS, PROMPTS, REQUEST, SMALL, Finished

import haste_compile


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Wan 2.2's form: two transformers, of which the second takes over below 0.875 of the noise."""
    folder = tmp_path_factory.mktemp("profile")
    pipe = tiny_wan.build_pipeline(experts=2)
    profile = haste_compile.calibrate(
        pipe,
        PROMPTS,
        request=REQUEST,
        options=OPTIONS,
        out=folder,
        delta="choose",
        ages=(1, 2),
        held_out=1,
        keep_products=True,
        **{**SMALL, "intervals": 1},
    )
    return Finished(pipe, profile, folder)
