"""Profiles on disk: saved and read back, and 200 ways to be damaged, each with a typed error."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from tiny_calibration import Finished

from haste_compile import CalibrationProfile
from haste_compile.calibration.profile import JSON_NAME, TABLES_NAME, sign
from haste_compile.errors import BudgetError, OptionError, OutputPathError, ProfileError


def same(a: CalibrationProfile, b: CalibrationProfile) -> bool:
    tables = ("top_p", "delta", "errors", "sparsities", "candidates", "products", "density", "error")
    return a.to_dict() == b.to_dict() and all(
        np.array_equal(getattr(a.experts[name], table), getattr(b.experts[name], table))
        for name in a.experts
        for table in tables
    )


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def test_read_back_as_saved(finished: Finished, tmp_path: Path) -> None:
    found = CalibrationProfile.load(finished.folder)
    assert same(found, finished.profile)
    found.save(tmp_path / "again")
    for name in (JSON_NAME, TABLES_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (finished.folder / name).read_bytes()


def test_says_what_it_was_made_from(finished: Finished) -> None:
    facts = json.loads((finished.folder / JSON_NAME).read_text())
    assert facts["schema"] == 1 and facts["pipeline"] == "WanPipeline"
    assert facts["request"]["steps"] == 5 and facts["request"]["guidance"] == 3.0
    assert facts["scheduler"]["class"] == "UniPCMultistepScheduler" and facts["scheduler"]["shift"] == 3.0
    assert facts["options"]["block_size"] == 64 and facts["options"]["gate"] == [0.4, 0.8]
    assert set(facts["experts"]) == {"transformer", "transformer_2"}
    first, second = facts["experts"].values()
    assert first["steps"] + second["steps"] == [1, 2, 3, 4], "all but the dense step, each served by one"
    assert first["fingerprint"] != second["fingerprint"]
    assert facts["prompts"]["count"] == 3 and len(facts["draws"]["videos"]) == 1
    assert {"torch", "haste_compile"} <= set(facts["versions"]) and facts["device"]
    assert set(facts["held_out"]["psnr_db"]) == {"mean", "std", "worst"}
    drawn = [v["prompt"] for v in facts["draws"]["videos"]]
    assert facts["draws"]["held_out"][0]["prompt"] not in drawn
    assert str(finished.folder) not in (finished.folder / JSON_NAME).read_text()


def test_a_budget_can_be_met_anew(finished: Finished) -> None:
    expert = finished.profile.experts["transformer"]
    loose = finished.profile.with_budget("sparsity:0.01").experts["transformer"]
    tight = finished.profile.with_budget("shared:0.3", "quadratic").experts["transformer"]
    assert loose.density.mean() > expert.density.mean() > tight.density.mean()
    assert loose.error.sum() < expert.error.sum() < tight.error.sum()
    with pytest.raises(BudgetError, match="density"):
        finished.profile.with_budget("density:0.01")
    with pytest.raises(OptionError, match="keep_products"):
        expert.without_products().allocated("shared:0.3", "quadratic")


def test_saved_where_nothing_can_be_written(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputPathError):
        finished.profile.save(tmp_path / "file")


# --- damage that a checksum sees


def damaged(files: dict[str, bytes], seed: int) -> dict[str, bytes]:
    """One of the two files truncated, with flipped bits, with bytes cut out or put in, or gone."""
    rng = np.random.default_rng(seed)
    name = [JSON_NAME, TABLES_NAME][rng.integers(2)]
    content = bytearray(files[name])
    where = int(rng.integers(len(content)))
    match seed % 5:
        case 0:
            content = content[:where]
        case 1:
            content[where] ^= 1 << int(rng.integers(8))
        case 2:
            for place in rng.integers(len(content), size=20):
                content[place] ^= int(rng.integers(1, 256))
        case 3:
            del content[where : where + int(rng.integers(1, 50))]
        case 4:
            content[where:where] = rng.bytes(int(rng.integers(1, 50)))
    return {**files, name: bytes(content)}


@pytest.mark.parametrize("decade", range(16))
def test_damage_is_a_typed_error(finished: Finished, copy: Path, decade: int) -> None:
    """160 damaged profiles, ten in each case."""
    files = {name: (finished.folder / name).read_bytes() for name in (JSON_NAME, TABLES_NAME)}
    for seed in range(10 * decade, 10 * decade + 10):
        broken = damaged(files, seed)
        assert broken != files
        for name, content in broken.items():
            (copy / name).write_bytes(content)
        with pytest.raises(ProfileError):
            CalibrationProfile.load(copy)


# --- damage by someone who signs it again


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        place: Any = facts
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


FACTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown version": _set("schema", value=2),
    "version true": _set("schema", value=True),
    "other format": _set("format", value="something"),
    "no model": lambda facts: facts.pop("model"),
    "unknown field": _set("tables", value="../../etc/passwd"),
    "path as expert": lambda facts: facts["experts"].update(
        {"../transformer": facts["experts"]["transformer"]}
    ),
    "no experts": _set("experts", value={}),
    "experts a list": _set("experts", value=[]),
    "wrong head count": _set("experts", "transformer", "heads", value=3),
    "no heads": _set("experts", "transformer", "heads", value=0),
    "heads a float": _set("experts", "transformer", "heads", value=2.0),
    "too many sites": lambda facts: facts["experts"]["transformer"]["sites"].append("blocks.2.attn1"),
    "sites no text": _set("experts", "transformer", "sites", value=[1, 2]),
    "other weights' hash": _set("experts", "transformer", "fingerprint", value="0" * 64),
    "negative tokens": _set("experts", "transformer", "tokens", value=-1),
    "density above 1": _set("experts", "transformer", "density", value=1.5),
    "option unknown": _set("options", "speed", value=1),
    "option out of range": _set("options", "block_size", value=100),
    "gate no pair": _set("options", "gate", value=[0.9]),
    "stride a text": _set("options", "stride", value="16"),
    "steps zero": _set("request", "steps", value=0),
    "guidance a text": _set("request", "guidance", value="5"),
    "shift a text": _set("scheduler", "shift", value="8"),
    "held out a number": _set("held_out", value=1),
    "held out PSNR a text": _set("held_out", "psnr_db", "mean", value="30"),
    "versions no texts": _set("versions", value={"torch": 2}),
    "a huge text": _set("model", value="x" * 20_000),
}

TABLES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "NaN threshold": lambda t: t["transformer.top_p"].__setitem__((0, 0), np.nan),
    "infinite error": lambda t: t["transformer.errors"].__setitem__((0, 0, 0), np.inf),
    "threshold above 1": lambda t: t["transformer.top_p"].__setitem__((0, 0), 1.5),
    "threshold no candidate": lambda t: t["transformer.top_p"].__setitem__((0, 0), 0.55),
    "negative delta": lambda t: t["transformer.delta"].__setitem__((0, 0), -1.0),
    "delta beyond float32": lambda t: t["transformer.delta"].__setitem__((0, 0), 1e39),
    "missing table": lambda t: t.pop("transformer.delta"),
    "unknown table": lambda t: t.update({"transformer.more": np.zeros(1)}),
    "table of nobody": lambda t: t.update({"transformer_3.top_p": np.zeros(1)}),
    "table with a path": lambda t: t.update({"../transformer.top_p": np.zeros(1)}),
    "transposed": lambda t: t.update(
        {"transformer.errors": t["transformer.errors"].transpose(2, 1, 0).copy()}
    ),
    "other dtype": lambda t: t.update({"transformer.top_p": t["transformer.top_p"].astype(np.float32)}),
    "candidates descending": lambda t: t.update(
        {"transformer.candidates": t["transformer.candidates"][::-1].copy()}
    ),
    "sparsity above 1": lambda t: t["transformer_2.sparsities"].__setitem__((0, 0, 0), 1.1),
    "products of another size": lambda t: t.update({"transformer.products": np.zeros((2, 2), np.float32)}),
    "sizes of no parameter": lambda t: t["transformer.fingerprint_sizes"].__setitem__(0, 0),
}


def write_signed(folder: Path, facts: dict[str, Any], tables: bytes) -> None:
    facts.pop("checksum", None)
    (folder / TABLES_NAME).write_bytes(tables)
    (folder / JSON_NAME).write_bytes(sign(facts, tables))


@pytest.mark.parametrize("damage", FACTS)
def test_signed_nonsense_in_the_json_is_refused(copy: Path, damage: str) -> None:
    facts = json.loads((copy / JSON_NAME).read_text())
    FACTS[damage](facts)
    write_signed(copy, facts, (copy / TABLES_NAME).read_bytes())
    with pytest.raises(ProfileError) as caught:
        CalibrationProfile.load(copy)
    assert "checksum" not in str(caught.value)


@pytest.mark.parametrize("damage", TABLES)
def test_signed_nonsense_in_the_tables_is_refused(copy: Path, damage: str) -> None:
    tables = load((copy / TABLES_NAME).read_bytes())
    TABLES[damage](tables)
    write_signed(copy, json.loads((copy / JSON_NAME).read_text()), save(tables))
    with pytest.raises(ProfileError) as caught:
        CalibrationProfile.load(copy)
    assert "checksum" not in str(caught.value)


def test_signing_again_alone_changes_nothing(finished: Finished, copy: Path) -> None:
    """So the two tests above see the nonsense and not the signature."""
    tables = save(load((copy / TABLES_NAME).read_bytes()))
    write_signed(copy, json.loads((copy / JSON_NAME).read_text()), tables)
    assert same(CalibrationProfile.load(copy), finished.profile)


def _huge_header(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


@pytest.mark.parametrize("tables", [_huge_header(2**62), _huge_header(2**40), b"", b"\x02", _huge_header(2)])
def test_a_header_that_lies_is_refused(copy: Path, tables: bytes) -> None:
    write_signed(copy, json.loads((copy / JSON_NAME).read_text()), tables)
    with pytest.raises(ProfileError):
        CalibrationProfile.load(copy)


def test_nan_in_the_json_is_refused(copy: Path) -> None:
    text = (copy / JSON_NAME).read_text().replace('"guidance": 3.0', '"guidance": NaN')
    assert "NaN" in text
    (copy / JSON_NAME).write_text(text)
    with pytest.raises(ProfileError, match="NaN"):
        CalibrationProfile.load(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"format": "haste-calibration-profile"}', "[" * 10**5]
)
def test_no_profile_at_all_is_refused(copy: Path, text: str) -> None:
    (copy / JSON_NAME).write_text(text)
    with pytest.raises(ProfileError):
        CalibrationProfile.load(copy)


def test_large_files_are_not_read(copy: Path) -> None:
    with (copy / JSON_NAME).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(ProfileError, match="bytes"):
        CalibrationProfile.load(copy)


@pytest.mark.parametrize("name", [JSON_NAME, TABLES_NAME])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ProfileError, match=name):
        CalibrationProfile.load(copy)
