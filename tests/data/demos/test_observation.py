"""The observation's contract: each breach is one clear line; files whole or not at all; intent tokens against hand-made cases."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blm_jax.config import BackboneConfig
from blm_jax.data.chat import Tokenizer
from blm_jax.data.demos.observation import (
    Observation,
    check,
    check_last,
    check_output,
    check_state,
    intent_tokens,
    messages_for,
    read_last,
    read_observations,
    write_chunks,
)
from blm_jax.data.demos.robots import Camera, load_robots
from blm_jax.data.positions import Grid
from blm_jax.data.prompt import Example, PromptEngine
from blm_jax.data.vision.pictures import Picture
from blm_jax.errors import RequestError, RunError

# 56x84 pixels are 2x3 visual tokens, 84x56 are 3x2.
PANDA = replace(load_robots()["panda"], cameras=(Camera("base", 56, 84), Camera("wrist", 84, 56)))
READY = np.array([0, 0.4, 0, -2.0, 0, 2.4, 0.8, 1.0])
BASE = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
WRIST = np.random.default_rng(1).integers(0, 256, (84, 56, 3), np.uint8)
GOOD = Observation(READY, {"base": BASE, "wrist": WRIST}, "pick up the cube")


def message(call: Any, *args: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the contract ------------------------------------------------------------------------------------------------------------


def test_what_fits_comes_out_in_the_order_of_the_cameras() -> None:
    for images in ({"wrist": WRIST, "base": BASE}, [("base", BASE), ("wrist", WRIST)]):
        found = check(replace(GOOD, images=images, state=READY.tolist()), PANDA)
        assert isinstance(found.images, dict) and list(found.images) == ["base", "wrist"]
        assert found.images["base"] is BASE and found.images["wrist"] is WRIST
        assert found.state.dtype == np.float32 and found.instruction == "pick up the cube"
        np.testing.assert_array_equal(found.state, READY.astype(np.float32))


def put(index: int, value: float) -> np.ndarray:
    state = READY.copy()
    state[index] = value
    return state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state": READY[:7]}, "the state of panda has the shape [7], not [8]: give panda_joint1, panda_joint2"),
        ({"state": READY[None]}, "has the shape [1, 8], not [8]"),
        ({"state": None}, "has the shape [], not [8]"),
        ({"state": ["a"] * 8}, "the state of panda must be an array of 8 numbers"),
        ({"state": [[1], [1, 2]]}, "the state of panda must be an array of 8 numbers"),
        ({"state": put(2, np.nan)}, "state 2 (panda_joint3) of panda is nan: it must be a finite number"),
        ({"state": put(2, np.inf)}, "state 2 (panda_joint3) of panda is inf"),
        ({"state": put(3, -115)}, "-115, far outside its limits of -3.0718 to -0.0698 rad: is it in degrees? give radians"),
        ({"state": put(3, 0.5)}, "state 3 (panda_joint4) of panda is 0.5, far outside its limits of -3.0718 to -0.0698 rad"),
        ({"state": put(1, 1e9)}, "far outside its limits of -1.7628 to 1.7628 rad: check the order of the state and its units"),
        ({"state": put(7, -1)}, "far outside its limits of 0 to 1 opening: give the gripper's opening, 0 closed and 1 open"),
        ({"images": {"base": BASE}}, "the picture of camera wrist is missing: panda needs base, wrist"),
        ({"images": {}}, "the picture of camera base is missing"),
        ({"images": {"base": BASE, "wrst": WRIST}}, "panda has no camera 'wrst'; did you mean wrist?"),
        ({"images": {"base": BASE, "wrist": WRIST, "top": BASE}}, "panda has no camera 'top'; it has base, wrist"),
        ({"images": [("wrist", WRIST), ("base", BASE)]}, "the cameras of panda come as base, wrist, not wrist, base: reorder the list"),
        ({"images": [("base", BASE), ("base", BASE), ("wrist", WRIST)]}, "name one of them twice"),
        ({"images": [BASE, WRIST]}, "by the names of their cameras, base, wrist, not as list of pictures alone"),
        ({"images": None}, "by the names of their cameras, base, wrist, not as NoneType"),
        ({"images": {"base": BASE[:28], "wrist": WRIST}}, "camera base is [28, 84, 3], not [56, 84, 3]: resize it to 84x56 pixels"),
        ({"images": {"base": WRIST, "wrist": BASE}}, "camera base is [84, 56, 3], not [56, 84, 3]: resize"),
        ({"images": {"base": BASE.transpose(2, 0, 1), "wrist": WRIST}}, "camera base is [3, 56, 84], not [56, 84, 3]: move its channels"),
        ({"images": {"base": BASE[None], "wrist": WRIST}}, "camera base is [1, 56, 84, 3], not"),
        ({"images": {"base": BASE / 255, "wrist": WRIST}}, "camera base is float64, not uint8: scale it to 0..255"),
        ({"images": {"base": "a.png", "wrist": WRIST}}, "camera base must be an array [56, 84, 3] of uint8, not str"),
        ({"instruction": " \n"}, "the instruction is empty"),
        ({"instruction": b"pick"}, "the instruction must be text, not bytes"),
    ],
)
def test_a_breach_is_one_line_that_says_how_to_mend_it(change: dict[str, Any], says: str) -> None:
    assert says in message(check, replace(GOOD, **change), PANDA)


@given(st.integers(0, 7), st.floats(-0.099, 0.099), st.booleans())
def test_a_little_overshoot_is_no_breach_and_more_is(index: int, over: float, high: bool) -> None:
    one = PANDA.state[index]
    span = one.high - one.low
    edge = one.high if high else one.low
    assert check(replace(GOOD, state=put(index, edge + over * span)), PANDA)
    outside = edge + (0.101 + abs(over)) * span * (1 if high else -1)
    assert "far outside its limits" in message(check, replace(GOOD, state=put(index, outside)), PANDA)


# --- files ---------------------------------------------------------------------------------------------------------------------


def arrays(**changes: Any) -> dict[str, Any]:
    images = {"images/wrist": np.stack([WRIST, WRIST // 2, WRIST // 3]), "images/base": np.stack([BASE, BASE // 2, BASE // 3])}
    texts = np.array(["pick the cube", "push it", "größer als 🤖"])
    return {"state": np.stack([READY] * 3).astype(np.float32), **images, "instruction": texts, **changes}


def test_observations_of_a_file(tmp_path: Path) -> None:
    contents = arrays()
    np.savez(tmp_path / "a.npz", **contents)
    found = read_observations(tmp_path / "a.npz")
    assert [one.instruction for one in found] == contents["instruction"].tolist()
    for i, one in enumerate(found):
        images = check(one, PANDA).images
        assert isinstance(images, dict) and list(images) == ["base", "wrist"]
        np.testing.assert_array_equal(images["wrist"], contents["images/wrist"][i])
        np.testing.assert_array_equal(images["base"], contents["images/base"][i])
    np.savez(tmp_path / "one.npz", **arrays(instruction="all the same"))
    assert [one.instruction for one in read_observations(tmp_path / "one.npz")] == ["all the same"] * 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stat": np.zeros(3)}, "'stat' is no part of an observation; did you mean state?"),
        ({"velocity": np.zeros(3)}, "'velocity' is no part of an observation; it holds state, instruction and images/<camera>"),
        ({"state": READY}, "state must be numbers [n, dims], not float64 [8]"),
        ({"state": np.array([["a"] * 8] * 3)}, "state must be numbers [n, dims], not <U1 [3, 8]"),
        ({"state": np.stack([READY] * 2)}, "images/wrist is [3, 84, 56, 3], but state holds 2 observations"),
        ({"instruction": np.array(["a", "b"])}, "instruction is [2], but state holds 3 observations"),
        ({"instruction": np.array([1, 2, 3])}, "instruction must be one text or [n] texts, not int64 [3]"),
        ({"images/base": BASE[0, 0, 0]}, "images/base is [], but state holds 3 observations"),
        ({"state": np.zeros((0, 8))}, "holds no observation"),
        ({"instruction": np.array(["a", None])}, "cannot be read as an .npz of plain arrays"),
        ({"state": None}, "has no array 'state'"),
        ({"instruction": None}, "has no array 'instruction'"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **{name: value for name, value in arrays(**changes).items() if value is not None})
    text = message(read_observations, file)
    assert text.startswith(str(file)) and says in text


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    assert message(read_observations, tmp_path / "none.npz").endswith("none.npz does not exist")
    np.savez(tmp_path / "good.npz", **arrays())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-100])
    (tmp_path / "text.npz").write_text("state: 1")
    (tmp_path / "empty.npz").touch()
    for name in ("cut.npz", "text.npz", "empty.npz", "."):
        assert "cannot be read as an .npz" in message(read_observations, tmp_path / name)
    np.save(tmp_path / "one.npy", READY)
    assert "is a single array (.npy)" in message(read_observations, tmp_path / "one.npy")


def test_chunks_are_written_clipped_with_names_and_units(tmp_path: Path) -> None:
    actions = np.random.default_rng(0).normal(0, 2, (3, 2, 16, 8))
    file = tmp_path / "new" / "chunks.out"
    write_chunks(file, actions, PANDA)
    assert [path.name for path in file.parent.iterdir()] == ["chunks.out"]
    with np.load(file) as found:
        low, high = (np.array([getattr(one, end) for one in PANDA.action]) for end in ("low", "high"))
        np.testing.assert_allclose(found["actions"], np.clip(actions, low, high), atol=1e-6)
        assert found["actions"].dtype == np.float32
        assert (found["actions"] >= low).all() and (found["actions"] <= high).all()
        assert found["names"].tolist() == [f"panda_joint{i}" for i in range(1, 8)] + ["gripper"]
        assert found["units"].tolist() == ["rad"] * 7 + ["opening"]
        assert (found["robot"].item(), found["hz"].item(), found["executed"].item()) == ("panda", 20.0, 8)
    write_chunks(tmp_path / "again.npz", actions, PANDA)
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()


def test_chunks_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = np.zeros((1, 1, 16, 8))
    file = tmp_path / "chunks.npz"
    with pytest.raises(RunError, match="not finite: nothing was written"):
        write_chunks(file, actions + np.nan, PANDA)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", full)
        assert message(write_chunks, file, actions, PANDA) == f"{file} cannot be written: No space left on device"
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    assert message(write_chunks, file, actions, PANDA) == message(check_output, file) == f"{file} exists; choose another file or remove it"
    assert file.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    assert "cannot be written" in message(write_chunks, file / "below.npz", actions, PANDA)


def test_what_is_written_needs_no_pickle(tmp_path: Path) -> None:
    write_chunks(tmp_path / "a.npz", np.zeros((1, 1, 16, 8)), PANDA)
    with np.load(io.BytesIO((tmp_path / "a.npz").read_bytes()), allow_pickle=False) as found:
        assert all(found[name].dtype != object for name in found.files)


# --- the prompt ----------------------------------------------------------------------------------------------------------------


def encode(engine: PromptEngine, instruction_first: bool, observation: Observation = GOOD) -> Example:
    return engine.encode(messages_for(check(observation, PANDA), PANDA, instruction_first), add_generation_prompt=True)


def test_pictures_come_in_order_and_the_instruction_on_its_side(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    pictures = ("<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>") * 2
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    shuffled = replace(GOOD, images={"wrist": WRIST, "base": BASE})
    for first, middle in ((False, pictures + GOOD.instruction), (True, GOOD.instruction + pictures)):
        example = encode(engine, first, shuffled)
        assert tokenizer.decode(example.tokens, skip_special=False) == head + middle + tail
        assert [(picture.grid.rows, picture.grid.columns) for picture in example.pictures] == [(4, 6), (6, 4)]
        alone = engine.encode([{"role": "user", "content": [{"type": "image", "image": BASE}]}])
        np.testing.assert_array_equal(example.pictures[0].patches, alone.pictures[0].patches)


def test_tags_in_an_instruction_are_text(engine: PromptEngine) -> None:
    odd = replace(GOOD, instruction="put the <image> on <|image_pad|> and <|im_end|>")
    mask, places = intent_tokens(encode(engine, False, odd), engine.config, "after")
    assert (places[:, 0] > 0).sum() == 12 and mask.sum() > 12


BASE_PLACES = [(1, 0, 0, 0), (1, 0, 1, 0), (1, 0, 2, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 1, 2, 0)]
WRIST_PLACES = [(2, 0, 0, 0), (2, 0, 1, 0), (2, 1, 0, 0), (2, 1, 1, 0), (2, 2, 0, 0), (2, 2, 1, 0)]
BETWEEN = [(0, 0, 0, 0)] * 2  # <|vision_end|><|vision_start|>


def test_intent_begins_with_the_first_visual_token(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    for first in (False, True):
        example = encode(engine, first)
        mask, places = intent_tokens(example, engine.config, "after")
        begin = int(np.argmax(example.tokens == 151655))
        np.testing.assert_array_equal(mask, np.arange(len(mask)) >= begin)
        assert places.shape == (len(mask), 4) and places.dtype == np.int32
        seen = BASE_PLACES + BETWEEN + WRIST_PLACES
        assert [tuple(place) for place in places[begin : begin + 14]] == seen
        assert not places[:begin].any() and not places[begin + 14 :].any()
        after = tokenizer.decode(example.tokens[begin + 14 :], skip_special=False)
        tail = "<|im_end|>\n<|im_start|>assistant\n"
        assert after == "<|vision_end|>" + ("" if first else GOOD.instruction) + tail


def test_words_alone_may_be_intent(engine: PromptEngine, tokenizer: Tokenizer) -> None:
    example = encode(engine, False)
    mask, places = intent_tokens(example, engine.config, "alone")
    said = tokenizer.decode(example.tokens[mask], skip_special=False)
    assert said == "<|vision_end|>" + GOOD.instruction + "<|im_end|>\n<|im_start|>assistant\n"
    assert not places[mask].any()


def test_an_answer_is_no_intent(engine: PromptEngine) -> None:
    prompt = encode(engine, False)
    messages = [*messages_for(GOOD, PANDA, False), {"role": "assistant", "content": "I pick it."}]
    whole = engine.encode(messages)
    mask, _ = intent_tokens(whole, engine.config, "after")
    assert mask[: len(prompt.tokens)].sum() == intent_tokens(prompt, engine.config, "after")[0].sum()
    assert not mask[whole.supervised].any() and whole.supervised.any()


def test_text_alone_has_no_intent(engine: PromptEngine) -> None:
    example = engine.encode([{"role": "user", "content": "Hello"}])
    assert "there is no picture" in message(intent_tokens, example, engine.config, "after")


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_places_equal_a_loop(backbone: BackboneConfig, shapes: list[tuple[int, int, int, bool]], before: int, between: int) -> None:
    grids = [Grid(frames if video else 1, 2 * rows, 2 * columns, 0.5 if video else None) for frames, rows, columns, video in shapes]
    tokens, expected = [1] * before, [(0, 0, 0, 0)] * before
    for camera, grid in enumerate(grids, start=1):
        for time in range(grid.frames):
            for row in range(grid.rows // 2):
                for column in range(grid.columns // 2):
                    tokens.append(151655 if grid.seconds is None else 151656)
                    expected.append((camera, row, column, time))
        tokens += [1] * between
        expected += [(0, 0, 0, 0)] * between
    pictures = tuple(Picture(np.zeros((grid.patches, 1), np.float32), grid) for grid in grids)
    example = Example(np.array(tokens, np.int32), np.zeros((3, len(tokens)), np.int32), np.zeros(len(tokens), bool), pictures, 0)
    mask, places = intent_tokens(example, backbone, "after")
    assert [tuple(place) for place in places] == expected
    np.testing.assert_array_equal(mask, np.arange(len(tokens)) >= before)


# --- what is left of a chunk ---------------------------------------------------------------------------------------------------

STEPS = np.tile(READY, (5, 1))


def test_what_is_left_of_chunks() -> None:
    each = np.stack([STEPS, STEPS + 0.05 * (np.arange(8) == 7)])  # beyond the gripper's limit, as rounding may be
    alike, apart = check_last([STEPS.tolist(), each], 3, [PANDA, PANDA], 2, prefix=0) or []
    assert alike.shape == apart.shape == (2, 5, 8) and alike.dtype == apart.dtype == np.float32
    np.testing.assert_array_equal(alike, np.stack([STEPS, STEPS]).astype(np.float32))
    np.testing.assert_array_equal(apart, alike)
    assert check_last(None, 0, [PANDA], 2, prefix=3) is None
    np.testing.assert_array_equal(check_state(READY, PANDA), READY.astype(np.float32))


@pytest.mark.parametrize(
    ("last", "delay", "says"),
    [
        (None, 2, "the delay is 2, but of which chunk? Give what is left of the last one"),
        ([STEPS], 0, "there are 1 last chunks for 2 observations: give as many"),
        ([STEPS, STEPS[:4]], 0, "of the last chunks 4 and 5 steps are left: cut them to the same number"),
        ([STEPS, STEPS], 6, "the delay is 6: it is a whole number of steps, from 0 to the 5 left of the last chunk"),
        ([STEPS, STEPS], -1, "the delay is -1: it is a whole number of steps"),
        ([STEPS, STEPS], 1.0, "the delay is 1.0: it is a whole number of steps"),
        ([STEPS, STEPS], True, "the delay is True: it is a whole number of steps"),
        ([STEPS, STEPS], 4, "the delay is 4 steps, but the policy was trained with at most 3 given: ask sooner, or train with a longer"),
        ([STEPS, STEPS[:, :7]], 0, "what is left of panda's last chunk has the shape [5, 7], not [steps, 8] or, a chunk for each sample"),
        ([STEPS, np.stack([STEPS] * 3)], 0, "has the shape [3, 5, 8], not [steps, 8] or, a chunk for each sample, [2, steps, 8]"),
        ([STEPS, READY], 0, "has the shape [8], not"),
        ([STEPS, [["a"] * 8]], 0, "what is left of panda's last chunk must be an array [steps, 8] of numbers"),
        ([np.tile(STEPS, (4, 1))] * 2, 0, "20 steps are left of panda's last chunk, more than the 16 of a chunk"),
        ([STEPS, STEPS * np.nan], 0, "action 0 (panda_joint1) of panda's last chunk is nan: it must be a finite number"),
        ([STEPS, np.rad2deg(STEPS)], 0, "action 1 (panda_joint2) of panda's last chunk is 22.9183, far outside its limits of -1.7628 to"),
    ],
)
def test_chunks_that_cannot_be_gone_on_from(last: Any, delay: Any, says: str) -> None:
    assert says in message(check_last, last, delay, [PANDA, PANDA], 2, 3)


def test_what_a_file_of_chunks_has_left(tmp_path: Path) -> None:
    """Behind the steps that it says are executed; one chunk goes for all samples."""
    actions = np.random.default_rng(0).uniform(0, 0.1, (2, 3, 16, 8)).astype(np.float32) + READY.astype(np.float32) * 0.9
    for samples in (1, 3):
        write_chunks(tmp_path / f"{samples}.npz", actions[:, :samples], PANDA)
    whole = np.load(tmp_path / "3.npz")["actions"]
    np.testing.assert_array_equal(read_last(tmp_path / "3.npz", PANDA), whole[:, :, PANDA.executed :])
    np.testing.assert_array_equal(read_last(tmp_path / "1.npz", PANDA), whole[:, 0, PANDA.executed :])
    assert message(read_last, tmp_path / "3.npz", load_robots()["xarm7"]) == f"{tmp_path / '3.npz'} holds chunks of panda, not of xarm7"
    stored = dict(np.load(tmp_path / "3.npz"))
    for name, wrong in (("executed", np.array(17)), ("executed", np.array([8])), ("actions", stored["actions"][0])):
        arrays: dict[str, Any] = stored | {name: wrong}
        np.savez(tmp_path / "wrong.npz", **arrays)
        assert "actions must be numbers [n, samples, horizon, dims], and executed" in message(read_last, tmp_path / "wrong.npz", PANDA)
    np.savez(tmp_path / "other.npz", state=READY)
    assert "has no actions, robot, executed: it is no file of chunks" in message(read_last, tmp_path / "other.npz", PANDA)
