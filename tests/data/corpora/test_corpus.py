"""A corpus on disk: what was kept comes back, in any order, and damage is seen."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm_jax.data.chat import Tokenizer
from blm_jax.data.command import prepare
from blm_jax.data.corpora.budget import all_whole, vision_work
from blm_jax.data.corpora.corpus import PreparedCorpus, Stored, decode_record, encode_record, open_corpus, shard_name, shard_writer
from blm_jax.data.mixture import Mixture
from blm_jax.data.prompt import PromptEngine
from blm_jax.errors import RequestError, RunError
from tests.data.corpora.material import open_engine, png, write_source

RECORDS = 30

texts = st.builds(lambda text: {"type": "text", "text": text}, st.text(st.characters(exclude_categories=["Cs"])))
pictures = st.builds(lambda data, limit: {"type": "image", "image": data, "max_pixels": limit}, st.binary(), st.integers(1, 99))
videos = st.builds(lambda data: {"type": "video", "video": data}, st.binary() | st.lists(st.binary(), min_size=1, max_size=3))
messages = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant"]),
    st.lists(texts | pictures | videos, max_size=4),
)


@given(st.builds(Stored, st.lists(messages, max_size=4), st.text(max_size=9), st.none() | st.integers(1, 9), st.integers(0, 9)))
def test_records_come_back(record: Stored) -> None:
    assert decode_record(encode_record(record)) == record


@pytest.fixture(scope="module")
def made(model_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    source = write_source(directory / "source", RECORDS)
    prepare(str(source), lambda: open_engine(str(model_files)), str(directory / "corpus"), workers=0, records_per_shard=8)
    shutil.rmtree(directory / "source")  # it holds all there is
    return directory / "corpus"


@pytest.fixture(scope="module")
def own_engine(model_files: Path) -> PromptEngine:
    return open_engine(str(model_files))


def test_lengths_are_those_of_the_examples(made: Path, own_engine: PromptEngine) -> None:
    corpus = open_corpus(made)
    assert len(corpus) == RECORDS and corpus.info["records"] == RECORDS
    with_pictures, whole = 0, True
    for number in range(len(corpus)):
        example = corpus.example(number, own_engine)
        frames = [(p.grid.rows, p.grid.columns) for p in example.pictures for _ in range(p.grid.frames)]
        assert len(example.tokens) == corpus.tokens[number] and example.supervised.any()
        assert vision_work(frames, own_engine.config.vision) == corpus.patches[number]
        assert corpus.stored(number).index == number
        with_pictures += bool(frames)
        whole &= all_whole(frames, own_engine.config.vision)
    assert with_pictures == (corpus.patches > 0).sum() > 5
    assert corpus.info["whole"] == corpus.in_mixture().whole == whole


def test_it_is_a_part_of_a_mixture(made: Path) -> None:
    corpus = open_corpus(made)
    mixture = Mixture([corpus.in_mixture(Fraction(2)), replace(corpus.in_mixture(Fraction(1, 2)), name="again")])
    assert len(mixture.draws(0, 0)) == RECORDS * 5 // 2
    assert mixture.work()[0] == int(corpus.tokens.sum()) * 5 // 2
    np.testing.assert_array_equal(mixture.tokens, np.concatenate([corpus.tokens, corpus.tokens]))


def test_threads_and_processes_share_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blm_jax.data.corpora.corpus.KEPT_OPEN", 1)
    corpus = open_corpus(made)
    alone = [corpus.record(number) for number in range(RECORDS)]
    order = np.random.default_rng(0).integers(0, RECORDS, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(corpus.record, order)) == [alone[number] for number in order]
    copy = pickle.loads(pickle.dumps(corpus))
    assert isinstance(copy, PreparedCorpus) and copy.record(RECORDS - 1) == alone[-1]
    for number in (-1, RECORDS):
        with pytest.raises(IndexError):
            corpus.record(number)


def test_another_model_is_refused(made: Path, own_engine: PromptEngine) -> None:
    corpus = open_corpus(made)
    corpus.check(own_engine)
    other: dict[str, PromptEngine] = {
        "template": PromptEngine(
            own_engine.config, Tokenizer(own_engine.tokenizer.backend, "{{ messages }}", own_engine.tokenizer.names), own_engine.pixels
        ),
        "pixels": PromptEngine(own_engine.config, own_engine.tokenizer, replace(own_engine.pixels, max_pixels=28 * 28 * 9)),
    }
    for name, engine in other.items():
        with pytest.raises(RequestError, match=f"was prepared for a model with another {name}: prepare it again"):
            corpus.check(engine)


# --- damage --------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says", "kind"),
    [
        (lambda path: cut(path / shard_name(1)), "data-00001.array_record is damaged", RunError),
        (lambda path: (path / shard_name(1)).unlink(), "data-00001.array_record is damaged", RunError),
        (lambda path: shutil.copy(path / shard_name(3), path / shard_name(1)), "it holds 6 of 8 records", RunError),
        (lambda path: cut(path / "lengths.npy"), "lengths.npy cannot be read", RunError),
        (lambda path: np.save(path / "lengths.npy", np.zeros(4)), r"damaged: it holds float64 \[4\]", RunError),
        (lambda path: np.save(path / "lengths.npy", np.zeros((4, 2), "<u4")), "has 4 records, corpus.json 30", RunError),
        (lambda path: (path / "corpus.json").unlink(), "is no corpus, as `blm data prepare` writes them", RequestError),
        (lambda path: (path / "corpus.json").rename(path / "preparing.json"), "is not finished: run the same", RequestError),
        (lambda path: cut(path / "corpus.json"), "corpus.json cannot be read as JSON", RequestError),
        (lambda path: edit(path / "corpus.json", format=9), "of format 9, and 1 is read", RequestError),
        (lambda path: edit(path / "corpus.json", shards=None), "it has no shards or settings", RequestError),
        (shutil.rmtree, "is no corpus", RequestError),
    ],
)
def test_damage_is_seen(damage: Any, says: str, kind: type[Exception], made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "corpus")
    damage(path)
    with pytest.raises(kind, match=says) as caught:
        open_corpus(path).record(12)
    assert "\n" not in str(caught.value)


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    from etils import epath

    with pytest.raises(KeyboardInterrupt), shard_writer(epath.Path(tmp_path), 0) as write:
        write(png(9, 9))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="cannot be written"), shard_writer(epath.Path(tmp_path / "none"), 0) as write:
        write(b"x")
