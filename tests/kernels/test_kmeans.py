from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from clusters import Site, begun, clustered, make_site
from predictor import INTERPRETED, control, gpu, tokens_first
from torch import Tensor

from haste_compile.kernels.cluster_order import reference as cluster_order
from haste_compile.kernels.kmeans import reference
from haste_compile.kernels.layout import Counter

pytest.importorskip("triton")
from haste_compile.kernels.kmeans.launch import Tiles  # noqa: E402
from haste_compile.kernels.kmeans.variants import VARIANTS  # noqa: E402


def sklearn_kmeans(x: Tensor, start: Tensor, iterations: int) -> Any:
    """Fitted on one head [N, D] from ``start`` [C, D]; without a tolerance that would end it early."""
    sklearn = pytest.importorskip("sklearn.cluster")
    kind = {"n_init": 1, "max_iter": iterations, "tol": 0, "algorithm": "lloyd"}
    return sklearn.KMeans(start.shape[0], init=start.double().numpy(), **kind).fit(x.double().numpy())


def inertia(x: Tensor, labels: Tensor, centroids: Tensor) -> float:
    return (x.double() - centroids.double()[labels]).square().sum().item()


@pytest.mark.parametrize("iterations", [2, 7, 50])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_reference_is_scikit_learns_kmeans(iterations: int):
    x = tokens_first(1, 3, 500, 64, torch.float64)[0].cpu()  # so shapeless that no cluster runs empty
    start = reference.first_centroids(x, 12)
    labels, centroids = reference.kmeans(x, start, iterations=iterations, tolerance=0.0)
    for head in range(3):
        theirs = sklearn_kmeans(x[head], start[head], iterations)
        np.testing.assert_allclose(centroids[head], theirs.cluster_centers_, rtol=1e-9, atol=1e-12)
        # Theirs are assigned once more, to the last centroids; ours are what these are the means of.
        before = sklearn_kmeans(x[head], start[head], iterations - 1)
        assert (labels[head].numpy() == before.labels_).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_inertia_of_half_precision_tokens():
    x = clustered(1, 2, 2000, 128, torch.bfloat16)[0].cpu()
    start = reference.first_centroids(x, 40)
    labels, centroids = reference.kmeans(x, start, iterations=10, tolerance=0.0)
    for head in range(2):
        theirs = sklearn_kmeans(x[head], start[head], 10)
        ours = inertia(x[head], labels[head], centroids[head])
        assert ours == pytest.approx(theirs.inertia_, rel=1e-3)


def test_the_first_centroids_are_tokens_at_even_distances():
    x = torch.arange(100.0).reshape(1, 100, 1)
    assert reference.first_centroids(x, 4).flatten().tolist() == [12, 37, 62, 87]
    assert reference.first_centroids(x.half(), 100).dtype == torch.float32
    assert torch.equal(reference.first_centroids(x, 100), x)


def test_ties_go_to_the_lower_index_and_empty_clusters_keep_their_centroid():
    x = torch.tensor([[[0.0], [1.0], [2.0]]])
    start = torch.tensor([[[0.0], [2.0], [2.0], [50.0]]])
    labels, centroids = reference.kmeans(x, start, iterations=1, tolerance=0.0)
    assert labels.tolist() == [[0, 0, 1]]
    assert centroids.flatten().tolist() == [0.5, 2.0, 2.0, 50.0]


def test_without_tolerance_the_early_end_changes_nothing():
    x = clustered(1, 4, 300, 64)[0].cpu()
    start = reference.first_centroids(x, 9)
    labels, centroids = reference.kmeans(x, start, iterations=60, tolerance=0.0)
    step = start
    for _ in range(60):
        assigned = reference.assign(x, step)
        step = reference.update(x, assigned, step)
    assert torch.equal(labels, assigned) and torch.equal(centroids, step)


def test_a_tolerance_ends_each_head_by_itself():
    x = clustered(1, 2, 300, 64)[0].cpu()
    x[0] *= 1e-3  # moves by next to nothing
    start = reference.first_centroids(x, 9)
    labels, centroids = reference.kmeans(x, start, iterations=20, tolerance=0.1)
    once, exact = (reference.kmeans(x, start, iterations=n, tolerance=0.0) for n in (1, 20))
    assert torch.equal(labels[0], once[0][0]) and torch.equal(centroids[0], once[1][0])
    torch.testing.assert_close(centroids[1], exact[1][1], rtol=0, atol=0.2)
    assert not torch.equal(centroids[1], once[1][1])


def test_fifty_runs_give_the_same_bits():
    x = clustered(2, 3, 400, 64).flatten(0, 1).cpu()
    start = reference.first_centroids(x, 20)
    first = reference.kmeans(x, start, iterations=5, tolerance=0.0)
    for _ in range(49):
        again = reference.kmeans(x.clone(), start.clone(), iterations=5, tolerance=0.0)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


KERNEL_CASES: list[dict[str, Any]] = [
    {"batch": 1, "heads": 2, "tokens": 150, "clusters": (5, 37)},
    {"batch": 2, "heads": 1, "tokens": 70, "dim": 128, "clusters": (2, 70), "dtype": torch.float16},
]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
@pytest.mark.parametrize("shape", KERNEL_CASES, ids=str)
def test_the_kernels_cluster_as_the_reference_does(shape: dict[str, Any]):
    check_kernels(shape, 3)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
@pytest.mark.parametrize("kinds", [8, 64])
def test_of_equally_near_centroids_the_first_is_taken_wherever_they_stand(kinds: int):
    check_ties(Tiles(64, 64, 2, 32, 32, 2, 64, num_warps=4, num_stages=1, kinds=kinds), torch.float32)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [{}, {"tokens": 5003, "dim": 128, "clusters": (40, 300)}], ids=str)
def test_the_compiled_kernels_cluster_as_the_reference_does(shape: dict[str, Any]):
    check_kernels({**shape, "dtype": torch.bfloat16}, 10)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_every_configuration_clusters_as_the_reference_does(name: str):
    shape = {"tokens": 5003, "dim": 128, "clusters": (300, 1000), "dtype": torch.bfloat16}
    check_kernels(shape, 3, tiles=VARIANTS[name])
    check_ties(VARIANTS[name], torch.bfloat16)


def check_kernels(shape: dict[str, Any], iterations: int, **options: Any) -> None:
    """Labels and centroids of first and later rebuilds; what is not asked for stays."""
    from haste_compile.kernels.kmeans import kernel

    site = make_site(**shape)
    rows = site.mask.shape[3]
    counters, flags = begun(site, slot=1)
    flags[0, -1] = 0
    later = counters.clone()
    later[1, ..., Counter.REFRESHES] = 2
    kind = {"q_clusters": rows, "first_iterations": iterations, "iterations": 1, "tolerance": 0.0, **options}
    ctl = control(slot=1).to(site.q.device)
    sorting = {"order": site.order.fill_(-1), "offsets": site.offsets.fill_(-1)}
    for first, books in ((True, counters), (False, later)):
        before = site.centroids.clone()
        labels = kernel.cluster_(site.q, site.k, flags, ctl, books, site.centroids, **kind, **sorting)
        for b, h in flags.nonzero().tolist():
            for side, (x, part) in enumerate(((site.q, slice(0, rows)), (site.k, slice(rows, None)))):
                token, old, found = x[b, h][None], before[1, b, h, part][None], labels[b, h, side].long()
                start = reference.first_centroids(token, old.shape[1]) if first else old
                count = iterations if first else 1
                wanted, means = reference.kmeans(token, start, iterations=count, tolerance=0.0)
                check_clusters(token, found, site.centroids[1, b, h, part], wanted[0], means[0])
                if not first:  # from equal centroids
                    empty = found.bincount(minlength=old.shape[1]) == 0
                    assert torch.equal(site.centroids[1, b, h, part][empty], old[0, empty])
                    assert (found != wanted[0]).float().mean() < 1e-3
                order, offsets = cluster_order.cluster_order(found[None], old.shape[1])
                assert torch.equal(site.order[1, b, h, side].long(), order[0])
                of_side = slice(0, rows + 1) if side == 0 else slice(rows + 1, None)
                assert torch.equal(site.offsets[1, b, h, of_side].long(), offsets[0])
    assert not site.centroids[0].any() and not site.centroids[1, 0, -1].any()
    for x in sorting.values():
        assert (x[0] == -1).all() and (x[1, 0, -1] == -1).all()


def check_clusters(x: Tensor, labels: Tensor, centroids: Tensor, wanted: Tensor, means: Tensor) -> None:
    """Centroids are the means of the labels, which fit the tokens as well as the reference's.

    A token near a border may fall to either side of it, as sums of another order round, and moves centroids
    that later iterations see; so neither labels nor centroids are compared one by one.
    """
    own = reference.update(x, labels[None], centroids[None])[0]
    torch.testing.assert_close(centroids, own, rtol=1e-3, atol=1e-3)
    assert (labels != wanted).float().mean() < 0.05
    ours, theirs = inertia(x[0], labels, centroids), inertia(x[0], wanted, means)
    assert ours == pytest.approx(theirs, rel=1e-3)


def check_ties(tiles: Tiles, dtype: torch.dtype) -> None:
    """Centroids that stand there several times, near and far; of integers, whose sums are exact."""
    from haste_compile.kernels.kmeans import kernel

    site = make_site(batch=1, heads=1, tokens=200, dim=128, clusters=(9, 150), dtype=dtype)
    number = torch.arange(150)
    which = torch.where(number < 64, number % 8, 7 * number % 40)
    site.k.copy_(torch.randint(-8, 9, site.k.shape))
    site.centroids[0, 0, 0, 9:] = torch.randint(-8, 9, (40, 128)).float()[which]
    start = site.centroids[0, 0, 0, None, 9:].clone()
    counters, flags = begun(site)
    counters[0, ..., Counter.REFRESHES] = 2
    labels = kernel.cluster_(
        site.q, site.k, flags, control().to(site.q.device), counters, site.centroids,
        q_clusters=9, first_iterations=1, iterations=1, tolerance=0.0, tiles=tiles,
        order=site.order, offsets=site.offsets,
    )  # fmt: skip
    wanted = reference.assign(site.k[0].cpu(), start.cpu())[0]
    assert torch.equal(labels[0, 0, 1].cpu().long(), wanted)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
def test_a_head_that_no_longer_moves_is_left_alone():
    from haste_compile.kernels.kmeans import kernel

    site = make_site(batch=1, heads=1, tokens=40, clusters=(2, 3))
    counters, flags = begun(site)
    kind = {"q_clusters": 2, "iterations": 1}
    labels = kernel.cluster_(
        site.q, site.k, flags, control(), counters, site.centroids, first_iterations=4, tolerance=1e6, **kind
    )
    start = reference.first_centroids(site.q[0], 2)
    found, means = reference.kmeans(site.q[0], start, iterations=1, tolerance=0.0)
    assert torch.equal(labels[0, 0, 0].long(), found[0])
    torch.testing.assert_close(site.centroids[0, 0, :, :2], means, rtol=1e-5, atol=1e-5)
    kernel.cluster_(
        site.q, site.k, flags, control(slot=1), counters.flip(0), site.centroids,
        q_clusters=2, first_iterations=1, iterations=3, tolerance=0.0,
    )  # fmt: skip
    torch.testing.assert_close(
        site.centroids[1], site.centroids[0], rtol=0, atol=0
    )  # one iteration, not three


def run_kernel(site: Site, flags: Tensor, counters: Tensor, **kind: Any) -> list[Tensor]:
    """What a call leaves: labels of the heads that rebuild, and the state."""
    from haste_compile.kernels.kmeans import kernel

    kind = {"first_iterations": 4, "iterations": 2, "tolerance": 0.0} | kind
    labels = kernel.cluster_(
        site.q, site.k, flags, control().to(site.q.device), counters, site.centroids,
        q_clusters=site.mask.shape[3], order=site.order, offsets=site.offsets, **kind,
    )  # fmt: skip
    return [labels[flags != 0], site.centroids, site.order, site.offsets]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
def test_many_programs_give_the_bits_of_one_in_one_launch(monkeypatch: pytest.MonkeyPatch):
    from meeting_programs import Programs

    from haste_compile.kernels.kmeans import kernel

    shape: dict[str, Any] = {"batch": 1, "heads": 3, "tokens": 300, "clusters": (5, 70)}
    alone, shared = make_site(**shape), make_site(**shape)
    counters, flags = begun(alone)
    flags[0, 1] = 0
    counters[0, 0, 2, Counter.REFRESHES] = 2  # two iterations where the other head does four
    wanted = run_kernel(alone, flags, counters)
    together = Programs(monkeypatch, kernel, "cluster_kernel", 5)
    found = run_kernel(shared, flags, counters)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert together.launches == 1 and together.meetings == 1 + 4 * 4
    run_kernel(shared, flags, counters, tolerance=1e6)  # all are done after one iteration, and leave
    assert together.launches == 2 and together.meetings == 1 + 4


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
def test_where_every_head_reuses_no_program_waits_and_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    from meeting_programs import Programs

    from haste_compile.kernels.kmeans import kernel

    site = make_site(batch=1, heads=2, tokens=40, clusters=(2, 3))
    counters, flags = begun(site)
    before = [x.clone() for x in (site.centroids, site.order, site.offsets)]
    together = Programs(monkeypatch, kernel, "cluster_kernel", 3)
    _, *after = run_kernel(site, torch.zeros_like(flags), counters)
    assert together.launches == 1 and together.meetings == 0
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
@pytest.mark.parametrize("meeting", [1, 5])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of centroids that are not there yet
def test_it_matters_that_programs_wait(meeting: int, monkeypatch: pytest.MonkeyPatch):
    """What the tests above would see: centroids that are not there yet, or of the iteration before."""
    from meeting_programs import Programs

    from haste_compile.kernels.kmeans import kernel

    shape: dict[str, Any] = {"batch": 1, "heads": 1, "tokens": 300, "clusters": (5, 70)}
    alone, shared = make_site(**shape), make_site(**shape)
    counters, flags = begun(alone)
    wanted = run_kernel(alone, flags, counters)
    Programs(monkeypatch, kernel, "cluster_kernel", 3, skipped=[meeting])
    found = run_kernel(shared, flags, counters)
    assert not torch.equal(found[1], wanted[1])


@pytest.mark.gpu
@gpu
def test_fifty_runs_of_the_compiled_kernel_give_the_same_bits():
    shape: dict[str, Any] = {"tokens": 20011, "dim": 128, "clusters": (300, 1000), "dtype": torch.bfloat16}
    site = make_site(**shape)
    counters, flags = begun(site)
    flags[1, 1] = 0
    counters[0, 1, ..., Counter.REFRESHES] = 2
    start = torch.randn_like(site.centroids)
    first: list[Tensor] = []
    for _ in range(50):
        site.centroids.copy_(start)
        found = [x.clone() for x in run_kernel(site, flags, counters, first_iterations=10)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.gpu
@gpu
def test_fifty_iterations_are_one_launch_and_a_reuse_leaves_everything():
    from torch.profiler import ProfilerActivity, profile

    site = make_site(tokens=5003, dim=128, clusters=(40, 300), dtype=torch.bfloat16)
    counters, flags = begun(site)
    run_kernel(site, flags, counters)  # compiles
    before = [x.clone() for x in (site.centroids, site.order, site.offsets)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        _, *state = run_kernel(site, torch.zeros_like(flags), counters, first_iterations=50)
        after = [x.clone() for x in state]
        run_kernel(site, flags, counters, first_iterations=50)
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() if "cluster" in event.name]
    assert kernels == ["cluster_kernel"] * 2
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
