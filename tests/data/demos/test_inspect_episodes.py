"""What is shown of demonstrations is what was recorded, and what a policy is trained on; from the command line to the page."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blm_jax.cli import main
from blm_jax.data.chat import Tokenizer
from blm_jax.data.demos import inspect_episodes
from blm_jax.data.demos.episode_page import plot
from blm_jax.data.demos.inspect_episodes import Line, Values
from blm_jax.data.demos.recorder import Form, Recorder
from blm_jax.data.demos.robots import Dimension, render
from blm_jax.weights.policy import write_policy
from tests import tiny_policy
from tests.convert.policy_dirs import make_files, make_params
from tests.data.demos.recordings import ARM, FIXTURES, SMALL, copied, record, write

LENGTHS = [6, 2, 9]


@pytest.fixture(scope="module")
def robots(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("robots") / "robots.yaml"
    path.write_text(render({robot.name: robot for robot in (ARM, SMALL)}))
    return str(path)


def inspect(path: Path, robot: str, robots: str, *options: str) -> list[str]:
    return ["data", "inspect", str(path), "--robot", robot, "--robots-file", robots, *options]


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["rlds", "lerobot"])
def test_numbers_are_those_that_were_recorded(form: Form, robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings = write(tmp_path / "set", SMALL, LENGTHS, form)
    assert main(inspect(tmp_path / "set", "small", robots, "--episodes", "2,0", "--json")) == 0
    said = told(capsys)
    assert (said["robot"], said["hz"], said["cameras"]) == ("small", 10, {"base": [16, 24]})
    assert (said["episodes"], said["read"], said["bad"]) == (3, 3, [])
    assert sum(count for low, _, count in said["lengths"] if low <= 6) >= 2 and sum(count for *_, count in said["lengths"]) == 3
    assert [episode["episode"] for episode in said["shown"]] == [2, 0]
    for episode in said["shown"]:
        recording = recordings[episode["episode"]]
        assert (episode["steps"], episode["instructions"]) == (LENGTHS[episode["episode"]], [recording.instruction])
        observations = len(recording.action) + (form == "rlds")  # LeRobot has no place for the one after the last action
        for what, values in (("state", recording.state[:observations]), ("action", recording.action)):
            for i, dimension in enumerate(SMALL.state):
                assert episode[what][dimension.name] == {
                    "unit": dimension.unit,
                    "min": values[:, i].min(),
                    "max": values[:, i].max(),
                    "limits": [dimension.low, dimension.high],
                    "beyond": False,
                }


def test_what_lies_beyond_the_limits_is_marked(robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = record(SMALL, 5)
    one.state[2, 0], one.action[:, 1] = 3.25, 1
    one.action[4, 0] = -4.5
    with Recorder(tmp_path / "set", SMALL) as recorder:
        recorder.add(one)
    assert main(inspect(tmp_path / "set", "small", robots)) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("  joint6", "  gripper"))}
    low, high = (f"{edge:.4g}" for edge in (one.state[:, 0].min(), one.action[:, 0].max()))
    assert rows["joint6"] == ["joint6", "rad", low, "3.25!", "-4.5!", high, "-3", "..", "3"]
    assert rows["gripper"][4:] == ["1", "1", "0", "..", "1"] and text.count("!") == 2 + 1
    assert '\n\nepisode 0: 5 steps, 0.5 s at 10 Hz, "do 0"\n' in text
    assert "! beyond the robot's limits: check units and order in columns" in text
    assert "cameras, height x width: base 16x24 (observation.images.base)\n" in text


def test_rounding_to_float32_is_not_beyond() -> None:
    limit = Dimension("turn", "rad", -2.8973, 2.8973)
    rounded = np.array([-2.8973, 2.8973], np.float32).astype(np.float64)
    assert rounded[1] > limit.high
    assert not Values(limit, rounded).summary()["beyond"]
    assert Values(limit, rounded + 1e-6).summary()["beyond"] and Values(limit, np.array([-3.0])).summary()["beyond"]


# --- the page --------------------------------------------------------------------------------------------------------------------


@dataclass
class Section:
    curves: list[dict[str, Any]] = field(default_factory=list)  # a plot each: points by class, and the heights of the dashed lines
    images: list[np.ndarray] = field(default_factory=list)
    tables: list[list[list[tuple[str, str | None]]]] = field(default_factory=list)  # rows of cells with their class
    words: str = ""


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.sections: list[Section] = []
        self.words, self._cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given: dict[str, Any] = dict(attrs)
        if tag == "section":
            self.sections.append(Section())
        if not self.sections:
            return
        section = self.sections[-1]
        if tag == "svg":
            section.curves.append({"limits": []})
        elif tag == "line":
            section.curves[-1]["limits"].append(float(given["y1"]))
        elif tag == "polyline":
            points = [pair.split(",") for pair in given["points"].split()]
            section.curves[-1][given["class"]] = np.array(points, float)
        elif tag == "img":
            assert given["src"].startswith("data:image/")
            section.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(given["src"].partition(",")[2])))))
            assert section.images[-1].shape[:2] == (int(given["height"]), int(given["width"]))
        elif tag == "table":
            section.tables.append([])
        elif tag == "tr":
            section.tables[-1].append([])
        elif tag in ("td", "th"):
            section.tables[-1][-1].append(("", given.get("class")))
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.sections:
            self.sections[-1].words += data
        if self._cell:
            row = self.sections[-1].tables[-1][-1]
            row[-1] = row[-1][0] + data, row[-1][1]


def read_page(directory: Path) -> Page:
    assert [path.name for path in directory.iterdir()] == ["index.html"]
    text = (directory / "index.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    return Page(text)


def numbers(rows: list[list[tuple[str, str | None]]]) -> np.ndarray:
    return np.array([[float(text) for text, _ in row[1:]] for row in rows[1:]])


def test_the_page_shows_what_was_recorded(robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recordings = write(tmp_path / "set", SMALL, [9, 12])
    options = ["--robot", "small", "--robots-file", robots, "--out", str(tmp_path / "small.json")]
    assert main(["data", "stats", str(tmp_path / "set"), *options]) == 0
    out = ["--stats", str(tmp_path / "small.json"), "--out", str(tmp_path / "page")]
    assert main(inspect(tmp_path / "set", "small", robots, *out)) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}/page/index.html shows the pictures\n")
    page = read_page(tmp_path / "page")
    assert "script" not in page.tags and len(page.sections) == 2
    statistics = json.loads((tmp_path / "small.json").read_text())["statistics"]
    for section, recording in zip(page.sections, recordings, strict=True):
        _curves_are(section, recording.state, recording.action)
        count = len(recording.state)
        for image, step in zip(section.images, np.linspace(0, count - 1, 7).round().astype(int), strict=True):
            assert f"step {step}" in section.words
            assert np.abs(image.astype(int) - recording.images["base"][step].astype(int)).max() <= 4  # JPEG loses that much
        # The last 2 of 3 steps of a chunk lie in the episode, as three quarters of a horizon of 3 do.
        step = len(recording.action) - 2
        assert f"Window at step {step}" in section.words
        _, chunk, learned = section.tables
        np.testing.assert_allclose(numbers(chunk), [*recording.action[step:], [0, 0]], atol=5e-5)
        assert [row[1][1] for row in chunk[1:]] == [row[2][1] for row in learned[1:]] == [None, None, "past"]
        wanted = recording.action[step:].astype(np.float64)
        wanted[:, 0] -= recording.state[step, 0]  # the joint is relative, the gripper is not
        low, high = (np.array(statistics["action"][name]) for name in ("q01", "q99"))
        wanted = (wanted - (low + high) / 2) / ((high - low) / 2)
        np.testing.assert_allclose(numbers(learned), [*wanted, [0, 0]], atol=1e-4)


def _curves_are(section: Section, state: np.ndarray, action: np.ndarray) -> None:
    """Heights of the dashed lines are the limits: they tell the scale that curves are read with."""
    assert len(section.curves) == len(SMALL.state)
    for i, (dimension, curve) in enumerate(zip(SMALL.state, section.curves, strict=True)):
        low, high = curve["limits"]
        assert len(curve["limits"]) == 2 and low > high  # downwards
        for values, points in ((state[:, i], curve["state"]), (action[:, i], curve["action"])):
            drawn = dimension.low + (points[:, 1] - low) / (high - low) * (dimension.high - dimension.low)
            np.testing.assert_allclose(drawn, values, atol=1e-3 * (dimension.high - dimension.low))
            np.testing.assert_allclose(points[:, 0], 300 * np.arange(len(values)) / (len(state) - 1), atol=0.051)


def test_no_peak_is_lost_of_long_episodes() -> None:
    dimension = Dimension("turn", "rad", -1, 1)
    values = np.zeros(20_000)
    values[12_345], values[777] = 5, -3
    drawn = Page(f"<section>{plot(Line(Values(dimension, values), None))}</section>").sections[0].curves[0]
    points = drawn["state"]
    assert len(points) < 2000 and "action" not in drawn
    # 5 and -3 are the edges of the plot, and stand where their steps do.
    assert points[points[:, 1].argmin(), 0] == pytest.approx(300 * 12_345 / 19_999, abs=0.06)
    assert points[points[:, 1].argmax(), 0] == pytest.approx(300 * 777 / 19_999, abs=0.06)
    assert points[[0, -1], 0].tolist() == [0, 300]


def test_texts_are_no_commands(robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script>\n\x1b[31m & </section>"
    with Recorder(tmp_path / "a<b>&", SMALL, "lerobot") as recorder:
        recorder.add(replace(record(SMALL, 3), instruction=hostile))
    assert main(inspect(tmp_path / "a<b>&", "small", robots, "--out", str(tmp_path / "page"))) == 0
    assert '"<script>alert(1)</script>\\n\\x1b[31m & </section>"' in capsys.readouterr().out
    page = read_page(tmp_path / "page")
    assert "script" not in page.tags and "b" not in page.tags
    assert "<script>alert(1)</script>\\n\\x1b[31m & </section>" in page.sections[0].words and "a<b>&" in page.words


# --- bad episodes and wrong requests ---------------------------------------------------------------------------------------------


def test_bad_episodes_are_shown_with_their_reason(robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied("lerobot_v21", tmp_path)
    video = "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
    (path / video).unlink()
    arguments = inspect(path, "my_arm", robots, "--out", str(tmp_path / "page"))
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{path}: 2 episodes of robot my_arm, 1 bad\n") and f"\nbad: episode 1: {video} is missing\n" in text
    assert f"\n\nepisode 1 is bad: {video} is missing\n" in text and "\n\nepisode 0: 12 steps" in text
    assert f"Bad: {video} is missing" in read_page(tmp_path / "page").sections[1].words

    for file in (path / "data/chunk-000").iterdir():
        file.write_bytes(b"no Parquet")
    assert main([*arguments, "--json"]) == 0
    said = told(capsys)
    assert [one["episode"] for one in said["bad"]] == [0, 1] and said["lengths"] == []
    assert all("cannot be read" in one["bad"] for one in said["shown"])
    assert main(arguments) == 0 and "2 bad" in capsys.readouterr().out
    assert len(read_page(tmp_path / "page").sections) == 2


def test_of_many_episodes_some_are_read_unless_a_survey_knows_them(
    robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_episodes, "MOST_READ", 20)
    with Recorder(tmp_path / "set", SMALL) as recorder:
        for i in range(30):
            recorder.add(record(SMALL, 1 + i % 3))
    assert main(inspect(tmp_path / "set", "small", robots, "--count", "1")) == 0
    assert "30 episodes of robot small, of which 20 were read\n" in capsys.readouterr().out
    stats = str(tmp_path / "small.json")
    assert main(["data", "stats", str(tmp_path / "set"), "--robot", "small", "--robots-file", robots, "--out", stats]) == 0
    capsys.readouterr()
    assert main(inspect(tmp_path / "set", "small", robots, "--count", "1", "--stats", stats, "--json")) == 0
    assert told(capsys)["lengths"] == [[1, 1, 10], [2, 2, 10], [3, 3, 10]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "holds demonstrations: say with --robot of which robot; known are panda, xarm6, xarm7, widowxai"),
        (["--robots-file", "{robots}"], "widowxai, my_arm, small"),
        (["--robot", "my_arn", "--robots-file", "{robots}"], "there is no robot 'my_arn'; did you mean my_arm"),
        (["--robot", "panda"], "columns.state: 7 values for 8 dimensions"),
        (["--robot", "my_arm", "--robots-file", "nowhere.yaml"], "nowhere.yaml"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--episodes", "0,2"], "has the episodes 0 to 1, and no 2"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--episodes", "x"], "are no numbers: write 0,5,17"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--episodes", "0", "--count", "2"], "not allowed with argument"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--records", "0"], "is no corpus of conversations: --records is not for it"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--stats", "{other}"], "was changed after the statistics of my_arm"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--model", "nowhere"], "nowhere"),
        (["--robot", "my_arm", "--robots-file", "{robots}", "--out", "{full}"], "is there and not of this command"),
    ],
)
def test_wrong_requests(options: list[str], says: str, robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"robots": robots, "other": str(tmp_path / "other.json"), "full": str(tmp_path / "full")}
    if "{other}" in options:
        write(tmp_path / "other", ARM, [3])
        found = ["--robot", "my_arm", "--robots-file", robots, "--out", places["other"]]
        assert main(["data", "stats", str(tmp_path / "other"), *found]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("<title>My home page</title>")
    capsys.readouterr()
    assert main(["data", "inspect", str(FIXTURES / "lerobot_v30"), *(option.format(**places) for option in options)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("blm: error: ") and printed.err.count("\n") == 1 and says in printed.err
    assert (tmp_path / "full" / "index.html").read_text() == "<title>My home page</title>"


def test_a_directory_of_neither_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "is no set of demonstrations" in capsys.readouterr().err


# --- the prompt ------------------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_policys(
    model: str, tokenizer: Tokenizer, robots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings = write(tmp_path / "set", ARM, [5], "rlds")
    arguments = inspect(tmp_path / "set", "my_arm", robots, "--model")
    assert main([*arguments, model, "--out", str(tmp_path / "page")]) == 0
    head, start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    # By hand: 64 / 28 is nearest to 2.
    pictures = "".join(f"<|vision_start|>[picture {i}: image of 56x56, 4 tokens]<|vision_end|>" for i in (1, 2))
    pads = f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>" * 2
    tokens = len(tokenizer.encode(f"{head}{pads}do 0{start}"))
    assert f"\n\nwhat the model reads at step 2, {tokens} tokens\n{head}{pictures}do 0{start}" in capsys.readouterr().out
    # On the page, the model's pictures follow the 7 frames of each camera.
    *_, front, wrist = read_page(tmp_path / "page").sections[0].images
    for found, camera in ((front, "front"), (wrist, "wrist")):
        resized = Image.fromarray(recordings[0].images[camera][2]).resize((56, 56), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, np.asarray(resized))

    # A policy says for itself where it reads the instruction.
    acting = Path(shutil.copytree(model, tmp_path / "acting"))
    config = replace(tiny_policy.CONFIG, instruction="before")
    write_policy(acting / "policy", make_files(config), make_params(config))
    assert main([*arguments, str(acting), "--json"]) == 0
    assert told(capsys)["shown"][0]["prompt"]["text"] == f"{head}do 0{pictures}{start}"
