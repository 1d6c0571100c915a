"""What became of every attention site of a graph, for users and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from haste_compile.passes.base import AttentionSite, PassContext
from haste_compile.token_order import describe


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """One attention site.

    Attributes:
        name: path of the module it runs in, or "node <name>" where the graph does not say.
        kind: "self" or "cross".
        status: "rewritten" or "skipped"; "eligible" in a report made without rewriting.
        reason: why it is skipped; empty otherwise.
        shape: [B, H, N, D] of the queries; a symbolic size by the name of its symbol.
        dtype, device: as torch prints them, without "torch.".
    """

    name: str
    kind: str
    status: str
    reason: str
    shape: tuple[int | str, ...]
    dtype: str
    device: str

    @classmethod
    def of(cls, site: AttentionSite) -> SiteRecord:
        return cls(
            name=site.label,
            kind=site.kind,
            status=site.status,
            reason=site.reason,
            shape=tuple(size if isinstance(size, int) else str(size) for size in site.shape),
            dtype=str(site.dtype).removeprefix("torch."),
            device=str(site.device),
        )


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """The attention sites of one compiled graph, in graph order; ``str()`` gives a table.

    Attributes:
        sites: the sites.
        token_order: the order of the tokens that the rewritten sites see, and in what grid, in words.
        order_reason: why it is not the order asked for; empty otherwise.
    """

    sites: tuple[SiteRecord, ...]
    token_order: str = "raster"
    order_reason: str = ""

    @classmethod
    def from_context(cls, ctx: PassContext) -> GraphReport:
        order = ctx.order
        words = describe(order.name, order.grid, ctx.config.block_size) if order.grid else order.name
        return cls(tuple(SiteRecord.of(site) for site in ctx.sites), words, order.reason)

    def under(self, prefix: str) -> GraphReport:
        """The same report with ``prefix`` before every site's name."""
        sites = tuple(dataclasses.replace(site, name=prefix + site.name) for site in self.sites)
        return dataclasses.replace(self, sites=sites)

    @property
    def rewritten(self) -> tuple[SiteRecord, ...]:
        return tuple(site for site in self.sites if site.status == "rewritten")

    @property
    def skipped(self) -> tuple[SiteRecord, ...]:
        return tuple(site for site in self.sites if site.status == "skipped")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes."""
        return {
            "sites_rewritten": len(self.rewritten),
            "sites_skipped": len(self.skipped),
            "token_order": self.token_order,
            "order_reason": self.order_reason,
            "sites": [dataclasses.asdict(site) | {"shape": list(site.shape)} for site in self.sites],
        }

    def __str__(self) -> str:
        rows = [("site", "status", "shape", "dtype", "device", "reason")]
        for site in self.sites:
            shape = "×".join(map(str, site.shape))
            rows.append((site.name, site.status, shape, site.dtype, site.device, site.reason))
        head = (
            f"{len(self.sites)} attention sites: {len(self.rewritten)} rewritten, {len(self.skipped)} skipped"
        )
        return "\n".join([head, *_aligned(rows), *self.order_lines()])

    def order_lines(self) -> list[str]:
        """A line on the order of the tokens, unless it is raster order and no other was asked for."""
        if self.order_reason:
            return [f"tokens stay in raster order: {self.order_reason}"]
        return [] if self.token_order == "raster" else [f"token order {self.token_order}"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
