"""The commands of `blm`: from what was asked to a function of the room that does the work, imported late, so that `--help` is quick."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blm_jax.errors import RequestError, RunError

Result = dict[str, Any] | None


class OutputClosed(Exception):
    pass


def say(text: str, end: str = "\n") -> None:
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise OutputClosed from None


def generate(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.config import SamplingConfig
    from blm_jax.infer import command

    given = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    sampling = SamplingConfig(**{name: value for name, value in given.items() if value is not None})

    def show(piece: str) -> None:
        if process == 0:
            say(piece, end="")

    result = command.generate(
        model=args.model,
        prompt=args.prompt,
        images=tuple(args.image),
        videos=tuple(args.video),
        system=args.system,
        sampling=sampling,
        hardware=_hardware(args),
        backbone=args.backbone,
        on_text=show if args.stream else None,
    )
    if process == 0 and (args.stream or not args.json):
        say("" if args.stream else result["text"])
    return result


def _hardware(args: argparse.Namespace) -> Any:
    from blm_jax.config import HardwareConfig
    from blm_jax.configfile import override

    changes = [f"mesh.{part}" for part in (args.mesh or "").split(",") if part]
    changes += [f"compute.{name}={value}" for name in ("dtype", "attention") if (value := getattr(args, name))]
    return override(HardwareConfig(), changes)


def act(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.infer import command

    result = command.act(
        model=args.model,
        observations=args.observations,
        robot=args.robot,
        robots_files=args.robots_file,
        samples=args.samples,
        steps=args.steps,
        seed=args.seed,
        last=args.last,
        delay=args.delay,
        out=args.out,
        hardware=_hardware(args),
        backbone=args.backbone,
    )
    if process == 0 and not args.json:
        say(f"{result['path']}: {result['observations']} observations, {result['samples']} chunks each of {result['horizon']} steps")
    return result


def demo(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.demo import command
    from blm_jax.demo.story import Demo

    def run(words: list[str]) -> dict[str, Any]:
        """What `blm WORDS --json` would print."""
        asked = args.parse([*words, "--json"])
        return asked.run(asked, process) or {}

    result = command.demo(Demo(args.out, args.seed, args.from_scratch), run)
    if not args.json:
        say(command.as_text(result))
    return result


def new(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.configfile import read
    from blm_jax.evaluate.world.talk.base import write_base
    from blm_jax.evaluate.world.talk.recipe import Recipe

    result = {"out": args.out, "log": write_base(args.out, read(Recipe, args.recipe), args.seed)}
    if process == 0 and not args.json:
        say(f"{args.out}: it sees, finds and answers")
    return result


def convert(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.convert import command

    result = command.convert(args.src, args.dst, to=args.to, max_shard_bytes=args.max_shard_size, backbone=args.backbone)
    if process == 0 and not args.json:
        say(f"{result['out']}: {result['tensors']} tensors, {result['bytes'] / 1e9:.2f} GB, {result['seconds']:.1f} s")
    return result


def train(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.configfile import load_as
    from blm_jax.errors import StoppedError
    from blm_jax.recipe import Run
    from blm_jax.train import command

    files = [args.config, *([args.hardware] if args.hardware else [])]
    result = command.train_run(load_as(Run, *files, overrides=args.overrides))
    if result["stopped"]:
        if args.json and process == 0:
            say(json.dumps(result))
        raise StoppedError(f"{result['out']}: stopped as asked after step {result['step']}, and saved: the same command goes on")
    if process == 0 and not args.json:
        say(f"{result['out']}: {result['step']} steps")
    return result


def plan(args: argparse.Namespace, process: int) -> Result:
    os.environ["JAX_PLATFORMS"] = "cpu"  # what is here computes nothing
    from blm_jax.plan.command import plan_run, read_plan

    files = [args.config, *([args.hardware] if args.hardware else [])]
    result = plan_run(read_plan(files, args.overrides), args.topology, which=args.program, rows=args.rows, sweep=args.sweep)
    text, no = result.pop("text"), result.pop("no")
    if not args.json:
        say(text)
    if no:  # an answer too, which the exit code repeats
        if args.json:
            say(json.dumps(result))
        raise RunError(no)
    return result


def data_prepare(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.data import command
    from blm_jax.weights.engine import open_engine

    result = command.prepare(
        source=args.source,
        open_engine=functools.partial(open_engine, args.model),
        out=args.out,
        root=args.root,
        workers=args.workers,
        records_per_shard=args.records_per_shard,
        max_tokens=args.max_tokens,
        max_patches=args.max_patches,
        max_bad=args.max_bad,
    )
    if not args.json:
        say(f"{result['out']}: {result['records']} records of {result['read']}, {result['bad']} bad, {result['tokens']} tokens")
    return result


def data_inspect(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.data import command
    from blm_jax.weights.engine import instruction_of, open_engine

    if command.is_corpus(args.path):
        _refuse(args, ("robot", "robots_file", "stats", "episodes"), "is a corpus of conversations")
        if args.model is None:
            raise RequestError(f"{args.path} is shown as a model reads it: say of which with --model")
        result = command.show_corpus(args.path, open_engine(args.model), records=args.records, count=args.count, out=args.out)
    else:
        _refuse(args, ("records",), "is no corpus of conversations")
        prompts = {} if args.model is None else {"engine": open_engine(args.model), "instruction": instruction_of(args.model)}
        chosen = {"episodes": args.episodes, "count": args.count}
        result = command.show_demonstrations(
            args.path, args.robot, robots_files=args.robots_file, stats=args.stats, out=args.out, **chosen, **prompts
        )
    text = result.pop("text")
    if not args.json:
        say(text)
    return result


def _refuse(args: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Flags that say nothing of what the path holds."""
    for name in names:
        if getattr(args, name):
            raise RequestError(f"{args.path} {what}: --{name.replace('_', '-')} is not for it")


def data_stats(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.data.demos import survey

    result = survey.stats(args.sets, args.robot, args.robots_file, args.scheme, args.workers, args.out)
    if not args.json:
        say(survey.report(result))
    return result


def data_collect_questions(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.evaluate.world.talk import talks

    if args.sentences:
        if args.things_only:
            raise RequestError("--things-only is of scenes: sentences have none")
        talks.write_sentences(args.out, args.sentences, args.seed, args.split)
        result = {"out": args.out, "questions": args.sentences}
    else:
        asked = talks.write(args.out, args.scenes, args.seed, args.split, robots=not args.things_only)
        result = {"out": args.out, "scenes": args.scenes, "questions": asked}
    if process == 0 and not args.json:
        say(f"{args.out}: {result['questions']} questions")
    return result


def data_collect_world(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.evaluate.world.runs import collect

    cells = _cells(args)
    request = collect.Request(args.out, seed=args.seed, noise=args.noise, every=args.every, form=args.form, **cells)
    result = collect.collect(request)
    if process == 0 and not args.json:
        for cell in result["yield"]:
            say(f"{cell['robot']} {cell['task']}: {cell['episodes']} of {cell['attempts']}, {cell['mean_steps']:.0f} steps each")
    return result


def _cells(args: argparse.Namespace) -> dict[str, Any]:
    """What all commands of the embedded world are asked for."""
    from blm_jax.evaluate.world.arms import ROBOTS
    from blm_jax.evaluate.world.runs.cells import chosen
    from blm_jax.evaluate.world.tasks import TASKS

    robots, tasks = chosen(args.robots, ROBOTS, "robot"), chosen(args.tasks, TASKS, "task")
    return {"robots": robots, "tasks": tasks, "episodes": args.episodes, "two": args.two}


def data_features(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.data.demos.moments import Augmentation
    from blm_jax.data.vision.augment import AugmentConfig
    from blm_jax.infer import features

    changes = AugmentConfig(crop=args.crop, brightness=args.brightness, contrast=args.contrast, saturation=args.saturation)
    run = None if args.run_file is None else _stage_two_of(args.run_file)
    request = features.Request(
        model=args.model,
        sets=tuple(args.sets),
        robot=args.robot,
        stats=args.stats,
        out=args.out,
        policy=None if run is None else run.policy,
        every=1 if run is None else run.every,
        robots_files=tuple(args.robots_file),
        form=args.form,
        augmentation=Augmentation(changes, args.seed, args.versions),
        room=args.instruction_tokens,
        per_shard=args.frames_per_shard,
        workers=args.workers,
        chip=args.chip,
        chips=args.chips,
        read_rate=args.read_rate,
        hardware=_hardware(args),
    )
    result = features.features(request, dry_run=args.dry_run)
    if process == 0 and not args.json and not args.dry_run:
        say(f"{result['out']}: {result['frames']} frames, {result['bytes'] / 1e9:.3g} GB, {result['seconds']:.0f} s")
        if error := result.get("action_error"):
            say(f"actions are off by {error['int8']:.2g} with int8, by {error['bfloat16']:.2g} with bfloat16 (root mean square)")
    return result


def _stage_two_of(file: str) -> Any:
    from blm_jax.configfile import load_as
    from blm_jax.recipe import Run

    stage_two = load_as(Run, file).stage_two
    if stage_two is None:
        raise RequestError(f"{file} is no run of Stage II: it has no stage_two")
    return stage_two


def eval_openloop(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.evaluate.openloop import Request, openloop

    request = Request(
        model=args.model,
        sets=tuple(args.sets),
        robot=args.robot,
        robots_files=tuple(args.robots_file),
        episodes=None if args.episodes is None else tuple(args.episodes),
        count=args.count,
        every=args.every,
        samples=args.samples,
        seed=args.seed,
        steps=args.steps,
        out=args.out,
        backbone=args.backbone,
        hardware=_hardware(args),
    )
    result = openloop(request)
    text = result.pop("text")
    if process == 0 and not args.json:
        say(text)
    return result


def eval_questions(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.evaluate.questions import Request, questions

    request = Request(args.model, args.source, limit=args.limit, out=args.out, backbone=args.backbone, hardware=_hardware(args))
    result = questions(request)
    text = result.pop("text")
    if process == 0 and not args.json:
        say(text)
    return result


def eval_world(args: argparse.Namespace, process: int) -> Result:
    from blm_jax.evaluate.world.runs.command import Request, world

    request = Request(
        model=args.model,
        seed=args.seed,
        steps=args.steps,
        blind=args.blind,
        shuffled=args.shuffled,
        films=args.films,
        out=args.out,
        backbone=args.backbone,
        hardware=_hardware(args),
        **_cells(args),
    )
    result = world(request)
    text = result.pop("text")
    if process == 0 and not args.json:
        say(text)
    return result


def bench(args: argparse.Namespace, process: int) -> Result:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    names = sorted(script.stem for script in folder.glob("*.py") if not script.stem.startswith("_"))
    if not names:
        raise RequestError(f"benchmarks are run from a checkout of the repository, and {folder} holds none")
    if args.name not in names:
        raise RequestError(f"no benchmark {args.name!r}: there are {', '.join(names)}")
    sys.path.insert(0, str(folder))  # as `python benchmarks/NAME.py` would have it
    return importlib.import_module(args.name).main(args.rest)
