"""Counter-based streams against Random123's known answers, and the promises built on them (invariant 2)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from descentlab.core.protocols import isolated_init
from descentlab.core.streams import Streams, philox4x32
from descentlab.workloads.sampler import Shuffled, WithReplacement

KNOWN = [  # kat_vectors of Random123, philox4x32 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    assert tuple(philox4x32(np.array(counter, dtype=np.uint64), key)) == words


def test_a_replicate_alone_draws_what_it_draws_among_others() -> None:
    streams, many = Streams(7), np.arange(50)
    together = streams.draw("order", 13, replicate=many, worker=3, step=9)
    for r in (0, 17, 49):
        assert (together[r] == streams.draw("order", 13, replicate=r, worker=3, step=9)).all()


def test_every_part_of_the_key_matters() -> None:
    base = {"replicate": 1, "worker": 1, "step": 1}
    first = Streams(1).draw("a", 8, **base)
    others = [Streams(2).draw("a", 8, **base), Streams(1).draw("b", 8, **base)]
    others += [Streams(1).draw("a", 8, **{**base, k: 2}) for k in base]
    assert not any((first == other).any() for other in others)


def test_draws_have_the_stated_distributions() -> None:
    streams = Streams(3)
    u = streams.uniform("u", 40_000, replicate=0)
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 40_000)
    z = streams.normal("z", 40_000, replicate=0)
    assert abs(z.mean()) < 5 / 200 and abs(z.var() - 1) < 5 * np.sqrt(2 / 40_000)
    counts = np.bincount(streams.integers("i", 10, 40_000, replicate=0), minlength=10)
    assert ((counts - 4000) ** 2 / 4000).sum() < 30  # chi-square, 9 degrees of freedom: beyond 1 in 2,000
    assert sorted(streams.permutation("p", 999, replicate=5)) == list(range(999))


def test_an_epoch_visits_every_sample_once_and_epochs_differ() -> None:
    sampler = Shuffled(96, 32, Streams(0))
    one = np.array([4])
    epochs = [
        np.concatenate([sampler.indices(one, 0 * one, one * 0 + 3 * e + b)[0] for b in range(3)]) for e in range(2)
    ]
    assert all(sorted(e) == list(range(96)) for e in epochs) and (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("kind", [Shuffled, WithReplacement])
def test_batches_do_not_depend_on_who_asked_before(kind: type) -> None:
    ask = (np.array([2]), np.array([1]), np.array([70]))
    fresh = kind(96, 32, Streams(0)).indices(*ask)
    used = kind(96, 32, Streams(0))
    for p in (0, 5, 70, 71):
        used.indices(np.arange(4), np.ones(4, dtype=int), np.full(4, p))
    assert (used.indices(*ask) == fresh).all()


def test_members_of_one_replicate_may_stand_in_different_epochs() -> None:
    """Broken on purpose: holding one epoch per replicate and worker."""
    sampler, positions = Shuffled(96, 32, Streams(0)), np.array([1, 4, 7])
    for _ in range(3):
        together = sampler.indices(np.zeros(3, dtype=int), np.zeros(3, dtype=int), positions)
        for row, p in zip(together, positions, strict=True):
            order = Streams(0).permutation("order", 96, replicate=0, step=int(p) // 3)
            assert (row == order[32 * (p % 3) : 32 * (p % 3) + 32]).all()


@pytest.mark.parametrize("n", [5, 2048, 3000])
def test_a_permutation_sorts_the_uniform_draws(n: int) -> None:
    """Also above 2,048, where a key and a position no longer fit one 64-bit word."""
    many = np.arange(20)
    keys = Streams(1).uniform("p", n, replicate=many)
    assert (Streams(1).permutation("p", n, replicate=many) == np.argsort(keys, axis=-1, kind="stable")).all()


def test_nothing_touches_the_global_generators() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    streams = Streams(0)
    streams.normal("z", 100, replicate=0)
    isolated_init(lambda: torch.nn.Linear(3, 3), streams.torch_seed("init", replicate=0), torch.float32)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


def test_a_seed_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="seed = -1"):
        Streams(-1)
