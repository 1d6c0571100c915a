"""Write the study's figures into docs/calibration.md: tables between markers, and two plots.

    python -m benchmarks.calibration_report

Reads ``benchmarks/results/calibration-*.json``; a part whose record is missing says "not run". The tests hold
document and records together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration_rows import bootstrap_interval

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "calibration.md"
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "images"

#: Part of the document -> record, and command that makes it.
RECORDS = {
    "study-gpu": (
        "calibration-study-gpu.json",
        "python -m benchmarks.calibration_study --prompts 20 --seeds 2 --dtype float16 --workers 8",
    ),
    "forms-gpu": (
        "calibration-forms-gpu.json",
        "python -m benchmarks.calibration_forms --dtype float16 --probes 5",
    ),
    "cost-1.3b": ("calibration-cost-1.3b.json", "python -m benchmarks.calibration_cost --model 1.3b"),
    "cost-14b": (
        "calibration-cost-14b.json",
        "python -m benchmarks.calibration_cost --model 14b --height 480 --width 832",
    ),
    "cost-14b-720p": (
        "calibration-cost-14b-720p.json",
        "python -m benchmarks.calibration_cost --model 14b",
    ),
}


def fill(text: str) -> str:
    """The document with every part between ``<!-- name -->`` and ``<!-- end -->`` written anew."""
    for name, (file, command) in RECORDS.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        path = RESULTS / file
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            body = WRITERS[name.split("-")[0]](record, command)
            body += "".join(f"\n\n![{what}](images/{file})" for file, what in plots(name, record).items())
        else:
            body = f"Not run: `{command} --json benchmarks/results/{file}`"
        text = f"{before}{start}\n{body}\n\n{end}{after}"
    return text


_TIMES = (
    "Times are of one video alone, over dense just before it; *busy* is what the GPU spent in kernels. One "
    "video of so small a model is bound by launches from the host: dense itself took {} s from row to row, "
    "so the column of times ranks nothing."
)
_BUSY = " In kernels dense took {} s, measured once in each process."


def study(record: dict[str, Any], command: str) -> str:
    """Setting, table of rows, table of differences, and what else was measured."""
    setting = record["setting"]
    lines = [
        f"`{command}`: {setting['prompts']} prompts × {setting['seeds']} seed(s) that calibration has not "
        f"seen, {setting['frames']} frames of {setting['height']}×{setting['width']}, {setting['steps']} "
        f"steps of which {record['options']['dense_steps']} are dense, shared τ = {setting['shared']:g}, "
        f"candidates {', '.join(f'{c:g}' for c in setting['candidates'])}, {setting['videos']} calibration "
        f"video(s), {setting['probes']} probes a state; density was met on {setting['tuning']} other "
        f"video(s). {_where(record)}. Nothing is compiled. {_about_times(record)}",
        "",
        "| setting | density | masks rebuilt | PSNR mean, dB | worst | SSIM | latent error | time / dense "
        "| busy |",
        "|---|---|---|---|---|---|---|---|---|",
        "| dense | 1.000 | – | equal | equal | 1.0000 | 0 | 1.00 | 1.00 |",
    ]
    for row in record["rows"]:
        psnr, seconds = row["psnr"], row["seconds"] or {}
        lines.append(
            f"| {row['name']} | {row['density']:.3f} | {row['refresh_rate']:.0%} | "
            f"{_mean(psnr):.2f} | {min(psnr):.2f} | {_mean(row['ssim']):.4f} | "
            f"{_mean(row['latent_error']):.4f} | {_ratio(seconds, '')} | {_ratio(seconds, 'busy_')} |"
        )
    lines += ["", *_differences(record), "", *_assumptions(record)]
    lines += [f"* Not measured: {what} ({why})" for what, why in record["failed"].items()]
    return "\n".join(lines)


def _about_times(record: dict[str, Any]) -> str:
    """What the columns of times are, and how far dense's own times lie apart."""
    timed = [row["seconds"] for row in record["rows"] if row["seconds"]]
    if not timed:
        return "No times were taken."
    spans = {}
    for kind, digits in (("dense", 2), ("busy_dense", 3)):
        found = [seconds[kind] for seconds in timed if seconds[kind] is not None]
        spans[kind] = f"{min(found):.{digits}f} to {max(found):.{digits}f}" if found else None
    text = _TIMES.format(spans["dense"])
    return text if spans["busy_dense"] is None else text + _BUSY.format(spans["busy_dense"])


#: Row, and the row that it is compared with.
_PAIRS = (
    ("+ TMR", "XAttention, shared τ"),
    ("+ EBC", "XAttention, shared τ"),
    ("EBC, shuffled over heads", "XAttention, shared τ"),
    ("EBC, exact form", "XAttention, shared τ"),
    ("EBC, quadratic allocation", "XAttention, shared τ"),
    ("EBC, weighted by step", "XAttention, shared τ"),
    ("EBC, plain squared error", "XAttention, shared τ"),
    ("+ EBC", "EBC, exact form"),
    ("+ EBC", "EBC, plain squared error"),
    ("+ EBC + TMR", "XAttention, shared τ"),
    ("+ EBC + TMR", "+ TMR"),
    ("+ TMR", "freeze after warm-up"),
    ("+ TMR", "interval"),
    ("SVG2, shared τ", "XAttention, shared τ"),
    ("SVG2 + EBC", "SVG2, shared τ"),
    ("SVG2 + EBC", "+ EBC"),
    ("SVG2 + EBC + TMR", "+ EBC + TMR"),
)


def _differences(record: dict[str, Any]) -> list[str]:
    rows = {row["name"].split(" of ")[0]: row for row in record["rows"]}
    lines = [
        f"| difference, paired over {len(record['rows'][0]['psnr'])} videos | PSNR, dB | 95 % interval "
        "| in density |",
        "|---|---|---|---|",
    ]
    for a, b in _PAIRS:
        if a in rows and b in rows:
            difference = np.array(rows[a]["psnr"]) - np.array(rows[b]["psnr"])
            low, high = bootstrap_interval(difference)
            lines.append(
                f"| {rows[a]['name']} − {rows[b]['name']} | {difference.mean():+.2f} | "
                f"[{low:+.2f}, {high:+.2f}] | {rows[a]['density'] - rows[b]['density']:+.3f} |"
            )
    return lines


def _assumptions(record: dict[str, Any]) -> list[str]:
    lines = []
    if (overlap := record["overlap"]) is not None:
        lines.append(
            f"* Drift against mask overlap from one step to the next: Spearman {overlap['spearman']:.3f} "
            f"over {overlap['pairs']:,} pairs (the paper: −0.757); with drift relative to the anchors "
            f"{overlap['spearman_relative']:.3f}; within one head, over its steps, "
            f"{overlap['spearman_within_heads']:.3f} (median)."
        )
    if (joint := record["joint"]) is not None:
        lines.append(
            f"* Joint error of all heads sparse, at {joint['states']} states: the additive sum predicts "
            f"{joint['additive']:.3g}, the probes {joint['quadratic']:.3g}; measured "
            f"{joint['measured_seen']:.3g} at the states of calibration, "
            f"{joint['measured_unseen']:.3g} at others."
        )
    if record["forms"] is not None:
        lines.append(
            "* Gradient against exact E over all heads and candidates: Spearman "
            f"{record['forms']['spearman']:.3f}."
        )
    return lines + _at_equal_time(record)


def _at_equal_time(record: dict[str, Any]) -> list[str]:
    """PSNR of SVG2 at XAttention's busy time, on straight lines between SVG2's rows of falling density."""
    timed = {
        row["name"]: (busy / row["seconds"]["busy_dense"], _mean(row["psnr"]))
        for row in record["rows"]
        if row["seconds"] and (busy := row["seconds"]["busy_sparse"])
    }
    first = timed.get("+ EBC + TMR")
    second = sorted(point for name, point in timed.items() if name.startswith("SVG2 + EBC + TMR"))
    if first is None or not second:
        return []
    what = (
        f"* At equal time: XAttention + EBC + TMR keeps the GPU busy for {first[0]:.3f} of dense, "
        f"at {first[1]:.2f} dB"
    )
    times = f"{second[0][0]:.3f} to {second[-1][0]:.3f}"
    if not second[0][0] <= first[0] <= second[-1][0]:
        return [f"{what}; SVG2 takes {times} at the densities that were run, so there is no equal time."]
    found = float(np.interp(first[0], *np.transpose(second)))  # type: ignore[call-overload]
    return [f"{what}; SVG2 takes {times} and comes to {found:.2f} dB at that time."]


def _ratio(seconds: dict[str, float | None], kind: str) -> str:
    """Sparse over dense, where both were measured."""
    sparse, dense = seconds.get(f"{kind}sparse"), seconds.get(f"{kind}dense")
    return "–" if sparse is None or dense is None else f"{sparse / dense:.2f}"


def forms(record: dict[str, Any], command: str) -> str:
    """One sentence on agreement and cost."""
    low, high = record["joint_ratio_interval"]
    setting = record["setting"]
    return (
        f"`{command}`: {_where(record)}. {record['states']} states of {setting['videos']} video(s), "
        f"{setting['probes']} probes a state. Spearman {record['spearman']:.3f} over {record['heads']} heads "
        f"× {len(record['candidates'])} candidates; joint error gradient / exact {record['joint_ratio']:.3f} "
        f"[{low:.3f}, {high:.3f}] at unseen states; measuring took {record['seconds']['exact']:.1f} s in the "
        f"exact form and {record['seconds']['gradient']:.2f} s in the gradient form, "
        f"{record['cost_ratio']:.0f} times less."
    )


def cost(record: dict[str, Any], command: str) -> str:
    """A few sentences on an estimate."""
    gradient, exact = (record["estimates"][name]["seconds"] / 60 for name in ("gradient", "exact"))
    blocks, peak = record["blocks"], record["peak_bytes"]
    part = (
        ""
        if blocks["timed"] == blocks["model"]
        else f", timed on {blocks['timed']} of {blocks['model']} blocks"
    )
    memory = "" if peak is None else f" The parts needed {peak / 1e9:.0f} GB at most."
    return (
        f"`{command}`: Wan 2.1 {record['model'].upper()} with random weights{part}, "
        f"{record['frames']} frames of {record['height']}×{record['width']}, {record['steps']} steps. "
        f"{_where(record)}. One forward takes {record['seconds']['forward']:.2f} s, a probe's way back "
        f"{record['seconds']['backward']:.2f} s.{memory} Estimate: {gradient:.0f} min in the gradient form, "
        f"{exact:.0f} min in the exact form."
    )


WRITERS: dict[str, Callable[[dict[str, Any], str], str]] = {"study": study, "forms": forms, "cost": cost}


def plots(name: str, record: dict[str, Any]) -> dict[str, str]:
    """The plots of one record: file name -> what it shows."""
    if not name.startswith("study"):
        return {}
    found = {f"calibration-{name}-quality.png": "PSNR to dense against density, every setting"}
    if record["forms"] is not None:
        found[f"calibration-{name}-forms.png"] = "E of every head and candidate, gradient against exact form"
    return found


def plot(name: str, record: dict[str, Any], folder: Path) -> None:
    """Draw quality against density, and the two forms' errors against each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for row in record["rows"]:
        point = axes.errorbar(
            row["density"],
            _mean(row["psnr"]),
            yerr=[[_mean(row["psnr"]) - min(row["psnr"])], [max(row["psnr"]) - _mean(row["psnr"])]],
            fmt="o",
            capsize=2,
        )
        axes.annotate(
            row["name"],
            (row["density"], _mean(row["psnr"])),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=7,
            color=point[0].get_color(),
        )
    axes.set(xlabel="density", ylabel="PSNR to dense, dB (mean, range)")
    figure.tight_layout()
    figure.savefig(folder / f"calibration-{name}-quality.png", dpi=90)
    pyplot.close(figure)
    if record["forms"] is None:
        return
    figure, axes = pyplot.subplots(figsize=(4.6, 4.2))
    a, b = record["forms"]["exact"], record["forms"]["gradient"]
    axes.loglog(a, b, ".", markersize=4)
    ends = [min(x for x in (*a, *b) if x > 0), max(*a, *b)]
    axes.loglog(ends, ends, linewidth=0.8, color="grey")
    axes.set(xlabel="E, exact form", ylabel="E, gradient form")
    figure.tight_layout()
    figure.savefig(folder / f"calibration-{name}-forms.png", dpi=90)
    pyplot.close(figure)


def _where(record: dict[str, Any]) -> str:
    return f"{record['device']}, {record['dtype']}, torch {record['versions']['torch']}"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def main() -> None:
    for name, (file, _) in RECORDS.items():
        if name.startswith("study") and (RESULTS / file).is_file():
            PLOTS.mkdir(exist_ok=True)
            plot(name, json.loads((RESULTS / file).read_text(encoding="utf-8")), PLOTS)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
