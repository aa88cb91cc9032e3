"""`blm data features` from end to end: the store it makes, that training on it is training online, and what it says before it starts."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from blm_jax import counts
from blm_jax import mesh as meshes
from blm_jax.cli import main
from blm_jax.config import ComputeConfig, HardwareConfig, MeshConfig
from blm_jax.data.demos import intents as store
from blm_jax.data.demos.intents import Intents, open_intents
from blm_jax.data.demos.moments import Augmentation, MomentRows, observe, open_moments, used_frames
from blm_jax.data.demos.robots import load_robots, render
from blm_jax.data.demos.survey import write_survey
from blm_jax.data.loader import Loader
from blm_jax.data.vision.augment import AugmentConfig
from blm_jax.errors import RequestError
from blm_jax.infer import features as making
from blm_jax.infer.act import load_actor, load_below
from blm_jax.infer.features import Request, features
from blm_jax.models.mllm import Mllm
from blm_jax.models.policy import abstract_policy
from blm_jax.train.stages import StageTwo
from blm_jax.train.step import begin, make_step, mean, shardings
from blm_jax.weights.engine import open_engine
from blm_jax.weights.fingerprint import fingerprint
from blm_jax.weights.policy import PolicyFiles, write_policy
from blm_jax.weights.source import read_config
from tests.convert.policy_dirs import make_params
from tests.data.demos.stage_two import LENGTHS, POLICY, ROBOTS, Stage, make_stage
from tests.tiny_model import write_tiny_model

TWO = Augmentation(AugmentConfig(crop=0.2, brightness=0.2), seed=1, versions=2)
BATCH, STEPS = 4, 50


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """A row for each device. And one thread: those that wait for each other cost more than these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "ROWS", 1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a policy of two robots, not in the order of the sets; one of the package's was never trained."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def stage(model: str, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    made = make_stage(tmp_path_factory.mktemp("sets"), Path(model))
    robots = {**ROBOTS, "panda": replace(load_robots()["panda"], horizon=6, executed=3)}
    files = PolicyFiles(POLICY, {name: robots[name] for name in POLICY.robots}, made.statistics, fingerprint(model))
    write_policy(Path(model) / "policy", files, make_params(POLICY))
    for name, found in made.surveys.items():
        write_survey(made.folder / f"{name}.json", found)
        (made.folder / f"{name}.yaml").write_text(render({name: ROBOTS[name]}))
    return made


def request(stage: Stage, model: str, name: str, out: Path, **changes: Any) -> Request:
    folder = stage.folder
    files: dict[str, Any] = {"stats": str(folder / f"{name}.json"), "robots_files": (str(folder / f"{name}.yaml"),)}
    given: dict[str, Any] = {"augmentation": TWO, "room": 8, "form": "float32", **changes}
    return Request(model, (str(folder / name),), name, out=str(out), **files, **given)


@pytest.fixture(scope="module")
def exact(stage: Stage, model: str) -> list[Intents]:
    for name in ROBOTS:
        features(request(stage, model, name, stage.folder / "float32" / name))
    return [open_intents(stage.folder / "float32" / name) for name in ROBOTS]


@pytest.fixture(scope="module")
def backbone(stage: Stage, model: str) -> Mllm:
    return load_below(model, POLICY, alone(), ComputeConfig())


def moments(stage: Stage, model: str, intents: list[Intents] | None = None) -> MomentRows:
    settings: dict[str, Any] = {"batch": BATCH, "seed": 4, "augmentation": TWO, "room": 8, "intents": intents or ()}
    sets = stage.sets(ahead=not intents)
    return open_moments(sets, stage.statistics, POLICY, partial(open_engine, model), backbone=fingerprint(model), **settings)


# --- what is made --------------------------------------------------------------------------------------------------------------


def test_for_a_policy_that_is_not_there_yet(
    stage: Stage, model: str, exact: list[Intents], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run names the block: the same intents, of the same key, without a policy/."""
    bare = tmp_path / "model"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("policy"))
    asked = request(stage, str(bare), "my_arm", tmp_path / "out", policy=POLICY)
    features(asked)
    found, wanted = open_intents(tmp_path / "out"), exact[list(ROBOTS).index("my_arm")]
    assert found.plan.key == wanted.plan.key
    for one, other in zip(found.frame(0, 0, 0, 0), wanted.frame(0, 0, 0, 0), strict=True):
        np.testing.assert_array_equal(one, other)
    folder = stage.folder
    flags = ["--robot", "my_arm", "--robots-file", str(folder / "my_arm.yaml"), "--stats", str(folder / "my_arm.json")]
    command = ["data", "features", str(bare), str(folder / "my_arm"), *flags, "--out", str(tmp_path / "other")]
    assert main(command) == 2
    assert "has no policy/: name the run that is to train one with --run" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("{base: a, out: b, steps: 1, batch: 1, optimizer: {rate: 1}, stage_one: {corpora: {c: 1}}}")
    assert main([*command, "--run", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml is no run of Stage II: it has no stage_two" in capsys.readouterr().err


def test_frames_are_those_of_acting(stage: Stage, model: str, exact: list[Intents]) -> None:
    """What `blm act` makes of the same pictures, one by one."""
    actor = load_actor(model)
    for found, one in zip(exact, stage.sets(ahead=False), strict=True):
        for episode, at, version in ((0, 0, 0), (1, 1, 1), (len(found.plan.sets[0].frames) - 1, 4 if one.robot.name == "small" else 2, 1)):
            seen = observe(one, episode, at, TWO, version)
            rows = actor.intent([seen], [one.robot.name]).rows
            hidden, places = found.frame(0, episode, at, version)
            own = np.asarray(rows.mask[0])
            np.testing.assert_allclose(hidden, np.asarray(rows.hidden[0])[own], atol=1e-4)
            np.testing.assert_array_equal(places, np.asarray(rows.places[0])[own])


def test_a_mesh_and_a_stop_leave_no_trace(
    stage: Stage, model: str, exact: list[Intents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the third shard, gone on with on eight devices, which make only what is lacking."""
    write = store.write_shard

    def stop(directory: Any, plan: Any, number: int, frames: Any) -> int:
        if number == 2:
            next(iter(frames))
            raise KeyboardInterrupt
        return write(directory, plan, number, frames)

    monkeypatch.setattr(store, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        features(request(stage, model, "small", tmp_path / "out", per_shard=7))
    monkeypatch.setattr(store, "write_shard", write)
    with pytest.raises(RequestError, match="out was begun with another form"):
        features(request(stage, model, "small", tmp_path / "out", per_shard=7, form="int8"))
    hardware = HardwareConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    result = features(request(stage, model, "small", tmp_path / "out", per_shard=7, hardware=hardware))
    assert (result["frames"], result["made"]) == (36, 36 - 2 * 7)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"hidden-0000{number}.bin" for number in range(6)),
        *("offsets.npy", "layout.npy", "layouts.npz", "state.npy", "action.npy", store.INFO),
    }
    found = open_intents(tmp_path / "out")
    for frame in range(36):
        version, which, episode, at = found.plan.locate(frame)
        (hidden, places), (wanted, where) = (one.frame(which, episode, at, version) for one in (found, exact[0]))
        np.testing.assert_allclose(hidden, wanted, atol=1e-4)
        np.testing.assert_array_equal(places, where)
    with pytest.raises(RequestError, match="out exists; choose another directory"):
        features(request(stage, model, "small", tmp_path / "out"))


def test_of_one_step_in_so_many(stage: Stage, model: str, exact: list[Intents], tmp_path: Path) -> None:
    """The same as of all steps, where they are; and training that begins windows elsewhere is told of it."""
    result = features(request(stage, model, "my_arm", tmp_path / "out", per_shard=3, every=2))
    found = open_intents(tmp_path / "out")
    lengths, versions = LENGTHS["my_arm"], found.plan.versions
    assert result["frames"] == found.plan.frames == versions * sum(-(-length // 2) for length in lengths)
    for version, (episode, length) in itertools.product(range(versions), enumerate(lengths)):
        for numbers, whole in zip(found.numbers(0, episode), exact[1].numbers(0, episode), strict=True):
            np.testing.assert_array_equal(numbers, whole)
        for step in range(0, length, 2):
            shown, wanted = (one.frame(0, episode, step, version)[0] for one in (found, exact[1]))
            np.testing.assert_array_equal(shown, wanted)
    with pytest.raises(IndexError):
        found.frame(0, 0, 1, 0)
    with pytest.raises(RequestError, match=r"looks at one step in 2, and windows begin at one in 1: .*stage_two.every, or set that to 2"):
        found.check(found.plan.key)
    found.check(found.plan.key, 2)


def test_a_run_that_goes_on_with_a_policy_says_how_often_it_looks(
    stage: Stage, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = "[{path: a, robot: my_arm, stats: b}]"
    run = f"{{base: a, out: b, steps: 1, batch: 1, optimizer: {{rate: 1}}, stage_two: {{sets: {sets}, every: 2}}}}"
    (tmp_path / "run.yaml").write_text(run)
    flags = ["--robot", "my_arm", "--robots-file", str(stage.folder / "my_arm.yaml"), "--stats", str(stage.folder / "my_arm.json")]
    command = [
        "data",
        "features",
        model,
        str(stage.folder / "my_arm"),
        *flags,
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--json",
        "--chip",
        "H200",
    ]
    for more, every in ([], 1), (["--run", str(tmp_path / "run.yaml")], 2):
        assert main([*command, *more]) == 0
        most = sum(-(-length // every) + 1 for length in LENGTHS["my_arm"])  # there may be a frame after the last action
        assert json.loads(capsys.readouterr().out)["frames"] == most


def test_processes_share_the_shards(
    stage: Stage, model: str, exact: list[Intents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes every second one, and the first one ends it. They wait for each other where one of them would be done."""
    asked = request(stage, model, "my_arm", tmp_path / "out", per_shard=4)
    waited: list[str] = []
    monkeypatch.setattr(making, "_together", waited.append)
    monkeypatch.setattr(making, "_fingerprint", fingerprint)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    opened = making._open(asked)
    plan = making._plan(asked, opened, used_frames(opened.demonstrations)[0])
    store.begin(epath.Path(asked.out), plan)  # as the first process does before the others go on
    for index, shards in ((1, [1, 3]), (0, [0, 1, 2, 3, 4])):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        made = features(asked)["made"]
        assert made == (8 if index else 10)
        assert [int(path.stem[-5:]) for path in sorted((tmp_path / "out").glob("hidden-*.bin"))] == shards
        assert (tmp_path / "out" / store.INFO).exists() == (index == 0)
    assert waited == ["begun", "made", "finished"] * 2
    found = open_intents(tmp_path / "out")
    for number in range(found.plan.frames):
        version, which, episode, at = found.plan.locate(number)
        np.testing.assert_array_equal(found.frame(which, episode, at, version)[0], exact[1].frame(which, episode, at, version)[0])


def test_the_key_knows_what_was_computed_with(stage: Stage, model: str, exact: list[Intents], tmp_path: Path) -> None:
    """bfloat16 is another store; and the same weights with another config are another backbone."""
    asked = request(stage, model, "small", tmp_path / "out", hardware=HardwareConfig(compute=ComputeConfig(dtype="bfloat16")))
    opened = making._open(asked)
    plan = making._plan(asked, opened, used_frames(opened.demonstrations)[0])
    with pytest.raises(RequestError, match=r"another dtype \(float32, not bfloat16\): make it again"):
        exact[0].check(plan.key)
    other = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((other / "config.json").read_text())
    holder = config.get("text_config", config)
    assert holder["rms_norm_eps"] != 1e-3
    holder["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="made with another backbone config: make it again"):
        moments(stage, str(other), exact)


# --- training on it ------------------------------------------------------------------------------------------------------------


def alone() -> Mesh:
    return meshes.make_mesh(MeshConfig(), jax.devices()[:1])


def train(rows: MomentRows, backbone: Mllm | None, steps: int = STEPS, mesh: Mesh | None = None) -> np.ndarray:
    """Both losses of each step."""
    mesh = mesh or alone()
    optimizer = optax.adam(1e-3)
    params = {"policy": jax.device_put(make_params(POLICY), shardings(abstract_policy(POLICY, mesh=mesh)))}
    frozen = {} if backbone is None else {"backbone": nnx.to_pure_dict(nnx.state(backbone, nnx.Param))}
    stage = StageTwo(None if backbone is None else backbone.config, POLICY, ComputeConfig(), tasks=len(rows.views))
    state, loader, told = begin(params, params["policy"]["bridge"], optimizer, mesh), Loader(rows), []
    step = make_step(stage, optimizer, mesh, state, frozen, seed=0)
    with meshes.use(mesh):
        for _ in range(steps):
            state, report = step(state, frozen, meshes.put(next(loader), mesh))
            told.append([mean(report.told[name]) for name in ("action", "future")])
    loader.close()
    return np.array(told)


@pytest.fixture(scope="module")
def online(stage: Stage, model: str, backbone: Mllm) -> np.ndarray:
    return train(moments(stage, model), backbone)


def test_cached_training_is_online_training(stage: Stage, model: str, online: np.ndarray, exact: list[Intents]) -> None:
    cached = train(moments(stage, model, exact), None)
    assert online.shape == (STEPS, 2) and np.isfinite(online).all()
    assert online[-10:, 1].mean() < 0.5 * online[:10, 1].mean()  # it learns: losses are of other weights in the end
    np.testing.assert_allclose(cached, online, rtol=1e-5)


def test_on_a_mesh_too(stage: Stage, model: str, online: np.ndarray, exact: list[Intents]) -> None:
    cached = train(moments(stage, model, exact), None, 5, meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(cached, online[:5], rtol=1e-4)


def test_bfloat16_is_near(stage: Stage, model: str, online: np.ndarray, exact: list[Intents], tmp_path: Path) -> None:
    cached = train(moments(stage, model, [as_bfloat16(one, tmp_path / one.plan.robot) for one in exact]), None)
    np.testing.assert_allclose(cached[:10], online[:10], rtol=2e-3)
    np.testing.assert_allclose(cached, online, rtol=0.05, atol=0.01)  # what differs a little is learned from, and differs more
    assert not np.allclose(cached[:5], online[:5], rtol=1e-5)  # what is stored does matter


def as_bfloat16(exact: Intents, path: Path) -> Intents:
    """What features would write, as the same numbers are rounded."""
    plan, directory = replace(exact.plan, form="bfloat16"), epath.Path(path)
    store.begin(directory, plan)
    places = [plan.locate(frame) for frame in range(plan.frames)]
    for number in range(plan.shards):
        frames = (exact.frame(which, episode, at, version) for version, which, episode, at in (places[i] for i in plan.shard(number)))
        store.write_shard(directory, plan, number, frames)
    numbers = [exact.numbers(0, episode) for episode in range(len(plan.sets[0].frames))]
    state = np.concatenate([state for state, _ in numbers])
    action = np.concatenate([np.pad(action, ((0, len(state) - len(action)), (0, 0))) for state, action in numbers])
    store.finish(directory, plan, state, action)
    return open_intents(path)


def test_the_error_of_int8_is_told(stage: Stage, model: str, tmp_path: Path) -> None:
    result = features(request(stage, model, "small", tmp_path / "out", form="int8"))
    error = result["action_error"]
    print(error)
    assert 0 < error["bfloat16"] < error["int8"] < 0.1


def test_prompts_want_a_backbone(stage: Stage, model: str) -> None:
    with pytest.raises(ValueError, match="looked at by a backbone"):
        train(moments(stage, model), None)


# --- the command -----------------------------------------------------------------------------------------------------------------


def arguments(stage: Stage, model: str, out: Path, *more: str) -> list[str]:
    folder = stage.folder
    files = ["--stats", str(folder / "my_arm.json"), "--robots-file", str(folder / "my_arm.yaml"), "--out", str(out)]
    return ["data", "features", model, str(folder / "my_arm"), "--robot", "my_arm", *files, *more]


def test_the_command(stage: Stage, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is said before it starts holds."""
    options = ["--crop", "20%", "--seed", "1", "--versions", "2", "--json"]
    assert main(arguments(stage, model, tmp_path / "out", *options, "--dry-run", "--chip", "TPU v5e", "--read-rate", "1GB")) == 0
    told, said = capsys.readouterr()
    dry = json.loads(told)
    assert not (tmp_path / "out").exists()
    assert f"out: up to {dry['frames']} frames of {dry['frame_tokens']:g} tokens" in said and f"{dry['better']} is faster" in said
    assert dry["read_rate"] == 1e9 and dry["read_s"] == dry["window_bytes"] / 1e9
    # A policy as small as this one learns faster than any disk reads: the look is what tells.
    look = counts.intent_operations(read_config(model), POLICY, [(4, 4), (4, 4)], dry["prompt_tokens"])  # of 56 pixels
    assert dry["look_s"] == pytest.approx(look / (0.5 * 197e12))

    assert main(arguments(stage, model, tmp_path / "out", *options)) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = open_intents(tmp_path / "out")
    assert found.plan.frames == made["frames"] == 18 <= dry["frames"]  # of LeRobot: no observation after the last action
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("hidden-*.bin")) <= dry["bytes"]
    assert found.plan.form == "bfloat16" and found.plan.key["augmentation"] == "crop 0.2, seed 1"
    assert main(arguments(stage, model, tmp_path / "out", *options)) == 2
    assert "out exists; choose another directory" in capsys.readouterr().err


def test_what_cannot_be_made(
    stage: Stage, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str) -> str:
        assert main(arguments(stage, model, tmp_path / "out", *more)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "2 versions of pictures that nothing changes are all the same" in refused("--versions", "2")
    assert "no chip 'TPU v5f' is known; did you mean TPU v5" in refused("--chip", "TPU v5f")
    assert "name the hardware to compare on with --chip: there are H200" in refused("--dry-run")
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear")
    for out in (letter, letter / "out"):
        for more in ((), ("--dry-run", "--chip", "TPU v5e")):
            assert main(arguments(stage, model, out, *more)) == 2
            assert capsys.readouterr().err.splitlines()[-1].endswith("letter.txt is a file: choose a directory")
    assert letter.read_text() == "Dear"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "out needs 26.8kB, and 1.00kB are free: choose another disk, --form int8, or fewer versions" in refused()


def test_a_disk_is_measured(tmp_path: Path) -> None:
    assert 1e6 < making.measured_rate(epath.Path(tmp_path)) < 1e12
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(RequestError, match=r"letter.txt cannot be measured: Not a directory; say with --read-rate"):
        making.measured_rate(epath.Path(tmp_path / "letter.txt"))
