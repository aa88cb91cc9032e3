"""Plans, their files, and the batches of any step: pure functions of a seed and a number."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blm_jax.config import BackboneConfig
from blm_jax.data.collate import collate
from blm_jax.data.corpora import plan as plan_module
from blm_jax.data.corpora.budget import Budget, row_budget, vision_work
from blm_jax.data.corpora.packing import balanced, propose_row_length
from blm_jax.data.corpora.plan import Plan, Sequences, make_plan, stored_plan
from blm_jax.data.loader import host_rows
from blm_jax.data.mixture import Corpus, Mixture
from blm_jax.data.prompt import PromptEngine
from blm_jax.errors import RequestError

BUDGET = Budget(100, 60)

# Whoever changes how plans are made changes the data of runs that resume: raise VERSION and write down the new digest.
DIGESTS = {1: "e0ad8ada0b16a2260afe5df5219071f2d89ada2ba0d0b6941d9e284ba6d6b8f1"}


def corpus(name: str, count: int, share: Fraction = Fraction(1), seed: int = 0) -> Corpus:
    random = np.random.RandomState(seed)
    return Corpus(name, random.randint(1, 101, count), random.randint(0, 61, count), share)


def mixture() -> Mixture:
    return Mixture([corpus("a", 300), corpus("b", 200, Fraction(1, 2), 1)])


mixtures = st.lists(
    st.tuples(st.integers(1, 200), st.builds(Fraction, st.integers(1, 6), st.integers(1, 4)), st.integers(0, 9)), min_size=1, max_size=3
).filter(lambda parts: sum(share * count for count, share, _ in parts) >= 1)


def same(one: Plan, other: Plan) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("records", "starts", "tokens", "patches"))


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_a_plan_holds_what_was_drawn(parts: list[tuple[int, Fraction, int]], seed: int, epoch: int) -> None:
    mixed = Mixture([corpus(str(i), *part) for i, part in enumerate(parts)])
    plan = make_plan(mixed, BUDGET, seed, epoch)
    assert sorted(plan.records.tolist()) == sorted(mixed.draws(seed, epoch).tolist())
    assert plan.starts[0] == 0 and plan.starts[-1] == len(plan.records) and len(plan.starts) == len(plan) + 1
    for i in range(len(plan)):
        records = plan.sequence(i)
        assert len(records) >= 1
        assert plan.tokens[i] == mixed.tokens[records].sum() <= BUDGET.tokens
        assert plan.patches[i] == mixed.patches[records].sum() <= BUDGET.patches
    assert same(plan, make_plan(mixed, BUDGET, seed, epoch))


def test_seeds_epochs_and_budgets_make_other_plans() -> None:
    plans = [make_plan(mixture(), Budget(100, most), seed, epoch) for seed in (0, 1) for epoch in (0, 1) for most in (60, 61)]
    assert len({plan.records.tobytes() for plan in plans}) == len(plans)


def test_plans_stay_what_they_are() -> None:
    plan = make_plan(mixture(), BUDGET, 5, 2)
    contents = b"".join(part.astype("<u4").tobytes() for part in (plan.starts, plan.records))
    assert hashlib.sha256(contents).hexdigest() == DIGESTS[plan_module.VERSION]


def test_a_record_that_fits_nowhere() -> None:
    mixed = Mixture([corpus("a", 5), Corpus("long", np.array([7, 101, 102]), np.array([0, 0, 0]))])
    with pytest.raises(RequestError, match=r"record 1 of corpus long has 101 tokens, a sequence holds 100 \(2 such records\): make"):
        make_plan(mixed, BUDGET, 0, 0)
    with pytest.raises(RequestError, match="record 0 of corpus seen has 61 patches of vision work, a sequence holds 60"):
        make_plan(Mixture([Corpus("seen", np.array([7]), np.array([61]))]), BUDGET, 0, 0)


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stored_plan(tmp_path / "deep" / "plans", mixture(), BUDGET, 5, 2)
    [file] = (tmp_path / "deep" / "plans").iterdir()
    assert file.name.startswith("plan-") and np.load(file).dtype == np.uint32
    monkeypatch.setattr(plan_module, "make_plan", lambda *_, **__: pytest.fail("it was made again"))
    assert same(stored_plan(tmp_path / "deep" / "plans", mixture(), BUDGET, 5, 2), made)


def test_all_that_a_plan_depends_on_names_its_file(tmp_path: Path) -> None:
    a, b = corpus("a", 50), corpus("b", 50, seed=1)
    longer = Corpus("b", np.concatenate([b.tokens[:-1], [7]]), b.patches)
    mixed = [[a, b], [b, a], [a], [a, corpus("b", 50, Fraction(1, 2), 1)], [a, corpus("c", 50, seed=1)], [a, longer]]
    cases = [(Mixture(corpora), BUDGET, 0, 0) for corpora in mixed]
    cases += [(Mixture([a, b]), *rest) for rest in ((Budget(101, 60), 0, 0), (Budget(100, 61), 0, 0), (BUDGET, 1, 0), (BUDGET, 0, 1))]
    for case in cases:
        stored_plan(tmp_path, *case)
    assert len(list(tmp_path.iterdir())) == len(cases)


def damages() -> dict[str, tuple]:
    """What may have become of a file's bytes, and what is said of it."""
    foreign = Mixture([corpus("other", 40)])
    return {
        "cut short": (lambda data: data[:-400], "damaged"),
        "cut in its header": (lambda data: data[:50], "damaged"),
        "empty": (lambda data: b"", "damaged"),
        "a bit": (lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:], "contents have changed"),
        "longer": (lambda data: data + bytes(400), None),  # the array is whole
        "no array": (lambda data: b"hello" * 200, "damaged"),
        "of other records": (
            lambda data: plan_module._to_bytes(make_plan(foreign, BUDGET, 0, 0), bytes(32)),
            "of other records or settings",
        ),
    }


@pytest.mark.parametrize("kind", damages())
def test_a_damaged_plan_is_made_anew(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = stored_plan(tmp_path, mixture(), BUDGET, 0, 0)
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    damage, said = damages()[kind]
    os.unlink(file)  # the pages of the first plan may be mapped
    file.write_bytes(damage(data))
    with caplog.at_level(logging.WARNING):
        assert same(stored_plan(tmp_path, mixture(), BUDGET, 0, 0), made)
    if said is None:
        assert not caplog.records
    else:
        assert said in caplog.text and str(file) in caplog.text
        assert file.read_bytes() == data


def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RequestError, match="cannot be written: No space left on device"):
        stored_plan(tmp_path, mixture(), BUDGET, 0, 0)
    assert not list(tmp_path.iterdir())


# --- batches -------------------------------------------------------------------------------------------------------------


def batch_of(sequences: Sequences, step: int) -> list[list[int]]:
    return [row.tolist() for row in sequences.rows(step)]


def new(batch: int = 8, directory: Path | None = None, seed: int = 3) -> Sequences:
    return Sequences(mixture(), BUDGET, seed=seed, batch=batch, directory=directory)


def test_every_record_of_every_epoch_comes_once() -> None:
    sequences = new()
    lengths = [len(sequences.plan(epoch)) for epoch in range(3)]
    assert all(length % 8 for length in lengths[:2]), "a batch is to reach into the next epoch"
    steps = -(-sum(lengths) // 8)
    rows = {tuple(pair) for step in range(steps) for pair in sequences.order(step).tolist()}
    assert len(rows) == steps * 8  # no sequence twice
    assert rows >= {(epoch, number) for epoch in range(3) for number in range(lengths[epoch])}
    of_epoch = [
        record
        for step in range(steps)
        for row, (epoch, _) in zip(batch_of(sequences, step), sequences.order(step).tolist(), strict=True)
        if epoch == 1
        for record in row
    ]
    assert sorted(of_epoch) == sorted(mixture().draws(3, 1).tolist())


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=6))
def test_a_batch_depends_on_its_step_alone(steps: list[int]) -> None:
    """In any order, from any start: resuming is a number."""
    sequences = new()
    for step in steps:
        assert batch_of(sequences, step) == batch_of(new(), step)


def test_batches_of_any_number_of_hosts_are_one(tmp_path: Path) -> None:
    """A run begun on one host goes on with two, then four, each with plans of its own or with those in files."""
    whole = [batch_of(new(), step) for step in range(60)]
    for hosts in (1, 2, 4, 8):
        parts = [new(directory=tmp_path if hosts > 1 else None) for _ in range(hosts)]
        for step in range(15 * hosts.bit_length() - 15, 15 * hosts.bit_length()):
            slices = [[part.row(step, row).tolist() for row in host_rows(8, host, hosts)] for host, part in enumerate(parts)]
            assert {len(part) for part in slices} == {8 // hosts}
            assert [row for part in slices for row in part] == whole[step]


def test_seeds_differ_and_batches_are_balanced() -> None:
    assert batch_of(new(), 0) != batch_of(new(seed=4), 0)
    sequences = new(16)
    plan, part = sequences.plan(0), slice(32, 48)
    np.testing.assert_array_equal(sequences.order(2)[:, 1], 32 + balanced(plan.tokens[part], plan.patches[part]))
    np.testing.assert_array_equal(sequences.order(2)[:, 0], 0)


def test_tiny_mixtures_fill_batches_from_many_epochs() -> None:
    """One of which has no record at all."""
    sequences = Sequences(Mixture([corpus("a", 1, Fraction(3, 2))]), BUDGET, seed=0, batch=8)
    assert len(batch_of(sequences, 0)) == 8 and {tuple(row) for row in batch_of(sequences, 5)} <= {(0,), (0, 0), (0, 0, 0)}


def test_sequences_go_to_other_processes_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plans that are known and without; threads read ahead."""
    made = counted(monkeypatch)
    sequences = new(directory=tmp_path)
    alone = new()
    pickle.dumps(alone)  # somebody else was started: from now on plans are kept
    expected = [batch_of(sequences, step) for step in range(40)]
    assert [batch_of(alone, step) for step in range(40)] == expected
    last = sequences.locate(40 * 8 - 1)[0]
    assert made == [*range(last + 1)] * 2 and last
    copies = [pickle.loads(pickle.dumps(one)) for one in (sequences, alone, pickle.loads(pickle.dumps(alone)))]
    for copy in copies:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda step, copy=copy: batch_of(copy, step), range(40))) == expected
    assert len(made) == 2 * last + 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs whose plans are made from now on."""
    made: list[int] = []
    make = plan_module.make_plan
    monkeypatch.setattr(plan_module, "make_plan", lambda *args, **kwargs: made.append(args[3]) or make(*args, **kwargs))
    return made


def test_the_next_plan_is_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sequences = counted(monkeypatch), new()
    first = len(sequences.plan(0))
    assert first > 40
    sequences.ready(0)
    sequences.ready(first // 2 // 8 - 1)
    assert made == [0]
    sequences.ready(first // 2 // 8 + 1)
    sequences.plan(1)
    sequences.ready(first // 8)
    sequences.ready(first // 8 + 1)
    assert made == [0, 1]


def test_one_of_many_makes_a_plan_and_the_others_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = counted(monkeypatch)
    make = plan_module.make_plan
    monkeypatch.setattr(plan_module, "make_plan", lambda *args, **kwargs: time.sleep(0.2) or make(*args, **kwargs))
    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda _: stored_plan(tmp_path, mixture(), BUDGET, 0, 0), range(8)))
    assert made == [0] and all(same(plan, plans[0]) for plan in plans)


def test_plans_are_lent_while_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    make, begin = plan_module.make_plan, threading.Event()
    monkeypatch.setattr(plan_module, "make_plan", lambda *args, **kwargs: begin.wait(60) and make(*args, **kwargs))
    sequences = new()
    sequences._asked(0)
    threading.Timer(0.1, begin.set).start()
    copy = pickle.loads(pickle.dumps(sequences))
    assert same(copy.plan(0), sequences.plan(0)) and made == [0]


def test_a_plan_that_could_not_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = new()
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "make_plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sequences.plan(0)
    assert same(sequences.plan(0), make_plan(mixture(), BUDGET, 3, 0))


def test_a_sequence_takes_less_than_a_millisecond() -> None:
    sequences = Sequences(Mixture([corpus("a", 20_000)]), BUDGET, seed=0, batch=64)
    steps = np.random.default_rng(0).permutation(len(sequences.plan(0)) // 64).tolist()
    taken = []
    for step in steps:
        start = time.perf_counter()
        sequences.row(step, step % 64)
        taken.append(time.perf_counter() - start)
    assert len(taken) > 100 and np.median(taken) < 1e-3


# --- with real records ---------------------------------------------------------------------------------------------------


def test_packed_records_collate_to_fixed_shapes(engine: PromptEngine, backbone: BackboneConfig) -> None:
    random = np.random.default_rng(0)
    examples = []
    for number in range(40):
        sizes = random.integers(30, 200, (number % 4, 2)).tolist()
        pictures = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
        words = {"type": "text", "text": "word " * int(random.integers(5, 60))}
        examples.append(engine.encode([{"role": "user", "content": [*pictures, words]}, {"role": "assistant", "content": "Yes"}]))
    frames = [[(picture.grid.rows, picture.grid.columns) for picture in example.pictures] for example in examples]
    works = np.array([vision_work(sizes, backbone.vision) for sizes in frames])
    mixed = Mixture([Corpus("real", np.array([len(example.tokens) for example in examples]), works)])
    row_length = propose_row_length(mixed, 256, backbone.vision)
    sequences = Sequences(mixed, Budget(256, row_budget(row_length, backbone.vision)), seed=0, batch=4)
    for step in range(len(sequences.plan(0)) // 4 + 1):
        rows = [[examples[record] for record in records] for records in sequences.rows(step)]
        batch = collate(rows, backbone, length=256, vision_row_length=row_length)
        assert batch.tokens.shape == (4, 256) and batch.vision is not None
        assert batch.vision.frames.shape == (4, row_length) and batch.vision.groups == 4
        assert [int(row.max()) for row in batch.segments] == [len(row) for row in rows]  # each example a segment of its own
