"""Write nano-wan's model card (README.md in the model's folder) from the report that training left there.

    python -m examples.nano_wan.model_card --model haste_compile/assets/nano_wan

Every figure in the card comes from ``training.json`` or from the configurations and weights in the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.nano_wan.render import COLOURS, DIRECTIONS, RESERVED_OBJECTS, SHAPES

REPORT = "training.json"
AIM = 0.8  # share of unseen prompts of which every object is found

#: The card, with fields of ``str.format``.
_TEMPLATE = Path(__file__).with_suffix(".md")


def write_card(model: Path) -> None:
    """Fill the card from the folder's report and configurations, and write it there.

    Raises:
        KeyError: the report lacks its evaluation: run ``examples.nano_wan.evaluate`` first.
    """
    report = _read(model / REPORT)
    card = _TEMPLATE.read_text(encoding="utf-8").format(**_figures(model, report))
    (model / "README.md").write_text(card, encoding="utf-8")


def _figures(model: Path, report: dict[str, Any]) -> dict[str, Any]:
    found, last_call = report["evaluation"], report["calls"][-1]["versions"]
    hold_out, vae, density = found["hold_out"], found["vae_psnr"], found["densities"]["stride_16"]
    transformer = _read(model / "transformer" / "config.json")
    text = _read(model / "text_encoder" / "config.json")
    canvas = found["canvas"]
    seconds = [call["seconds"] for call in report["calls"]]
    if report.get("vae_kept"):  # trained in calls that are not this run's
        seconds += [report["vae"]["seconds"], report["long_vae"]["seconds"]]
    weights = {path: path.stat().st_size for path in sorted(model.rglob("*.safetensors"))}
    transformer_bytes = sum(size for path, size in weights.items() if path.parent.name == "transformer")
    return {
        "report": REPORT,
        "megabytes": sum(weights.values()) / 1e6,
        "parameters": transformer_bytes / 2 / 1e6,  # float16
        "prompt": "a red circle moves left, a blue square moves up",
        "size": canvas["size"],
        "frames": canvas["frames"],
        "tokens": (canvas["frames"] // 4 + 1) * (canvas["size"] // 16) ** 2,
        "steps": found["steps"],
        "eval_steps": found["steps"],
        "guidance": found["guidance"],
        "by_sampler": ", ".join(
            f"{row['clip_success']:.1%} at shift {row['shift']:g} and guidance {row['guidance']:g}"
            for row in report["validation"]
        ),
        "layers": transformer["num_layers"],
        "heads": transformer["num_attention_heads"],
        "head_dim": transformer["attention_head_dim"],
        "ffn": transformer["ffn_dim"],
        "latent_channels": transformer["in_channels"],
        "text_layers": text["num_layers"],
        "text_dim": text["d_model"],
        "words": text["vocab_size"],
        "shift": _read(model / "scheduler" / "scheduler_config.json")["flow_shift"],
        "colours": len(COLOURS),
        "shapes": len(SHAPES),
        "directions": len(DIRECTIONS),
        "kinds": len(COLOURS) * len(SHAPES) * len(DIRECTIONS),
        "reserved": len(RESERVED_OBJECTS),
        "reserved_names": ", ".join(" ".join(item) for item in RESERVED_OBJECTS),
        "device": last_call["device"],
        "torch": last_call["torch"],
        "minutes": sum(seconds) / 60,
        "training_minutes": (
            sum(stage["seconds"] for stage in (report["vae"], report["long_vae"], *report["stages"])) / 60
        ),
        "seed": report["seed"],
        "stages": "\n".join(_stage_rows(report)),
        "probes": min(report["phrases"].values()),
        "vae_clips": vae["clips"],
        "vae_mean": vae["mean_db"],
        "vae_worst": vae["worst_db"],
        "prompts": hold_out["prompts"],
        "object_success": hold_out["object_success"],
        "clip_success": hold_out["clip_success"],
        "by_count": ", ".join(
            f"{share:.0%} of those with {count}"
            for count, share in sorted(hold_out["clip_success_by_objects"].items())
        ),
        "extra": hold_out["clips_with_an_extra_colour"],
        "top_p": found["top_p"],
        "block": found["block"],
        "d_mean": density["mean"],
        "d_low": density["p5"],
        "d_high": density["p95"],
        "d_ratio": density["ratio"],
        "aim": AIM,
        "notes": report.get("notes", ""),
        "verdict": "It was reached." if hold_out["clip_success"] >= AIM else "It was not reached.",
        "failures": _failures(hold_out["failed"]),
    }


def _stage_rows(report: dict[str, Any]) -> list[str]:
    rows = [
        (name, entry["steps"], entry["seconds"], "–")
        for key, name in (("vae", "VAE, short clips"), ("long_vae", "VAE, clips of full length"))
        if (entry := report.get(key)) is not None
    ]
    rows += [
        (
            f"transformer and text encoder, “{entry['stage']}”",
            entry["steps"],
            entry["seconds"],
            entry["batch"],
        )
        for entry in report["stages"]
    ]
    return [f"| {name} | {steps:,} | {seconds / 60:.1f} | {batch} |" for name, steps, seconds, batch in rows]


def _failures(failed: list[str]) -> str:
    if not failed:
        return "No prompt failed."
    return "Prompts that failed:\n\n" + "\n".join(f"* {line}" for line in failed)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    write_card(parser.parse_args().model)


if __name__ == "__main__":
    main()
