"""Partitions: nobody gets another's samples, nothing is dropped unless asked for, and each is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from descentlab.core.errors import UserError
from descentlab.core.streams import Streams
from descentlab.workloads.partition import ByLabel, Dirichlet, Partitioned, Quantity, by_sample, class_counts
from descentlab.workloads.partition_specs import PARTITIONS
from descentlab.workloads.sampler import Shuffled

STREAMS = Streams(5)
LABELS = np.repeat(np.arange(10), [40, 30, 50, 40, 40, 60, 40, 20, 40, 40])[np.random.default_rng(0).permutation(400)]


@pytest.mark.parametrize("name", [n for n in PARTITIONS.names() if n != "shared"])
@pytest.mark.parametrize("workers", [1, 2, 3, 10])
def test_parts_are_disjoint_sorted_and_depend_on_the_replicate(name: str, workers: int) -> None:
    """Only ``truncate`` leaves samples out, and no label of anybody."""
    deal = PARTITIONS.lookup(name)().build()
    parts = deal(LABELS, workers, STREAMS, 0)
    together = np.concatenate(parts)
    assert len(parts) == workers and len(np.unique(together)) == len(together)
    assert all((np.diff(part) > 0).all() for part in parts)
    if name != "label" or workers == 1:
        assert len(together) == len(LABELS)
    assert set(LABELS[together]) == set(range(10))
    again, other = deal(LABELS, workers, STREAMS, 0), deal(LABELS, workers, STREAMS, 1)
    assert all(map(np.array_equal, parts, again))
    assert workers == 1 or not all(map(np.array_equal, parts, other))


@pytest.mark.parametrize("workers", [2, 3, 4, 10])
def test_every_label_belongs_to_one_worker(workers: int) -> None:
    """Also where labels do not divide evenly: the published program silently drops two of ten for 4 and 8 workers."""
    whole = ByLabel(truncate=False)(LABELS, workers, STREAMS, 0)
    assert sum(map(len, whole)) == len(LABELS)
    owners = [{w for w, part in enumerate(whole) if label in LABELS[part]} for label in range(10)]
    assert all(len(who) == 1 for who in owners)
    counts = [len({*LABELS[part].tolist()}) for part in whole]
    assert max(counts) - min(counts) <= 1
    cut = ByLabel()(LABELS, workers, STREAMS, 0)
    assert {len(part) for part in cut} == {min(map(len, whole))}
    for part, full in zip(cut, whole, strict=True):
        assert set(LABELS[part]) == set(LABELS[full])
        share = np.bincount(LABELS[part], minlength=10) / len(part)
        np.testing.assert_allclose(share, np.bincount(LABELS[full], minlength=10) / len(full), atol=1.5 / len(part))


def test_more_workers_than_labels_is_an_error() -> None:
    with pytest.raises(UserError, match="workers = 11: expected at most 10 with partition = label"):
        ByLabel()(LABELS, 11, STREAMS, 0)


def test_dirichlet_goes_from_one_label_to_all() -> None:
    """A large alpha is the same mixture everywhere, a tiny one gives nearly every label to one worker."""
    even = np.array(class_counts(LABELS, Dirichlet(1e4)(LABELS, 4, STREAMS, 0), 10))
    np.testing.assert_allclose(even, np.bincount(LABELS) / 4 * np.ones((4, 1)), atol=2)
    skewed = np.array(class_counts(LABELS, Dirichlet(0.01)(LABELS, 4, STREAMS, 0), 10))
    assert (skewed.max(0) / skewed.sum(0) > 0.95).mean() >= 0.8
    shares = np.array([Dirichlet(0.7)._shares(3, STREAMS, r, 0) for r in range(4000)])
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares.var(0), (1 / 3 * 2 / 3) / (3 * 0.7 + 1), rtol=0.06)  # of a Dirichlet


def test_quantities_fall_geometrically() -> None:
    sizes = np.array([len(part) for part in Quantity(8.0)(LABELS, 4, STREAMS, 0)])
    np.testing.assert_allclose(sizes[:-1] / sizes[1:], 2.0, rtol=0.05)


def test_sizes_by_sample_differ_by_one() -> None:
    assert [len(part) for part in by_sample(LABELS, 7, STREAMS, 0)] == [58] + [57] * 6


def test_a_worker_draws_from_its_own_part_once_an_epoch() -> None:
    """Broken by an order that is shared between workers or by epochs counted in the whole set."""
    sampler = Partitioned(lambda r: ByLabel()(LABELS, 5, STREAMS, r), len(LABELS), 8, STREAMS)
    parts = ByLabel()(LABELS, 5, STREAMS, 2)
    own = len(parts[3]) // 8
    drawn = np.concatenate(
        [sampler.indices(np.array([2]), np.array([3]), np.array([i]))[0] for i in range(2 * own)]
    ).reshape(2, -1)
    for epoch in drawn:
        assert set(epoch) <= set(parts[3]) and len(set(epoch)) == len(epoch)
    assert not np.array_equal(*drawn)
    assert sampler.steps_per_epoch == len(LABELS) // 8
    many = sampler.indices(np.array([2, 2, 0]), np.array([3, 1, 3]), np.array([0, 0, 0]))
    assert np.array_equal(many[0], drawn[0, :8]) and set(many[1]) <= set(parts[1])


def test_one_worker_has_everything_in_the_usual_order() -> None:
    """A partition among one changes nothing, to the sample."""
    sampler = Partitioned(lambda r: by_sample(LABELS, 1, STREAMS, r), 400, 8, STREAMS)
    usual = Shuffled(400, 8, STREAMS)
    for i in (0, 3, 49, 50, 120):
        who = np.array([1]), np.array([0]), np.array([i])
        np.testing.assert_array_equal(sampler.indices(*who), usual.indices(*who))


def test_a_worker_without_a_batch_is_an_error() -> None:
    sampler = Partitioned(lambda r: Quantity(100.0)(LABELS, 4, STREAMS, r), 400, 8, STREAMS)
    with pytest.raises(UserError, match="batch_size = 8: expected at most the 3 samples that worker 3 has"):
        sampler.indices(np.array([0]), np.array([3]), np.array([0]))
