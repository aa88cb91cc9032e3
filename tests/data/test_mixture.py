"""Which records an epoch holds, and how often."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax.data.mixture import Corpus, Mixture, read_shares, shuffled
from blm_jax.errors import RequestError

shares = st.builds(Fraction, st.integers(1, 12), st.integers(1, 6))
seeds = st.integers(0, 2**32 - 1)
# Sizes and shares of a few corpora, together at least a record an epoch.
corpora = st.lists(st.tuples(st.integers(1, 40), shares), min_size=1, max_size=4).filter(
    lambda parts: sum(n * share for n, share in parts) >= 1
)


def corpus(name: str, count: int, share: Fraction = Fraction(1)) -> Corpus:
    return Corpus(name, np.arange(1, count + 1), np.arange(count), share)


@settings(deadline=None)
@given(st.integers(0, 500), seeds)
def test_shuffled_is_a_permutation_by_splitmix64(count: int, seed: int) -> None:
    """As Java's SplittableRandom has it, in Python's numbers: the upper bits of the hashes decide."""
    order = shuffled(count, "test", seed)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == np.uint32
    np.testing.assert_array_equal(order, shuffled(count, "test", seed))
    hashes = {number: splitmix64(number, "test", seed) >> count.bit_length() for number in range(count)}
    assert order.tolist() == sorted(range(count), key=lambda number: (hashes[number], number))


def splitmix64(number: int, *key: object) -> int:
    import hashlib

    value = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") + number * 0x9E3779B97F4A7C15
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def test_shuffles_are_even() -> None:
    """Each number comes to each place equally often, and neighbours are torn apart."""
    orders = np.stack([shuffled(10, seed) for seed in range(5000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=10) for place in range(10)])
    assert abs(counts - 500).max() < 5 * np.sqrt(500)
    large = shuffled(100_000, 0).astype(int)
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.02


@settings(deadline=None)
@given(corpora, seeds, st.integers(0, 9))
def test_an_epoch_takes_the_next_share_of_endless_passes(parts: list[tuple[int, Fraction]], seed: int, epoch: int) -> None:
    mixture = Mixture([corpus(str(i), *part) for i, part in enumerate(parts)])
    total = np.concatenate([mixture.draws(seed, earlier) for earlier in range(epoch + 1)])
    which, number = mixture.locate(total)
    for i, (count, share) in enumerate(parts):
        expected = int(share * count * (epoch + 1))
        times = Counter(number[which == i].tolist())
        assert sum(times.values()) == expected
        assert set(times) <= set(range(count))
        # Nothing comes twice before all has come once.
        assert max(times.values(), default=0) - min((times[n] for n in range(count)), default=0) <= 1
    np.testing.assert_array_equal(mixture.draws(seed, epoch), total[len(total) - len(mixture.draws(seed, epoch)) :])


def test_epochs_and_seeds_differ() -> None:
    mixture = Mixture([corpus("a", 300), corpus("b", 300, Fraction(1, 3))])
    orders = [mixture.draws(seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(len(order) == 400 for order in orders)
    thirds = [{record for record in mixture.draws(0, epoch).tolist() if record >= 300} for epoch in range(6)]
    assert set.union(*thirds[:3]) == set.union(*thirds[3:]) == set(range(300, 600)) and thirds[0] != thirds[3]


def test_a_corpus_draws_the_same_beside_others() -> None:
    """Adding one changes neither the passes of the others nor which of their records an epoch has."""
    half = Fraction(1, 2)
    alone, beside = Mixture([corpus("a", 50, half)]), Mixture([corpus("b", 30), corpus("a", 50, half)])
    drawn = beside.draws(7, 0)
    assert sorted(drawn[drawn >= 30] - 30) == sorted(alone.draws(7, 0))


def test_locate() -> None:
    mixture = Mixture([corpus("a", 3), corpus("b", 2)])
    which, number = mixture.locate(np.arange(5, dtype=np.uint32))
    assert which.tolist() == [0, 0, 0, 1, 1] and number.tolist() == [0, 1, 2, 0, 1]
    assert mixture.tokens.tolist() == [1, 2, 3, 1, 2] and mixture.patches.tolist() == [0, 1, 2, 0, 1]
    assert mixture.work() == (9, 4)


def test_shares_as_written() -> None:
    tokens = {"a": 1000, "b": 3000, "c": 500}
    assert read_shares({"a": 1, "b": 1}, tokens) == {"a": 2, "b": Fraction(2, 3)}
    assert read_shares({"a": 0.5, "c": "50 %", "b": 1.5}, tokens) == {"a": 1, "c": Fraction(1, 2), "b": 1}
    assert read_shares({"c": 3}, tokens) == {"c": 1}
    assert read_shares({"a": "12.5%", "b": "300 %"}, tokens) == {"a": Fraction(1, 8), "b": 3}
    weighted = read_shares({"a": 2, "b": 0.7, "c": 1}, tokens)
    drawn = {name: float(share * tokens[name]) for name, share in weighted.items()}
    assert sum(drawn.values()) == pytest.approx(4500) and drawn["a"] / drawn["b"] == pytest.approx(2 / 0.7, rel=1e-5)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"a": "half"}, "a is 'half': write a weight such as 2, or a part of it an epoch such as '50 %'"),
        ({"a": "-5 %"}, "a is '-5 %': write a weight"),
        ({"a": 0}, "a has a weight of 0: it must be a number above 0"),
        ({"a": float("nan")}, "a has a weight of nan"),
        ({"a": True}, "a has a weight of True"),
        ({"a": "0 %"}, "a is '0 %', less than a millionth"),
        ({"a": 1e-9, "b": 1}, "a is 1e-09, less than a millionth"),
    ],
)
def test_wrong_shares(settings_: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_shares(settings_, {"a": 10, "b": 10})


def test_wrong_corpora() -> None:
    one = np.ones(2, int)
    with pytest.raises(RequestError, match="corpus a has no records"):
        Corpus("a", one[:0], one[:0])
    with pytest.raises(RequestError, match="corpus a has a record without tokens"):
        Corpus("a", 0 * one, one)
    with pytest.raises(RequestError, match="corpus a has a share of 0"):
        Corpus("a", one, one, Fraction(0))
    with pytest.raises(ValueError, match="lengths of a"):
        Corpus("a", one, one[:1])
    with pytest.raises(RequestError, match="different corpora, at least one, not a, a"):
        Mixture([Corpus("a", one, one)] * 2)
    with pytest.raises(RequestError, match="so small that an epoch has less than one record"):
        Mixture([Corpus("a", one, one, Fraction(1, 3))])
