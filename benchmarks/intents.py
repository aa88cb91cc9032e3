"""Stage II from cached intents: a step that reads them beside the same step fed ready arrays from memory, and beside the online step.

    blm bench intents [--save]                              on a CPU: float32, a policy of 28 M parameters (its DiT 17 M)
    blm bench intents --size 7b --dtype bfloat16            on an accelerator: random weights made there

Each side takes the same steps: forward, backward and AdamW of the policy. From memory, batches lie ready as NumPy arrays; cached, a
loader reads them from a store of bfloat16; online, a loader opens pictures and makes prompts, and the backbone looks at both frames of
each window first. Losses are compared before anything is timed. A turn is so many steps in a row that what was made ahead at its
start is a small part. The store is read from the memory of the system, as in a second epoch: what a disk must give, `blm data features
--dry-run` says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _harness
import act
import numpy as np
from _harness import Result, Run, check, progress

from blm_jax.batch import Moments
from blm_jax.config import BackboneConfig, ComputeConfig, Dtype, MeshConfig, TokenConfig
from blm_jax.data.chat import load_tokenizer
from blm_jax.data.demos import intents as store
from blm_jax.data.demos.demonstrations import Demonstrations, open_demonstrations
from blm_jax.data.demos.episodes import Recording
from blm_jax.data.demos.intents import Intents, Plan, open_intents
from blm_jax.data.demos.moments import Augmentation, FrameRows, MomentRows, Prompter, key_of, open_moments, used_frames
from blm_jax.data.demos.recorder import Recorder
from blm_jax.data.demos.robots import Camera, Robot, find_robot, load_robots
from blm_jax.data.demos.survey import survey
from blm_jax.data.loader import Loader
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import read_pixel_config
from blm_jax.errors import RequestError

if TYPE_CHECKING:  # jax is imported once the threads are pinned
    from _acting import Sizes

ROOT = Path(__file__).resolve().parent.parent
MEMORY, CACHED, ONLINE = "from memory", "cached", "online"
BOUND = 1.15  # of a cached step's time to that from memory
LENGTH = 40  # steps of an episode


def open_engine(model: str, config: BackboneConfig) -> PromptEngine:
    return PromptEngine(config, load_tokenizer(model), read_pixel_config(model))


def robot_of(sizes: Sizes) -> Robot:
    pixels = sizes.patches * sizes.backbone.vision.patch
    cameras = tuple(Camera(f"camera{i}", pixels, pixels) for i in range(sizes.cameras))
    return replace(find_robot("panda", load_robots()), cameras=cameras)


def write_set(path: Path, robot: Robot, episodes: int) -> None:
    low, high = (np.array([getattr(dimension, side) for dimension in robot.state]) for side in ("low", "high"))
    with Recorder(path, robot) as recorder:
        for number in range(episodes):
            random = np.random.default_rng(number)
            state = random.uniform(low, high, (LENGTH + 1, len(low)))
            shapes = {one.name: (LENGTH + 1, one.height // 8, one.width // 8, 3) for one in robot.cameras}
            images = {name: random.integers(0, 256, shape, np.uint8).repeat(8, 1).repeat(8, 2) for name, shape in shapes.items()}
            recorder.add(Recording("Put the red cube on the green one.", state, state[:LENGTH], images))


class Sides:
    """The three ways to the same steps. They share the weights, which go on changing."""

    def __init__(self, folder: Path, sizes: Sizes, dtype: Dtype, batch: int, episodes: int, workers: int):
        import jax
        import jax.numpy as jnp
        import optax

        from blm_jax import mesh as meshes
        from blm_jax.models.mllm import random_params, with_params
        from blm_jax.models.policy import random_policy
        from blm_jax.train.stages import StageTwo
        from blm_jax.train.step import begin, make_step

        # The tokenizer's words, whatever the benchmark's model knows.
        backbone = replace(sizes.backbone, decoder=replace(sizes.backbone.decoder, vocab=152064), tokens=TokenConfig())
        compute = ComputeConfig(dtype=dtype)
        self.block = sizes.policy.intent_block
        self.mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        weights = random_params(backbone, jnp.dtype(dtype), self.mesh, 0)
        self.backbone = with_params(backbone, compute, weights)
        optimizer = optax.adamw(1e-4)
        policy = {"policy": random_policy(sizes.policy, mesh=self.mesh, seed=0)}
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(policy))
        self.dit_parameters = sum(leaf.size for leaf in jax.tree.leaves(policy["policy"]["dit"]))
        self.state = begin(policy, policy["policy"]["bridge"], optimizer, self.mesh)
        stage = StageTwo(backbone, sizes.policy, compute, tasks=1)
        self.frozen = {False: {}, True: {"backbone": weights}}  # by whether it looks
        self.steps = {looks: make_step(stage, optimizer, self.mesh, self.state, frozen, seed=0) for looks, frozen in self.frozen.items()}

        sys.path.insert(0, str(ROOT))
        from tests.qwen_files import write_tokenizer_files

        model = str(write_tokenizer_files(folder / "model", max_pixels=28 * 28 * 1280))
        robot = robot_of(sizes)
        progress(f"{episodes} episodes of {LENGTH} steps")
        write_set(folder / "set", robot, episodes)
        found = survey([folder / "set"], robot)
        open_engine_here = partial(open_engine, model, backbone)
        ahead = tuple(camera.name for camera in robot.cameras)
        sets = [open_demonstrations(folder / "set", robot, found, names) for names in ((), ahead)]
        augmentation = Augmentation(versions=1)
        prompter = Prompter(open_engine_here, sizes.policy.instruction, [robot])
        progress("intents of all frames")
        intents = self._write(folder / "intents", sizes, dtype, sets[0], prompter, augmentation)
        options: dict[str, Any] = {"batch": batch, "augmentation": augmentation, "dtype": dtype}
        opened: Callable[..., MomentRows] = partial(
            open_moments, statistics={robot.name: found.statistics}, policy=sizes.policy, open_engine=open_engine_here, **options
        )
        self.loaders = {CACHED: Loader(opened(sets[:1], intents=[intents])), ONLINE: Loader(opened(sets[1:]), workers=workers)}
        self.ready = [next(self.loaders[CACHED]) for _ in range(4)]
        self.intent_bytes = intents.plan.token_bytes * intents.longest
        self.loaders[CACHED] = Loader(opened(sets[:1], intents=[intents]))

    def _write(
        self, path: Path, sizes: Sizes, dtype: Dtype, one: Demonstrations, prompter: Prompter, augmentation: Augmentation
    ) -> Intents:
        import jax

        from blm_jax.infer.act import look

        frame_sets, state, action = used_frames([one])
        key = key_of(prompter.engine, sizes.policy, one.robot, "", augmentation, dtype)
        plan = Plan(one.robot.name, key, "bfloat16", sizes.policy.intent_width, 1, 2**20, frame_sets)
        directory = store.open_path(path)
        rows = FrameRows(plan, [0], [one], prompter, augmentation, 8)
        loader = Loader(rows)

        def frames() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for step in range(rows.steps):
                prompts = next(loader)
                hidden = np.asarray(look(self.backbone, jax.tree.map(jax.numpy.asarray, prompts), self.block).hidden)
                for row in range(rows.rows):
                    if rows.frame(step, row) is not None:
                        yield hidden[row][prompts.mask[row]], prompts.places[row][prompts.mask[row]]

        store.begin(directory, plan)
        store.write_shard(directory, plan, 0, frames())
        store.finish(directory, plan, state, action)
        loader.close()
        return open_intents(path)

    def run(self, side: str, steps: int) -> tuple[float, np.ndarray]:
        import jax

        start = time.perf_counter()
        for number in range(steps):
            moments: Moments = self.ready[number % len(self.ready)] if side == MEMORY else next(self.loaders[side])
            self.state, report = self._step(self.state, moments, looks=side == ONLINE)
        jax.block_until_ready(report)
        return (time.perf_counter() - start) / steps, np.array(self._losses(report))

    def _step(self, state: Any, moments: Moments, *, looks: bool) -> tuple[Any, Any]:
        from blm_jax import mesh as meshes

        with meshes.use(self.mesh):
            return self.steps[looks](state, self.frozen[looks], meshes.put(moments, self.mesh))

    def _losses(self, report: Any) -> list[float]:
        from blm_jax.train.step import mean

        return [float(mean(report.told[name])) for name in ("action", "future")]

    def compare(self) -> float:
        """How far the losses of the first step are from each other."""
        import jax

        found = {}
        for side in (MEMORY, CACHED, ONLINE):
            moments = self.ready[0] if side == MEMORY else next(self.loaders[side])
            copy = jax.tree.map(lambda leaf: leaf.copy(), self.state)  # a step uses up what it is given
            found[side] = np.array(self._losses(self._step(copy, moments, looks=side == ONLINE)[1]))
        check(np.array_equal(found[MEMORY], found[CACHED]), "the first step", f"losses are {found[MEMORY]} and {found[CACHED]}")
        return float(np.abs(found[ONLINE] / found[CACHED] - 1).max())

    def close(self) -> None:
        for loader in self.loaders.values():
            loader.close()


# --- measuring and telling -----------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        sides = Sides(Path(directory), sizes, args.dtype, args.batch, args.episodes, args.workers)
        progress("compiling and comparing")
        difference = sides.compare()
        check(difference < 1e-2, "the first step", f"losses differ by {difference:.1e} of their size")
        runs: dict[str, Run] = {side: partial(sides.run, side, args.steps) for side in (MEMORY, CACHED, ONLINE)}
        progress(f"{args.repeats} rounds of {args.steps} steps")
        seconds, others = _harness.watched_turns(runs, args.repeats)
        sides.close()
    ratios = {side: _ratio(seconds[side], seconds[MEMORY]) for side in (CACHED, ONLINE)}
    return {
        "parameters": sides.parameters,
        "dit_parameters": sides.dit_parameters,
        "intent_bytes": sides.intent_bytes,
        "losses_differ_by": difference,
        "sides": {side: _harness.times_of(times) for side, times in seconds.items()},
        "to_memory": ratios,
        "cached_to_online": _ratio(seconds[CACHED], seconds[ONLINE]),
        "holds": ratios[CACHED]["median"] <= BOUND,
        "others_cores": others,
    }


def _ratio(times: list[float], others: list[float]) -> Result:
    rounds = [one / other for one, other in zip(times, others, strict=True)]
    return {"median": float(np.median(times) / np.median(others)), "rounds": [min(rounds), max(rounds)]}


def show(result: Result) -> None:
    found, device = result["steps"], result["hardware"]["device"]
    print(f"\n{result['size']}, {result['dtype']}, on {device}, batches of {result['batch']}, {result['repeats']} rounds")
    print(f"a policy of {found['parameters'] / 1e6:.0f} M parameters, {found['dit_parameters'] / 1e6:.0f} M of them its DiT's")
    print(f"an intent of {found['intent_bytes'] / 1e3:.0f} kB, two a window")
    for side, times in found["sides"].items():
        ratio = found["to_memory"].get(side)
        beside = f"  {ratio['median']:.3f} of that ({ratio['rounds'][0]:.3f} to {ratio['rounds'][1]:.3f})" if ratio else ""
        print(f"  {side:<12}{1e3 * times['median_s']:>10.1f} ms a step{beside}")
    print(f"a cached step takes {found['cached_to_online']['median']:.3f} of an online one; at most {BOUND} from memory: {found['holds']}")
    for note in result["notes"]:
        print(f"note: {note}")


def main(argv: list[str]) -> Result:
    args = parse(argv)
    _harness.prepare(args)
    if args.dtype == "bfloat16":
        _harness.peak_of(args, act.LARGE, "100m")
    sizes = act.sizes_of(args.size)
    found = measure(sizes, args)
    result = _harness.terms(args, ("optax", "grain")) | {
        "model": {"backbone": asdict(sizes.backbone), "policy": asdict(sizes.policy)},
        "observation": {"cameras": sizes.cameras, "pixels": sizes.patches * sizes.backbone.vision.patch},
        "batch": args.batch,
        "steps_a_turn": args.steps,
        "workers": args.workers,
        "steps": found,
        "notes": _harness.notes_of("", [found], None),
    }
    show(result)
    if args.save:
        _harness.save(_harness.file_name("intents", result), result)
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _harness.parser_of("intents", __doc__, ("tiny", "100m", *act.LARGE), "100m")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="windows of a step (default: 8)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of a turn (default: 10)")
    parser.add_argument("--episodes", type=int, default=4, metavar="N", help=f"of {LENGTH} steps (default: 4)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that open pictures online (default: 0, threads)")
    args = parser.parse_args(argv)
    _harness.check_arguments(args, act.LARGE)
    if min(args.batch, args.steps, args.episodes) < 1 or args.workers < 0:
        raise RequestError("--batch, --steps and --episodes are at least 1")
    return args


if __name__ == "__main__":
    _harness.run_as_script("intents", main)
