"""A trap of Triton's that no interpreter shows: a loop that renews an alias does not carry it.

Triton visits the body of a loop once and carries the names whose value is another one afterwards. With
``before = token`` ahead of the loop and ``before = token; token = ...`` in it, ``before`` is what it was, so
it stays the first token for good. Attention over clusters once gathered the wrong values so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "kernels").rglob("*.py"))

TRAPPED = """
@gluon.jit
def produce(token, count):
    before = token
    for step in range(count):
        if step > 0:
            gather(before)
        before = token
        token = load(step)
"""


def names(statement: ast.stmt) -> dict[str, str | None]:
    """What a statement assigns: name -> the name that it makes it an alias of, if it does."""
    found: dict[str, str | None] = {}
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = None
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        found |= {to.id: statement.value.id for to in statement.targets if isinstance(to, ast.Name)}
    return found


def trapped(body: Sequence[ast.stmt], aliases: dict[str, str]) -> Iterator[str]:
    """Names that a loop makes an alias of what they were an alias of before it, and that changes in it."""
    for statement in body:
        blocks = [getattr(statement, field, []) for field in ("body", "orelse")]
        if isinstance(statement, ast.For | ast.While):
            inner = [
                node for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement
            ]
            renewed = {name: of for node in inner for name, of in names(node).items() if of is not None}
            yield from (
                name for name, of in renewed.items() if aliases.get(name) == of and of in names(statement)
            )
        for block in blocks:
            yield from trapped(block, dict(aliases))
        for name, of in names(statement).items():
            aliases = {a: b for a, b in aliases.items() if name not in (a, b)}
            if of is not None:
                aliases[name] = of


def trapped_in(source: str) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    jit = [f for f in functions if any("jit" in ast.unparse(mark) for mark in f.decorator_list)]
    return [f"{function.name}: {name}" for function in jit for name in trapped(function.body, {})]


def test_the_trap_is_seen() -> None:
    assert trapped_in(TRAPPED) == ["produce: before"]
    assert trapped_in(TRAPPED.replace("before = token\n    for", "before = load(0)\n    for")) == []
    assert trapped_in(TRAPPED.replace("        token = load(step)\n", "")) == []  # it never changes


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_kernel_is_trapped(path: Path) -> None:
    assert trapped_in(path.read_text(encoding="utf-8")) == []
