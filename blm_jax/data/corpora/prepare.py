"""From a source of conversations to a corpus: every record is read as training will read it, and kept if that works.

The n-th so many records of a source become the n-th shard, whoever makes it, so the corpus is the same whatever the number of
processes and interruptions. A shard is finished when its note is there, shard-00000.json; notes become corpus.json in the end.
Whoever goes on looks again at the bad records of finished shards, whose pictures may have been mended.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from blm_jax.data.corpora.budget import all_whole, vision_work
from blm_jax.data.corpora.conversations import read_record
from blm_jax.data.corpora.corpus import (
    FORMAT,
    INFO,
    LENGTHS,
    PREPARING,
    REPORT,
    Stored,
    encode_record,
    lengths_file,
    read_info,
    reading,
    shard_name,
    shard_writer,
)
from blm_jax.data.corpora.media import Media
from blm_jax.data.corpora.sources import Item, Piece, Source
from blm_jax.data.files import one_line, open_path, read_json, write_whole
from blm_jax.data.prompt import SETTINGS, Part, PromptEngine, Turn
from blm_jax.data.vision.headers import picture_tokens, video_tokens
from blm_jax.data.workers import in_order
from blm_jax.errors import RequestError

ENOUGH = 1000  # records, after which too many bad ones end the run at once
LOCK = ".lock"


@dataclass(frozen=True)
class Request:
    """All that decides which bytes come out, beside the source itself; what workers are given."""

    source: Source
    open_engine: Callable[[], PromptEngine]
    out: str
    root: str | None
    records_per_shard: int
    max_tokens: int | None
    max_patches: int | None

    def engine(self) -> PromptEngine:
        engine = self.open_engine()
        return PromptEngine(engine.config, engine.tokenizer, engine.pixels, self.max_tokens)

    def media(self) -> Media:
        return Media(self.root or self.source.root)


def prepare(request: Request, workers: int, max_bad: float, *, show: bool | None = None) -> dict[str, Any]:
    """Make the corpus, or what of it is lacking. Its corpus.json."""
    directory = open_path(request.out)
    settings = {
        "reading": reading(request.engine()),
        "records_per_shard": request.records_per_shard,
        "max_tokens": request.max_tokens,
        "max_patches": request.max_patches,
        "root": os.fspath(request.media().root),  # resolved; a wrong one is known before any work
    }
    with _held(directory):
        _begin(directory, settings)
        if (directory / INFO).exists():
            info = _finished(directory, request)
        else:
            notes = _notes(request, workers, max_bad, directory, show)
            info = _finish(directory, settings, notes)
        _tidy(directory, len(info["shards"]))
    return info


# --- one record ----------------------------------------------------------------------------------------------------------


class Length(NamedTuple):
    """Of a record."""

    tokens: int
    work: int  # by `vision_work`
    whole: bool  # by `all_whole`


def check_record(record: Any, media: Media, engine: PromptEngine, max_patches: int | None) -> tuple[list[dict[str, Any]], Length]:
    """The messages of a record with the bytes of their pictures, and how long it is."""
    turns = [(role, [_loaded(part, media) for part in parts]) for role, parts in read_record(record)]
    # By their headers, before anything large is made of them.
    most = sum(_visual_tokens(part, engine) for _, parts in turns for part in parts if part["type"] != "text")
    if most > engine.max_length:
        raise RequestError(f"pictures and videos are {most} tokens, more than the {engine.max_length} allowed: make them smaller")
    messages = _as_messages(turns)
    example = engine.encode(messages)
    if not example.supervised.any():
        raise RequestError("there is nothing to learn: the chat template writes no answer of the assistant's")
    frames = [(picture.grid.rows, picture.grid.columns) for picture in example.pictures for _ in range(picture.grid.frames)]
    work = vision_work(frames, engine.config.vision)
    if max_patches is not None and work > max_patches:
        raise RequestError(f"pictures and videos are {work} patches of work, more than the {max_patches} allowed: make them smaller")
    return messages, Length(len(example.tokens), work, all_whole(frames, engine.config.vision))


def messages_of(turns: Sequence[Turn], media: Media) -> list[dict[str, Any]]:
    """What the prompt engine reads, with the bytes of pictures."""
    return _as_messages([(role, [_loaded(part, media) for part in parts]) for role, parts in turns])


def _as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": role, "content": [_written(part) for part in parts]} for role, parts in turns]


def _loaded(part: Part, media: Media) -> Part:
    return part if part["type"] == "text" else {**part, "source": media.load(part["source"], part["type"])}


def _written(part: Part) -> dict[str, Any]:
    """A part as messages have it."""
    if part["type"] == "text":
        return part
    settings = {name: part[name] for name in SETTINGS[part["type"]] if part.get(name) is not None}
    return {"type": part["type"], part["type"]: part["source"], **settings}


def _visual_tokens(part: Part, engine: PromptEngine) -> int:
    settings = {name: part[name] for name in SETTINGS[part["type"]] if part.get(name) is not None}
    return (picture_tokens if part["type"] == "image" else video_tokens)(part["source"], settings, engine.pixels)


# --- one shard -----------------------------------------------------------------------------------------------------------


class ShardMaker:
    """What a worker does: a piece of the source becomes a shard and its note."""

    def __init__(self, request: Request):
        self.request = request
        self.engine = request.engine()
        self.media = request.media()
        self.directory = open_path(request.out)

    def __call__(self, piece: Piece, begin: Callable[[int], None], deadly: Mapping[int, str]) -> dict[str, Any]:
        path = self.directory / note_name(piece.number)
        if path.exists():
            note = read_json(path)
            _check_unchanged(piece, note["source"], self.request)
            if self._still_bad(piece, note["bad"], begin, deadly):
                return note
            path.unlink()  # first: it tells nothing of the shard that is made now
        lengths: list[Length] = []
        bad: list[dict[str, Any]] = []
        lost = 0
        with shard_writer(self.directory, piece.number) as write:
            for place, item in enumerate(piece.items):
                begin(place)
                found = self._read(item, deadly.get(place, ""))
                if isinstance(found, dict):
                    bad.append(found)
                    lost += item.lost
                else:
                    write(found[0])
                    lengths.append(found[1])
        note = {"source": piece.digest, "read": len(piece.items), "lost": lost, "bad": bad}
        note |= {"lengths": [(one.tokens, one.work) for one in lengths], "whole": all(one.whole for one in lengths)}
        write_whole(path, _json(note))
        return note

    def _read(self, item: Item, deadly: str) -> tuple[bytes, Length] | dict[str, Any]:
        """A record as it is stored, and how long it is; or what the report says of it."""
        try:
            if reason := item.problem or deadly:
                raise RequestError(reason)
            with warnings.catch_warnings(action="ignore"):  # PIL warns of all that it mends by itself
                messages, length = check_record(self.request.source.read(item), self.media, self.engine, self.request.max_patches)
                return encode_record(Stored(messages, item.file, item.line, item.index)), length
        except Exception as error:  # whatever a record makes a library do, it is the record that is bad
            reason = one_line(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {one_line(error)}"
            return {"file": item.file, "line": item.line, "record": item.index, "reason": reason}

    def _still_bad(self, piece: Piece, bad: list[dict[str, Any]], begin: Callable[[int], None], deadly: Mapping[int, str]) -> bool:
        """Whether the bad records of a finished shard are as bad as they were. Others are not read again."""
        known = {(entry["file"], entry["record"]): entry for entry in bad}
        for place, item in enumerate(piece.items):
            if entry := known.get((item.file, item.index)):
                begin(place)
                if self._read(item, deadly.get(place, "")) != entry:
                    return False
        return True


def note_name(number: int) -> str:
    return f"shard-{number:05}.json"


def _check_unchanged(piece: Piece, digest: str | None, request: Request) -> None:
    if piece.digest != digest:
        where = f"{piece.items[0].file}, record {piece.items[0].index} and on"
        raise RequestError(f"the source has changed since {request.out} was begun ({where}): remove it, or write to another directory")


def _json(value: Any) -> bytes:
    # Half characters come from broken texts; as escapes they are JSON.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


# --- the whole -----------------------------------------------------------------------------------------------------------


def _notes(request: Request, workers: int, max_bad: float, directory: epath.Path, show: bool | None) -> list[dict[str, Any]]:
    notes: list[dict[str, Any]] = []
    sizes: dict[int, int] = {}
    source = request.source

    def pieces() -> Iterator[Piece]:
        for piece in source.pieces(request.records_per_shard):
            sizes[piece.number] = piece.size
            yield piece

    with tqdm(total=source.size, unit=source.unit, unit_scale=True, desc="prepare", disable=None if show is None else not show) as bar:
        for number, note in enumerate(in_order(pieces(), workers, _Make(request))):
            notes.append(note)
            bar.update(sizes.pop(number))
            bar.set_postfix(records=sum(len(note["lengths"]) for note in notes), bad=sum(len(note["bad"]) for note in notes))
            if sum(note["read"] for note in notes) >= ENOUGH:
                _check_share(directory, notes, max_bad)
    if not notes:
        raise RequestError("the source holds no record")
    _check_share(directory, notes, max_bad)
    if not any(note["lengths"] for note in notes):
        _check_share(directory, notes, -1.0)
    return notes


@dataclass(frozen=True)
class _Make:
    request: Request

    def __call__(self) -> ShardMaker:
        return ShardMaker(self.request)


def _check_share(directory: epath.Path, notes: list[dict[str, Any]], max_bad: float) -> None:
    """Records that a broken file is thought to have had count as bad."""
    bad = sum(note["lost"] for note in notes)
    read = sum(note["read"] - len(note["bad"]) + note["lost"] for note in notes)
    if bad <= max_bad * read:
        return
    _write_report(directory, notes)
    first = next(entry for note in notes for entry in note["bad"])
    where = first["file"] + (f":{first['line']}" if first["line"] else f", record {first['record']}")
    raise RequestError(
        f"{bad} of {read} records are bad, {100 * bad / read:.3g} %: mend them, or allow more by --max-bad and run again, which goes on. "
        f"All are in {directory / REPORT}; the first is {where}: {first['reason']}"
    )


def _write_report(directory: epath.Path, notes: list[dict[str, Any]]) -> None:
    write_whole(directory / REPORT, b"".join(_json(entry) + b"\n" for note in notes for entry in note["bad"]))


def _finish(directory: epath.Path, settings: dict[str, Any], notes: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = np.array([length for note in notes for length in note["lengths"]], np.int64)
    _write_report(directory, notes)
    write_whole(directory / LENGTHS, lengths_file(lengths))
    info = {
        "format": FORMAT,
        "read": sum(note["read"] for note in notes),
        "records": len(lengths),
        "bad": sum(len(note["bad"]) for note in notes),
        "tokens": int(lengths[:, 0].sum()),
        "patches": int(lengths[:, 1].sum()),
        "whole": all(note.get("whole", False) for note in notes),  # notes of an older release do not say
        "settings": settings,
        "shards": [{"records": len(note["lengths"]), "read": note["read"], "source": note["source"]} for note in notes],
    }
    write_whole(directory / INFO, json.dumps(info, indent=1, ensure_ascii=False).encode())
    return info


def _finished(directory: epath.Path, request: Request) -> dict[str, Any]:
    """What is there already, if it is of this source as it is now."""
    info = read_info(directory)
    shards = info["shards"]
    count = 0
    for piece in request.source.pieces(request.records_per_shard):
        _check_unchanged(piece, shards[piece.number]["source"] if piece.number < len(shards) else None, request)
        count += 1
    if count < len(shards):
        raise RequestError(f"the source has become shorter since {request.out} was made: remove it, or write to another directory")
    return info


@contextlib.contextmanager
def _held(directory: epath.Path) -> Iterator[None]:
    """No second process writes to it meanwhile."""
    if "://" in os.fspath(directory):
        yield
        return
    import fcntl

    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK, "wb")  # noqa: SIM115
    except OSError as error:
        raise RequestError(f"{directory} cannot be written to: {error.strerror or one_line(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{directory} is being written by another process: wait for it, or end it") from None
        yield


def _begin(directory: epath.Path, settings: dict[str, Any]) -> None:
    """Refuses a directory that holds something else."""
    path = next((directory / name for name in (INFO, PREPARING) if (directory / name).exists()), None)
    if path is None:
        if directory.exists() and (others := sorted(file.name for file in directory.iterdir() if not file.name.startswith("."))):
            raise RequestError(f"{directory} holds {others[0]} and no corpus: choose another directory")
        write_whole(directory / PREPARING, json.dumps(settings, indent=1, ensure_ascii=False).encode())
        return
    known = read_info(directory)["settings"] if path.name == INFO else read_json(path)
    if other := [name for name in settings if settings[name] != known.get(name)]:
        names = [f"MODEL's {part}" for part in _other_reading(settings, known)] if "reading" in other else []
        names += [name for name in other if name not in ("reading", "root")]
        names += [f"root {known.get('root')}, not {settings['root']}"] if "root" in other else []
        raise RequestError(f"{directory} was begun with other settings ({', '.join(names)}): remove it, or write to another directory")


def _other_reading(settings: dict[str, Any], known: dict[str, Any]) -> list[str]:
    return [name for name, value in settings["reading"].items() if value != known.get("reading", {}).get(name)]


def _tidy(directory: epath.Path, shards: int) -> None:
    """Away with what only an unfinished corpus needs, and with what runs that were killed left behind."""
    made = {shard_name(number) for number in range(shards)}
    ours = tuple(f".{name}" for name in (INFO, LENGTHS, REPORT, PREPARING, "data-", "shard-"))
    for file in list(directory.iterdir()):
        # The source may have been longer when the corpus was begun.
        longer = file.name.startswith("data-") and file.name not in made
        if longer or file.name.startswith((*ours, "shard-")) or file.name in (PREPARING, LOCK):
            file.unlink(missing_ok=True)
