"""Mask state: one ``HasteState`` for each transformer instance and set of sites, found by parameter identity.

Compiled graphs do not know which module instance calls them: two transformers of equal shape share one graph,
and so do all blocks under regional compilation. So nothing that belongs to an instance is baked into the
graph. The backend asks here at every call, with a parameter among the call's arguments as the key, and hands
the buffers found to the graph as further inputs. Keys are weak: state dies with its transformer.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from haste_compile.clock import Clock
from haste_compile.config import HasteConfig, threshold_row
from haste_compile.errors import StateError
from haste_compile.kernels.layout import Counter, Ctl
from haste_compile.predictors import get_predictor
from haste_compile.predictors.base import THRESHOLDS, site_layouts
from haste_compile.token_order import ORDER_FIELDS, Grid, order_tensor

logger = logging.getLogger(__name__)

#: With ``stats=True``: how many of the latest calls are remembered.
RECORDED_CALLS = 1000


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """What one rewritten site needs state for.

    Attributes:
        name: path of its module.
        B, H, N, D: the attention shape.
        device: where it runs.
        grid: [T, H, W] of the tokens where they are in another order than raster; None in raster order.
    """

    name: str
    B: int
    H: int
    N: int
    D: int
    device: torch.device
    grid: Grid | None = None


@dataclasses.dataclass(frozen=True)
class StepStatistics:
    """What one call of a compiled graph did, over its sites and heads; recorded with ``stats=True``.

    The graph is the whole transformer, or one block under regional compilation.

    Attributes:
        slot: the CFG branch.
        step: 0-based denoising step in the video.
        refresh_rate: share of the heads that rebuilt their mask.
        density: computed query-key pairs over all pairs.
    """

    slot: int
    step: int
    refresh_rate: float
    density: float


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the rewritten sites did in the videos that their slots still remember.

    Attributes:
        sites: names of the L sites.
        density_by_head: [L][H], computed query-key pairs over all pairs, dense warm-up calls included.
        refresh_rate_by_head: [L][H], rebuilds over calls.
        calls: attention calls counted, over all sites, heads, branches and samples.
        steps: with ``stats=True``, every recorded call, oldest first.
    """

    sites: tuple[str, ...]
    density_by_head: tuple[tuple[float, ...], ...]
    refresh_rate_by_head: tuple[tuple[float, ...], ...]
    refreshes: int
    calls: int
    steps: tuple[StepStatistics, ...] = ()

    @property
    def density(self) -> float:
        return _mean(self.density_by_head)

    @property
    def refresh_rate(self) -> float:
        return _mean(self.refresh_rate_by_head)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "density": self.density, "refresh_rate": self.refresh_rate}


class HasteState(nn.Module):
    """Thresholds and mask cache of the sites of one graph, for one transformer instance.

    Every buffer has at least two elements (AOTInductor folds one-element buffers as constants) and keeps its
    address for life (CUDA graphs). Their shapes are the predictor's to say.

    Args:
        specs: one for each rewritten site, in graph order.
        config: options of the compile call.
        clock: the clock that serves these sites.
        rows: rows of the [L][H] threshold tables that belong to the sites, and L.
        thresholds: tables instead of the options', by name: a profile's.

    Raises:
        ThresholdError: a threshold table does not fit the sites.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        config: HasteConfig,
        *,
        clock: Clock,
        rows: tuple[Sequence[int], int],
        thresholds: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.specs, self.config, self.clock = tuple(specs), config, clock
        self._records: deque[tuple[Tensor, list[Tensor]]] = deque(maxlen=RECORDED_CALLS)
        indices, total = rows
        tables = thresholds or {name: getattr(config, name) for name in THRESHOLDS}
        grid, device = specs[0].grid, specs[0].device
        with torch.inference_mode(False):
            if grid is not None:
                for field in ORDER_FIELDS:
                    order = order_tensor(field, config.token_order, grid, config.block_size)
                    self.register_buffer(field, order.to(device), persistent=False)
            for i, (spec, row) in enumerate(zip(self.specs, indices, strict=True)):
                shape = (spec.B, spec.H, spec.N, spec.D)
                layouts = site_layouts(get_predictor(config.predictor), shape, config)
                del layouts["ctl"]  # the clock's
                for field, (size, dtype) in layouts.items():
                    if field in THRESHOLDS:
                        tensor = _heads(field, tables[field], row, total, spec)
                    else:
                        tensor = torch.zeros(tuple(map(int, size)), dtype=dtype, device=spec.device)
                    self.register_buffer(f"{field}_{i}", tensor, persistent=False)

    def tensor(self, site: int | None, field: str) -> Tensor:
        """The buffer of a site's field; ``ctl`` and the token orders belong to no site."""
        if field == "ctl":
            return self.clock.ctl
        return self.get_buffer(field if site is None else f"{field}_{site}")

    def replace(self, site: int, field: str, tensor: Tensor) -> None:
        """Put another tensor in a field's place, for runtimes that return new state."""
        setattr(self, f"{field}_{site}", tensor)

    def reset(self) -> None:
        """Forget every mask, all that it was made from, and every count; thresholds and orders stay."""
        for name, buffer in self.named_buffers(recurse=False):
            if name not in ORDER_FIELDS and name.rpartition("_")[0] not in THRESHOLDS:
                buffer.zero_()
        self._records.clear()
        self.clock.reset()

    def counters(self) -> list[Tensor]:
        """[S, B, H, 8] of every site, on the host."""
        return [self.tensor(i, "counters").cpu() for i in range(len(self.specs))]

    def count_dense_call(self) -> None:
        """Count a call that ran dense without the ops, as they count a dense step of their own."""
        slot, epoch = self.clock.ctl[Ctl.SLOT].reshape(1).long(), self.clock.ctl[Ctl.EPOCH].long()
        for i, spec in enumerate(self.specs):
            counters = self.tensor(i, "counters")
            row = counters.index_select(0, slot)
            same_video = (row[..., Counter.SEEN] == epoch).long()
            for column in (Counter.AGE, Counter.REFRESHES, Counter.CALLS, Counter.KEPT_SUM):
                row[..., column] *= same_video
            row[..., Counter.SEEN] = epoch
            row[..., Counter.CALLS] += 1
            row[..., Counter.KEPT_SUM] += spec.N**2
            counters.index_copy_(0, slot, row)

    def record(self) -> None:
        """Remember the counters after a call; copies on the device, reads nothing back."""
        counters = [self.tensor(i, "counters").clone() for i in range(len(self.specs))]
        self._records.append((self.clock.ctl.clone(), counters))

    def steps(self) -> Iterator[StepStatistics]:
        """The recorded calls, oldest first; reads the device."""
        last: dict[int, tuple[int, Tensor]] = {}  # slot -> its epoch and counters after its latest call
        pairs = torch.tensor([spec.N**2 for spec in self.specs], dtype=torch.float64)
        for ctl, counters in self._records:
            slot, epoch = int(ctl[Ctl.SLOT]), int(ctl[Ctl.EPOCH])
            sums = torch.stack([site[slot].sum((0, 1)).cpu() for site in counters]).double()
            before = last[slot][1] if slot in last and last[slot][0] == epoch else torch.zeros_like(sums)
            done, last[slot] = sums - before, (epoch, sums)
            calls = done[:, Counter.CALLS]
            yield StepStatistics(
                slot=slot,
                step=int(ctl[Ctl.STEP]),
                refresh_rate=float(done[:, Counter.REFRESHES].sum() / calls.sum()),
                density=float(done[:, Counter.KEPT_SUM].sum() / (calls * pairs).sum()),
            )

    def nbytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def statistics_of(states: Iterable[HasteState]) -> Statistics:
    """Add up the counters of ``states``; reads the device."""
    names: list[str] = []
    density: list[tuple[float, ...]] = []
    rate: list[tuple[float, ...]] = []
    refreshes = calls = 0
    steps: list[StepStatistics] = []
    for state in states:
        steps += state.steps()
        for spec, counters in zip(state.specs, state.counters(), strict=True):
            sums = counters.sum((0, 1)).double()  # [H, 8]
            if not sums[:, Counter.CALLS].any():
                continue
            names.append(spec.name)
            pairs = sums[:, Counter.CALLS] * spec.N**2
            density.append(tuple((sums[:, Counter.KEPT_SUM] / pairs).tolist()))
            rate.append(tuple((sums[:, Counter.REFRESHES] / sums[:, Counter.CALLS]).tolist()))
            refreshes += int(sums[:, Counter.REFRESHES].sum())
            calls += int(sums[:, Counter.CALLS].sum())
    return Statistics(tuple(names), tuple(density), tuple(rate), refreshes, calls, tuple(steps))


class Attachment:
    """Ties the blocks of one transformer to one clock, for graphs that see a single block.

    A block's graph sees neither timestep nor text. A forward pre-hook on the transformer, which runs
    outside of the compiled blocks, ticks the clock instead. Without an attachment such graphs rebuild
    every mask at every call.
    """

    def __init__(self, transformer: nn.Module, blocks: Sequence[nn.Module], config: HasteConfig) -> None:
        self.blocks, self.config = len(blocks), config
        self._clocks: dict[torch.device, Clock] = {}
        self.hook = transformer.register_forward_pre_hook(self._tick, with_kwargs=True)
        self.parameters = [weakref.ref(p) for block in blocks for p in block.parameters()]
        for index, block in enumerate(blocks):
            for parameter in block.parameters():
                _attachments[parameter] = (self, index)

    def clock(self, device: torch.device) -> Clock:
        if device not in self._clocks:
            self._clocks[device] = clock_for(self.config, device)
        return self._clocks[device]

    def _tick(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = {**dict(zip(CLOCK_INPUTS, args, strict=False)), **kwargs}
        latents, timestep, text = (call[name] for name in CLOCK_INPUTS)
        self.clock(latents.device).tick(latents, timestep, text)

    def detach(self) -> None:
        self.hook.remove()
        for reference in self.parameters:
            parameter = reference()
            if parameter is not None:
                _attachments.pop(parameter, None)
                _states.pop(parameter, None)


#: How many video sizes (or option sets) of one instance keep their masks. A server meets many sizes, and at
#: 720p the state of a 14B model takes 0.3 GB; a size that comes back later starts with new masks.
SIZES = 4

#: The transformer's arguments that the clock reads, in the order of its ``forward``.
CLOCK_INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")

_states: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {(specs, config): HasteState}
_attachments: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> (Attachment, index of its block)


def find_state(
    anchor: Tensor,
    specs: tuple[StateSpec, ...],
    config: HasteConfig,
    *,
    sees_clock: bool,
    arguments: Sequence[Any] = (),
) -> HasteState:
    """The state of the instance that ``anchor`` belongs to, made at the first call.

    Args:
        anchor: a parameter of the instance, as the compiled graph receives it.
        specs: the graph's rewritten sites.
        config: the graph's options.
        sees_clock: the graph itself sees latents, timestep and text.
        arguments: of the call, the instance's parameters among them: a profile is for certain weights.

    Raises:
        ProfileError: the options name a profile that is for other weights or other sites.
        StateError: blocks that were compiled one by one in a way that cannot work.
    """
    states = _states.get(anchor)
    if states is None:
        states = _states[anchor] = {}
    key = (specs, config)
    state = states.pop(key, None)
    if state is None:
        state = _make_state(anchor, specs, config, sees_clock, arguments)
        for oldest in list(states)[: max(0, len(states) - SIZES + 1)]:
            del states[oldest]
    states[key] = state  # last: used most recently
    return state


def _make_state(
    anchor: Tensor,
    specs: tuple[StateSpec, ...],
    config: HasteConfig,
    sees_clock: bool,
    arguments: Sequence[Any],
) -> HasteState:
    device = specs[0].device
    attached = _attachments.get(anchor)
    if not sees_clock and attached is None:
        _refuse_steps_without_clock(config)
    if sees_clock or attached is None:
        return HasteState(
            specs,
            config,
            clock=clock_for(config, device),
            rows=(range(len(specs)), len(specs)),
            thresholds=_profile_tables(config, specs, len(specs), arguments),
        )
    attachment, index = attached
    if config != attachment.config:
        raise StateError(
            found="blocks compiled with other options than their transformer was attached with",
            wanted="one set of options",
            where=f"block {index}",
            fix="Give optimize(..., compile='blocks') the options, and compile no block yourself.",
        )
    prefix = path_prefix(anchor)
    named = tuple(dataclasses.replace(spec, name=prefix + spec.name) for spec in specs)
    if len(specs) != 1:
        raise StateError(
            found=f"{len(specs)} rewritten sites in one block",
            wanted="one self-attention for each block",
            where=f"block {index}",
            fix="Compile the whole transformer instead of its blocks.",
        )
    return HasteState(
        named,
        config,
        clock=attachment.clock(device),
        rows=((index,), attachment.blocks),
        thresholds=_profile_tables(config, specs, attachment.blocks, arguments),
    )


def _profile_tables(
    config: HasteConfig, specs: Sequence[StateSpec], sites: int, arguments: Sequence[Any]
) -> Mapping[str, Any] | None:
    if config.profile is None:
        return None
    from haste_compile.calibration.use import thresholds

    parameters = [value for value in arguments if isinstance(value, nn.Parameter)]
    return thresholds(
        config.profile,
        config.profile_checksum,
        parameters,
        sites=sites,
        heads=specs[0].H,
        tokens=specs[0].N,
    )


def _refuse_steps_without_clock(config: HasteConfig) -> None:
    if config.dense_steps or config.reuse_rule[0] == "after":
        raise StateError(
            found=f"dense_steps={config.dense_steps} and reuse={config.reuse!r} without a timestep",
            wanted="a graph or an attachment that tells the denoising step",
            where="blocks compiled one by one",
            fix="Use haste_compile.optimize(..., compile='blocks'), or compile the whole transformer.",
        )
    logger.warning(
        "haste: this graph sees neither timestep nor text, so every mask is rebuilt at every call; "
        "haste_compile.optimize(..., compile='blocks') lets blocks reuse them"
    )


def path_prefix(parameter: Tensor) -> str:
    """What the names of sites lack in a graph that saw one attached block; empty for a whole transformer."""
    attached = _attachments.get(parameter)
    return f"blocks.{attached[1]}." if attached else ""


def clock_for(config: HasteConfig, device: torch.device) -> Clock:
    """A clock that follows the options."""
    rule, k = config.reuse_rule
    return Clock(
        slots=config.slots,
        dense_steps=config.dense_steps,
        rebuild_steps=k if rule == "after" else 0,
        device=device,
    )


def states_of(module: nn.Module) -> Iterator[HasteState]:
    """Every state that belongs to ``module``'s parameters, in the order of its parameters."""
    for parameter in module.parameters():
        yield from (_states.get(parameter) or {}).values()


def statistics(module: nn.Module) -> Statistics:
    """Density and refresh rate of a transformer's sites, in the videos that its slots remember."""
    return statistics_of(states_of(module))


def reset(module: nn.Module) -> None:
    """Forget every mask and video of a transformer. Not needed between videos: the clock tells them apart."""
    for state in states_of(module):
        state.reset()


def _heads(name: str, thresholds: Any, row: int, total: int, spec: StateSpec) -> Tensor:
    values = threshold_row(name, thresholds, row, total, spec.H)
    return torch.tensor(values + values[:1] * (spec.H == 1), dtype=torch.float32, device=spec.device)


def _mean(rows: tuple[tuple[float, ...], ...]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values) if values else float("nan")
