"""The ops under SVG2 as a graph compiler and a model meet them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clusters import Site, make_site
from predictor import INTERPRETED, control, gpu
from torch import Tensor

from haste_compile.errors import AutogradError, InputError
from haste_compile.kernels import cluster_ops
from haste_compile.kernels.block_mask import unpack_bits
from haste_compile.kernels.cluster_map import reference as cluster_map
from haste_compile.kernels.cluster_order import reference as cluster_order
from haste_compile.kernels.kmeans import reference as kmeans
from haste_compile.kernels.layout import Counter, Ctl

host = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what runs on the CPU")

SITES: list[dict[str, Any]] = [
    {},
    {"batch": 1, "heads": 1, "tokens": 2, "clusters": (1, 2)},
    {"batch": 1, "tokens": 300, "dim": 128, "dtype": torch.bfloat16},
    {"tokens": 129, "clusters": (3, 40), "dtype": torch.float16},
]


@host
@pytest.mark.parametrize("shape", SITES, ids=str)
def test_opcheck(shape: dict[str, Any]):
    site = make_site(**shape)
    inputs = (site.q, site.k, site.top_p, site.delta, control())
    options = {"scale": site.scale, "first_iterations": 2}
    op = torch.ops.haste.refresh_clusters_.default
    torch.library.opcheck(op, (*inputs, *site.state().values()), options)
    site.refresh(control())
    attention = (site.q, site.k, site.v, site.order, site.offsets, site.mask, control())
    torch.library.opcheck(torch.ops.haste.cluster_sparse_attention.default, attention, {"scale": site.scale})


@host
@pytest.mark.parametrize("shape", SITES, ids=str)
def test_fakes_predict_shapes_dtypes_and_strides(shape: dict[str, Any]):
    site = make_site(**shape)
    site.refresh(control())
    with torch._subclasses.FakeTensorMode() as mode:
        fake = Site(*(mode.from_tensor(getattr(site, f.name)) for f in dataclasses.fields(site)))
        ctl = mode.from_tensor(control())
        fake.refresh(ctl)
        predicted = fake.attend(ctl)
    for dense in (False, True):
        for real, expected in zip(site.attend(control(dense=dense)), predicted, strict=True):
            assert real.shape == expected.shape and real.dtype == expected.dtype
            strides = zip(real.shape, real.stride(), expected.stride(), strict=True)
            assert all(size == 1 or ours == theirs for size, ours, theirs in strides)


@host
@pytest.mark.parametrize("shape", SITES, ids=str)
def test_a_rebuild_is_clusters_then_order_then_map(shape: dict[str, Any]):
    """From the tokens at the first call of a video, from the own last centroids at the second."""
    site = make_site(**shape)
    rows = site.mask.shape[3]
    last = torch.zeros_like(site.centroids[1])
    for call in range(2):
        q, k = site.q + call, site.k * (1 - call / 4)
        site.refresh(control(slot=1), q=q, k=k, reuse="never", floor=0.25)
        for b, h in torch.ones_like(site.counters[1, ..., 0]).nonzero().tolist():
            sizes, means = [], []
            for side, (x, part) in enumerate(((q, slice(0, rows)), (k, slice(rows, None)))):
                clusters = site.centroids[1, b, h, part].shape[0]
                token = x[b, h][None]
                start = last[b, h, part][None] if call else kmeans.first_centroids(token, clusters)
                count = 2 if call else 6
                found, moved = kmeans.kmeans(token, start, iterations=count, tolerance=0.0)
                order, offsets = cluster_order.cluster_order(found, clusters)
                torch.testing.assert_close(site.centroids[1, b, h, part], moved[0], rtol=1e-5, atol=1e-5)
                assert torch.equal(site.order[1, b, h, side].long(), order[0])
                sizes.append(offsets.diff())
                means.append(site.centroids[1, b, h, part][None])
            begins = torch.cat([F.pad(s.cumsum(1), (1, 0)) for s in sizes], 1)
            assert torch.equal(site.offsets[1, b, h].long(), begins[0])
            least = -(-sizes[1].shape[1] // 4)
            bits = cluster_map.cluster_map(
                *means, sizes[1], site.top_p[h][None], scale=site.scale, least=least
            )
            assert torch.equal(site.mask[1, b, h], bits[0])
            assert site.counters[1, b, h, Counter.KEPT] == cluster_map.token_pairs(bits, *sizes)
        last = site.centroids[1].clone()
    assert not any(x[0].any() for x in site.state().values())
    assert (site.counters[1, ..., Counter.REFRESHES] == 2).all()


@host
def test_only_heads_that_moved_are_clustered_and_sorted(monkeypatch: pytest.MonkeyPatch):
    site = make_site(heads=4)
    clustered: list[tuple[int, int]] = []
    ordered: list[int] = []

    def cluster(x: Tensor, start: Tensor, original: Any = kmeans.kmeans, **kind: Any) -> Any:
        clustered.append((x.shape[0], kind["iterations"]))
        return original(x, start, **kind)

    def order(labels: Tensor, clusters: int, original: Any = cluster_order.cluster_order) -> Any:
        ordered.append(labels.shape[0])
        return original(labels, clusters)

    monkeypatch.setattr(kmeans, "kmeans", cluster)
    monkeypatch.setattr(cluster_order, "cluster_order", order)
    site.refresh(control())
    site.refresh(control())
    assert clustered == [(8, 6), (8, 6)] and ordered == [8, 8]  # queries and keys of 2 × 4 heads, then none
    before = site.copy()
    moved = site.q.clone()
    moved[1, 2] += 1.0  # drifts by D = 64 > δ = 10
    site.refresh(control(), q=moved)
    assert clustered[2:] == [(1, 2), (1, 2)] and ordered[2:] == [1, 1]
    rebuilt = site.counters[0, :, :, Counter.AGE] == 0
    assert rebuilt.nonzero().tolist() == [[1, 2]]
    for name, now in site.state().items():
        if name != "counters":
            assert torch.equal(now[0][~rebuilt], before[name][0][~rebuilt]), name
    kept, total = site.counters[0, ..., Counter.KEPT], site.counters[0, ..., Counter.KEPT_SUM]
    old = before["counters"][0, ..., Counter.KEPT]
    assert torch.equal(total, torch.where(rebuilt, 2 * old + kept, 3 * old))


@host
def test_many_heads_are_clustered_in_turns(monkeypatch: pytest.MonkeyPatch):
    whole, parts = make_site(heads=5), make_site(heads=5)
    whole.refresh(control())
    monkeypatch.setattr(cluster_ops, "_CPU_DISTANCE_BYTES", 3 * 4 * 333 * 21)
    parts.refresh(control())
    for name, x in whole.state().items():
        torch.testing.assert_close(parts.state()[name], x, rtol=1e-5, atol=1e-5)


@host
def test_a_video_does_not_depend_on_the_one_before():
    site = make_site()

    def video(epoch: int, shift: float) -> dict[str, Tensor]:
        for step in range(3):
            site.refresh(control(epoch=epoch), q=site.q + shift * step)
        state = {name: x[0] for name, x in site.copy().items()}
        return state | {"counters": state["counters"][..., 1:6]}

    first, _, again = video(1, 0.05), video(2, -1.0), video(3, 0.05)
    assert all(torch.equal(first[name], again[name]) for name in first)


@host
def test_fifty_runs_give_the_same_bits():
    first: dict[str, Tensor] | None = None
    for _ in range(50):
        site = make_site(batch=1, heads=2, tokens=200)
        site.refresh(control())
        out, lse = site.attend(control())
        found = site.copy() | {"out": out, "lse": lse}
        first = first or found
        assert all(torch.equal(found[name], x) for name, x in first.items())


@host
@pytest.mark.parametrize("shape", SITES, ids=str)
def test_a_dense_step_is_dense_attention_and_keeps_the_clusters(shape: dict[str, Any]):
    site = make_site(**shape)
    dense = F.scaled_dot_product_attention(site.q, site.k, site.v)
    assert torch.equal(site.attend(control(dense=True))[0], dense)  # before there are any
    site.refresh(control())
    before = site.copy()
    site.refresh(control(dense=True), q=site.q + 5)
    for name, x in site.state().items():
        assert name == "counters" or torch.equal(x, before[name])
    total = before["counters"][0, ..., Counter.KEPT] + site.q.shape[2] ** 2
    assert torch.equal(site.counters[0, ..., Counter.KEPT_SUM], total)
    assert torch.equal(site.attend(control(dense=True))[0], dense)


@host
def test_attention_computes_the_pairs_of_the_map():
    site = make_site()
    site.refresh(control(slot=1))
    kept = unpack_bits(site.mask[1], 21)
    assert 0.1 < kept.float().mean() < 0.9
    sparse, _ = site.attend(control(slot=1))
    assert not torch.allclose(sparse, F.scaled_dot_product_attention(site.q, site.k, site.v), atol=1e-3)
    site.mask[1] = -1
    torch.testing.assert_close(
        site.attend(control(slot=1))[0],
        F.scaled_dot_product_attention(site.q, site.k, site.v),
        rtol=1e-5,
        atol=1e-5,
    )


@host
def test_grad_mode_runs_forward_and_refuses_backward():
    site = make_site()
    site.q.requires_grad_()
    site.refresh(control())
    assert not site.anchors.requires_grad and not site.centroids.requires_grad
    out, _ = site.attend(control())
    assert out.requires_grad
    with pytest.raises(AutogradError, match="no_grad"):
        out.sum().backward()


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


BAD_STATE: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.zeros(2, 3, 334, 64)}, "self-attention"),
    ({x: torch.zeros(2, 3, 333, 96) for x in "qkv"}, "head dim 96"),
    ({"order": int32(2, 2, 3, 2, 334)}, "order"),
    ({"order": torch.zeros(2, 2, 3, 2, 333, dtype=torch.int64)}, "int32"),
    ({"offsets": int32(2, 2, 3, 7)}, "at least one key cluster"),
    ({"mask": int32(2, 2, 3, 5, 2)}, "mask"),
    ({"mask": int32(3, 5, 1)}, "offsets|mask"),
    ({"ctl": int32(5)}, "ctl"),
    ({"ctl": control(slot=2)}, "slot 2"),
]
BAD_REFRESH: list[tuple[dict[str, Any], str]] = [
    ({"offsets": int32(2, 2, 3, 27)}, "centroids"),
    ({"centroids": torch.zeros(2, 2, 3, 25, 64)}, "centroids"),
    ({"anchors": torch.zeros(2, 2, 3, 2, 128)}, "anchors"),
    ({"counters": torch.zeros(2, 2, 3, 8)}, "int64"),
    ({"top_p": torch.full((2,), 0.9)}, "top_p"),
    ({"reuse": "sometimes"}, "sometimes"),
    ({"reuse": "interval"}, "interval"),
    ({"iterations": 0}, "iterations"),
    ({"first_iterations": 0}, "first_iterations"),
    ({"floor": 1.5}, "floor"),
]


def spoil(values: dict[str, Any]) -> tuple[Site, Tensor, dict[str, Any]]:
    site = make_site()
    names = {f.name for f in dataclasses.fields(site)}
    rule = {name: x for name, x in values.items() if name not in names and name != "ctl"}
    tensors = {name: x for name, x in values.items() if name in names}
    return dataclasses.replace(site, **tensors), values.get("ctl", control()), rule


@host
@pytest.mark.parametrize(("values", "message"), BAD_STATE + BAD_REFRESH)
def test_refresh_names_what_is_wrong(values: dict[str, Any], message: str):
    site, ctl, rule = spoil(values)
    before = site.copy()
    with pytest.raises(InputError, match=message):
        site.refresh(ctl, **rule)
    assert all(torch.equal(x, before[name]) for name, x in site.state().items())


@host
@pytest.mark.parametrize(("values", "message"), BAD_STATE)
def test_attention_names_what_is_wrong(values: dict[str, Any], message: str):
    site, ctl, _ = spoil(values)
    with pytest.raises(InputError, match=message):
        site.attend(ctl)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
def test_kernels_compose_to_what_the_cpu_does():
    kind = {"batch": 1, "heads": 2, "tokens": 100, "clusters": (2, 9)}
    on_host, device = make_site(**kind), make_site(**kind)
    rule = {"first_iterations": 2, "iterations": 1, "gate_low": 0.0, "gate_high": 1.0, "scale": on_host.scale}
    for call, (epoch, dense) in enumerate([(1, False), (1, False), (1, True), (2, False)]):
        q, ctl = on_host.q.clone(), control(slot=1, epoch=epoch, dense=dense)
        q[0, 1] += call  # one head drifts
        on_host.refresh(ctl, q=q, **rule)
        inputs = (q, device.k, device.top_p, device.delta, ctl)
        cluster_ops._refresh_cuda(*inputs, *device.state().values(), **rule)
        for name, x in on_host.state().items():
            torch.testing.assert_close(device.state()[name], x, rtol=1e-5, atol=1e-5)
        on_host.q = q
        state = (device.order, device.offsets, device.mask, ctl)
        found = cluster_ops._attention_cuda(q, device.k, device.v, *state, scale=device.scale)
        for got, expected in zip(found, on_host.attend(ctl), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            assert got.stride() == expected.stride()


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", [{}, {"tokens": 5003, "dim": 128, "clusters": (40, 300)}], ids=str)
def test_cuda_decides_as_the_cpu_does(kind: dict[str, Any]):
    device = make_site(**kind, dtype=torch.bfloat16)
    on_host = device.to("cpu")
    for call, (slot, epoch) in enumerate([(0, 1), (0, 1), (1, 1), (0, 1), (0, 2)]):
        q = device.q.clone()
        q[0, 1] += call  # one head of one sample drifts
        ctl = control(slot, epoch)
        device.refresh(ctl.cuda(), q=q)
        on_host.refresh(ctl, q=q.cpu())
        exact = [*range(Counter.KEPT), Counter.SEEN]
        assert torch.equal(device.counters.cpu()[..., exact], on_host.counters[..., exact])
        # Sums in another order: a token between two centroids may fall to either.
        kept = device.counters.cpu()[..., Counter.KEPT].double(), on_host.counters[..., Counter.KEPT].double()
        torch.testing.assert_close(*kept, rtol=0.02, atol=1.0)


@pytest.mark.gpu
@gpu
def test_cuda_runs_are_equal_bit_by_bit_and_are_captured_in_a_graph():
    """A host read of device memory would end the capture with an error."""
    kind: dict[str, Any] = {"tokens": 2000, "clusters": (20, 100), "dtype": torch.float16}
    site, ctl = make_site(**kind), control().cuda()
    site.refresh(ctl)  # compiles
    site.attend(ctl)
    for x in site.state().values():
        x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        site.refresh(ctl)
        out, _ = site.attend(ctl)
    for slot, epoch in ((0, 1), (1, 1), (0, 1), (0, 2)) * 12:
        twin = make_site(**kind)
        ctl[Ctl.SLOT], ctl[Ctl.EPOCH] = slot, epoch
        for x in site.state().values():
            x.zero_()
        graph.replay()
        twin.refresh(ctl)
        assert torch.equal(out, twin.attend(ctl)[0])
        assert all(torch.equal(x, twin.state()[name]) for name, x in site.state().items())
