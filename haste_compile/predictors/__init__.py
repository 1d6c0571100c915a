"""Mask predictors: what decides which keys a query attends to, each under the same temporal mask reuse.

A new predictor is one file that keeps the protocol in ``base.py``, and one line here.
"""

from __future__ import annotations

from haste_compile.errors import OptionError
from haste_compile.predictors.base import Predictor
from haste_compile.predictors.svg2 import SVG2
from haste_compile.predictors.xattention import XAttention

PREDICTORS: dict[str, Predictor] = {
    "xattention": XAttention(),
    "svg2": SVG2(),
}


def get_predictor(name: str) -> Predictor:
    """The predictor that option ``predictor`` names.

    Raises:
        OptionError: no predictor has that name.
    """
    if not isinstance(name, str) or name not in PREDICTORS:
        raise OptionError(
            found=repr(name),
            wanted="one of " + ", ".join(map(repr, PREDICTORS)),
            where="option predictor",
            fix="Correct the value.",
        )
    return PREDICTORS[name]
