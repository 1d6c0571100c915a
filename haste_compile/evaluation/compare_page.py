"""The comparison page: one HTML file that shows two videos in step and where the attention was sparse.

The file holds everything (videos as data: URLs, numbers as JSON, drawing code) and loads nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from pathlib import Path
from string import Template
from typing import Any

_TEMPLATE = Path(__file__).with_name("compare_page.html")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the page shows.

    Attributes:
        title: the prompt.
        clips: caption -> MP4 bytes, in display order; all of the same length and frame rate.
        fps: frames per second of the clips.
        frames: number of frames of each clip.
        figures: label -> value as text, shown as a row of cards.
        sites: L names of the rewritten sites.
        density_by_head: [L][H], computed share of query-key pairs.
        refreshes_by_step: share of (site, branch, head) whose mask was rebuilt, for each step.
        step_seconds: caption -> seconds of each step.
        notes: sentences below the page.
    """

    title: str
    clips: dict[str, bytes]
    fps: int
    frames: int
    figures: dict[str, str]
    sites: tuple[str, ...]
    density_by_head: tuple[tuple[float, ...], ...]
    refreshes_by_step: tuple[float, ...]
    step_seconds: dict[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


def render_page(comparison: Comparison) -> str:
    """The page as HTML text."""
    payload = {
        "fps": comparison.fps,
        "frames": comparison.frames,
        "sites": comparison.sites,
        "density": comparison.density_by_head,
        "refreshes": comparison.refreshes_by_step,
        "seconds": comparison.step_seconds,
    }
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(comparison.title),
        cards="\n".join(_card(label, value) for label, value in comparison.figures.items()),
        clips="\n".join(_clip(i, *clip) for i, clip in enumerate(comparison.clips.items())),
        last_frame=comparison.frames - 1,
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes),
        payload=_script_json(payload),
    )


def _card(label: str, value: str) -> str:
    return f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"


def _clip(index: int, caption: str, mp4: bytes) -> str:
    source = base64.b64encode(mp4).decode("ascii")
    return (
        f'<figure><video id="clip{index}" muted playsinline preload="auto" '
        f'aria-label="{html.escape(caption)}" '
        f'src="data:video/mp4;base64,{source}"></video><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``</``, no comment start."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
