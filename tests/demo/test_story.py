"""The demo's commands: all are real ones, none is done twice, and a directory that holds something else is left alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from blm_jax.cli import main
from blm_jax.configfile import load_as, read
from blm_jax.demo import story as telling
from blm_jax.demo.story import CONFIGURED, Command, Demo, play, story
from blm_jax.errors import RequestError
from blm_jax.evaluate.world.talk.recipe import Recipe
from blm_jax.flags import parse
from blm_jax.recipe import Run


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "package" / "base"
    path.mkdir(parents=True)
    monkeypatch.setattr(telling, "BASE", path)
    return path


@pytest.mark.parametrize("from_scratch", [False, True])
def test_every_command_is_one_of_blm(tmp_path: Path, from_scratch: bool) -> None:
    demo = Demo(str(tmp_path / "demo"), seed=3, from_scratch=from_scratch)
    commands = [command for part in story(demo).values() for command in part.values()]
    assert ("new" in [command[0] for command in commands]) == from_scratch
    for command in commands:
        asked = parse(command)
        if command[0] == "new" or command[:2] == ["data", "collect"]:
            assert asked.seed == 3
        assert shlex.split(telling.line(command)) == ["blm", *command]


def test_configs_are_those_of_any_run(tmp_path: Path) -> None:
    """Below configs/, with the demo's directory in place of their own."""
    out = str(tmp_path / "demo")
    play(Demo(out), lambda command: {"said": command[0]})
    assert read(Recipe, f"{out}/configs/base.yaml") == read(Recipe, telling.CONFIGS / "base.yaml")
    stage_two = load_as(Run, f"{telling.CONFIGS}/stage_two.yaml").stage_two
    assert stage_two and (stage_two.every, stage_two.instruction_tokens) == (telling.EVERY, telling.INSTRUCTION)
    for name in CONFIGURED[1:]:
        ours, theirs = (load_as(Run, f"{folder}/{name}.yaml") for folder in (f"{out}/configs", telling.CONFIGS))
        assert ours.out == theirs.out.replace(telling.HOME, out) and ours.out.startswith(out)
        text = (Path(out) / "configs" / f"{name}.yaml").read_text()
        assert f"{telling.HOME}/" not in text.replace(out, "")


def test_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    demo, ran = Demo(str(tmp_path / "demo")), []

    def run(command: Command) -> dict[str, Any]:
        ran.append(command)
        if len(ran) == 14:
            raise KeyboardInterrupt
        return {"number": len(ran)}

    with pytest.raises(KeyboardInterrupt):
        play(demo, run)
    told = play(demo, run)
    commands = [command for part in story(demo).values() for command in part.values()]
    # The part that was cut off begins again; what was finished before it does not.
    first = next(i for i, command in enumerate(commands) if command == ran[14])
    assert ran[:14] == commands[:14] and ran[14:] == commands[first:] and 0 < first <= 13
    assert list(told) == list(story(demo)) and all(part["seconds"] >= 0 for part in told.values())
    assert play(demo, run) == told and ran[14:] == commands[first:]


def test_what_is_written_whole_is_not_written_again(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo, ran = Demo(str(out)), []

    def run(command: Command) -> dict[str, Any]:
        ran.append(command)
        if command[:3] == ["data", "collect", "questions"]:
            Path(command[3]).mkdir()
            if command[3].endswith("test"):
                raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        play(demo, run)
    play(demo, run)
    assert [command[3:4] for command in ran].count([str(out / "questions")]) == 1


def test_another_demo_is_left_alone(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "demo")
    play(Demo(out), lambda command: {})
    with pytest.raises(RequestError, match="holds another demo, of another seed"):
        play(Demo(out, seed=1), lambda command: {})
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "else")]) == 2
    assert "else exists and is no demo: choose another --out, or remove it" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "else").iterdir()] == ["file"]
    base.rmdir()
    with pytest.raises(RequestError, match="is not in this checkout yet: make it with --from-scratch"):
        play(Demo(str(tmp_path / "new")), lambda command: {})
    assert not (tmp_path / "new").exists()
    with pytest.raises(RequestError, match="lies in a bucket"):
        play(Demo("gs://b/demo"), lambda command: {})
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()).keys() == story(Demo(out)).keys()
