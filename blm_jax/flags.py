"""The flags of `blm`, and what each may be."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from blm_jax.commands import (
    Result,
    act,
    bench,
    convert,
    data_collect_questions,
    data_collect_world,
    data_features,
    data_inspect,
    data_prepare,
    data_stats,
    demo,
    eval_openloop,
    eval_questions,
    eval_world,
    generate,
    new,
    plan,
    train,
)
from blm_jax.errors import RequestError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"blm {version('blm-jax')}")
        raise SystemExit(0)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="blm", description="One model that answers questions about what it sees and drives robot arms.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(_command(commands, "demo", demo, "train, drive robots, ask questions and export, in a small world"))
    _add_generate(_command(commands, "generate", generate, "answer a prompt about text, images and videos"))
    _add_act(_command(commands, "act", act, "sample chunks of actions for recorded observations"))
    _add_train(_command(commands, "train", train, "train the backbone on conversations, or the policy on demonstrations"))
    planning = "compile a run for chips that are not there: does it fit, what is sent, how fast can it be"
    _add_plan(_command(commands, "plan", plan, planning, uses_jax=False))
    small = _command(commands, "new", new, "make a small MODEL for the embedded world: it sees, finds and answers, and knows no robots")
    small.add_argument("recipe", metavar="RECIPE.YAML", help="how much it learns from; the package's own is of configs/world/base.yaml")
    small.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
    small.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and scenes (0)")
    _add_eval(commands.add_parser("eval", help="how well a MODEL does", description="How well a MODEL does."))
    _add_convert(_command(commands, "convert", convert, "bring weights to the Hugging Face layout or to a checkpoint"))
    _add_data(commands.add_parser("data", help="what is done to data before training", description="What is done to data before training."))
    benchmark = _command(commands, "bench", bench, "run a benchmark beside its peer", uses_jax=False)
    benchmark.add_argument("name", metavar="NAME", help="a script of benchmarks/, without .py; flags unknown to blm go to it")
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides"):  # argparse takes none that stand behind a flag
        args.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest and args.run is not bench:
        args.parser.error(f"unknown argument {' '.join(rest)}")
    args.rest = rest
    return args


def _command(commands: Any, name: str, run: Callable[..., Result], summary: str, *, uses_jax: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=run, uses_jax=uses_jax, parser=parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    if uses_jax:
        several = parser.add_argument_group(
            "several processes", "found out from Slurm, MPI, a TPU pod or JAX's variables where these are silent"
        )
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
        several.add_argument("--processes", type=int, metavar="N", help="how many there are; 1 looks for no others")
        several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(parse=parse)  # of the commands that it is made of
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="all of it is written here; a demo cut off goes on (out/demo)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of data, weights and episodes (0)")
    parser.add_argument("--from-scratch", action="store_true", help="make the small base first, which otherwise comes with the package")


def _add_data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_data_prepare(_command(commands, "prepare", data_prepare, "check conversations and write them as a corpus", uses_jax=False))
    _add_data_inspect(_command(commands, "inspect", data_inspect, "show what a model sees of data", uses_jax=False))
    _add_data_stats(_command(commands, "stats", data_stats, "check demonstrations and make a robot's statistics", uses_jax=False))
    _add_data_collect(commands.add_parser("collect", help="make data in a simulator", description="Make data in a simulator."))
    _add_data_features(_command(commands, "features", data_features, "make what the frozen backbone sees of demonstrations, for training"))


def _add_data_collect(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    world = _command(commands, "world", data_collect_world, "by the experts of the embedded world")
    world.add_argument("out", metavar="OUT", help="a directory for a set of each robot")
    _add_cells(world)
    world.add_argument(
        "--episodes", type=_counts, default=(50,), metavar="N", help="of each robot and task, or of each of the --tasks: 9,5,5 (50)"
    )
    world.add_argument(
        "--two",
        type=_share,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="of episodes (all) where another cube lies beside the one meant",
    )
    world.add_argument(
        "--noise", type=float, default=0.005, metavar="RAD", help="of each joint, done but not recorded: it shows ways back (0.005)"
    )
    world.add_argument("--every", type=_at_least_one, default=1, metavar="STEPS", help="from one look of the cameras to the next (1)")
    world.add_argument("--form", choices=("rlds", "lerobot"), default="rlds", help="of the sets (rlds)")
    world.add_argument("--seed", type=int, default=0, metavar="S", help="of beginnings and noise (0)")
    asked = _command(commands, "questions", data_collect_questions, "about scenes of the embedded world, with their answers")
    asked.add_argument("out", metavar="OUT", help="a directory for conversations and their pictures: a SOURCE of blm data prepare")
    what = asked.add_mutually_exclusive_group(required=True)
    what.add_argument("--scenes", type=_at_least_one, metavar="N", help="to ask about")
    what.add_argument("--sentences", type=_at_least_one, metavar="N", help="instead: plain questions and answers, without pictures")
    asked.add_argument("--split", choices=("train", "test"), default="train", help="scenes and words of test are none of train's (train)")
    asked.add_argument("--things-only", action="store_true", help="no robots: things lie on a table")
    asked.add_argument("--seed", type=int, default=0, metavar="S", help="of scenes and questions (0)")


def _add_cells(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--robots", metavar="A,B", help="panda, xarm6, xarm7, widowxai (all)")
    parser.add_argument("--tasks", metavar="A,B", help="PickCube, PushCube, PullCube, StackCube, PlaceSphere, LiftPegUpright (all)")


def _add_data_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a JSON or JSONL file, a directory of such files, or tfds:NAME_OR_DIRECTORY")
    parser.add_argument("--model", required=True, metavar="MODEL", help="whose tokenizer, template and pictures' sizes lengths are of")
    parser.add_argument("--out", required=True, metavar="DIR", help="the corpus; what is there already is gone on with")
    parser.add_argument("--root", metavar="DIR", help="where paths in records begin: a directory, or an archive (that of SOURCE)")
    parser.add_argument("--workers", type=_at_least_one, metavar="N", help="processes (as many as there are cores)")
    parser.add_argument("--records-per-shard", type=_at_least_one, default=4096, metavar="N", help="of the source (4096)")
    parser.add_argument("--max-tokens", type=_at_least_one, metavar="N", help="longer records are bad ones (as the model can read)")
    parser.add_argument("--max-patches", type=_at_least_one, metavar="N", help="records with more vision work are bad ones")
    parser.add_argument("--max-bad", type=_share, default=0.01, metavar="SHARE", help="of bad records, at which all stops (1%%)")


def _add_data_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="what blm data prepare wrote, or a set of demonstrations: RLDS, LeRobot v2.x or v3.0")
    parser.add_argument("--model", metavar="MODEL", help="whose prompts are shown; a corpus has no other sight")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--records", type=_numbers, metavar="I,J", help="numbers of a corpus's records, from 0")
    which.add_argument("--episodes", type=_numbers, metavar="I,J", help="numbers of a set's episodes, from 0")
    which.add_argument("--count", type=_at_least_one, default=3, metavar="N", help="so many, evenly spread (3)")
    parser.add_argument("--out", metavar="DIR", help="a page with pictures, index.html, is written here")
    of_sets = parser.add_argument_group("sets of demonstrations")
    of_sets.add_argument("--robot", metavar="NAME", help="whose demonstrations they are")
    _add_robots_files(of_sets)
    of_sets.add_argument("--stats", metavar="FILE.json", help="what blm data stats wrote: chunks are shown as they are learned, too")


def _add_data_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sets", nargs="+", metavar="SET", help="directories of demonstrations: RLDS, LeRobot v2.x or v3.0")
    parser.add_argument("--robot", required=True, metavar="NAME", help="whose demonstrations they are")
    _add_robots_files(parser)
    parser.add_argument(
        "--scheme",
        choices=("quantile", "mean_std", "min_max"),
        default="quantile",
        help="what is brought to -1 and 1, or to 0 and 1 (quantile)",
    )
    parser.add_argument("--workers", type=_at_least_one, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where training finds the statistics and the good episodes")


def _add_data_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the backbone, with or without a policy/; local or in a bucket")
    parser.add_argument("sets", nargs="+", metavar="SET", help="directories of demonstrations of one robot")
    parser.add_argument(
        "--run",
        dest="run_file",
        metavar="CONFIG",
        help="that they are for: its new policy's block, and the steps it looks at (MODEL's, and all)",
    )
    parser.add_argument("--robot", required=True, metavar="NAME", help="whose demonstrations they are")
    _add_robots_files(parser)
    parser.add_argument("--stats", required=True, metavar="FILE.json", help="what blm data stats wrote: it knows the good episodes")
    parser.add_argument("--out", required=True, metavar="DIR", help="the intents; what a run before has begun is gone on with")
    parser.add_argument(
        "--form", choices=("bfloat16", "float32", "int8"), default="bfloat16", help="of a number; int8 has a scale a token (bfloat16)"
    )
    parser.add_argument("--instruction-tokens", type=_at_least_one, default=64, metavar="N", help="of the longest instruction (64)")
    parser.add_argument("--frames-per-shard", type=_at_least_one, default=1024, metavar="N", help="of a file (1024)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that open pictures (0: threads)")
    changes = parser.add_argument_group("augmentation", "as training must ask for it")
    changes.add_argument("--versions", type=_at_least_one, default=1, metavar="N", help="of each episode, changed differently (1)")
    changes.add_argument("--seed", type=int, default=0, metavar="S", help="of the changes (0)")
    changes.add_argument("--crop", type=_share, default=0.0, metavar="SHARE", help="the most that is cut of each side (0)")
    for name in ("brightness", "contrast", "saturation"):
        changes.add_argument(f"--{name}", type=_share, default=0.0, metavar="SHARE", help="the most by which it is changed (0)")
    before = parser.add_argument_group("before it starts")
    before.add_argument("--dry-run", action="store_true", help="say how large they become, and whether they are worth it; make nothing")
    before.add_argument("--chip", metavar="NAME", help="what will train, such as H200 or 'TPU v5e' (what is here)")
    before.add_argument("--chips", type=_at_least_one, default=1, metavar="N", help="that one disk feeds (1)")
    before.add_argument("--read-rate", type=_size, metavar="SIZE", help="what the disk gives a second, such as 2GB (measured)")
    _add_hardware(parser)


def _share(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 1% or 0.01")
    return share


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: write 0,5,17")
    return [int(part) for part in text.split(",")]


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory in the Hugging Face layout or a checkpoint, local or in a bucket")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    parser.add_argument("--image", action="append", default=[], metavar="P", help="a picture, shown before the prompt; may be repeated")
    parser.add_argument("--video", action="append", default=[], metavar="P", help="a video, shown before the prompt; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="the system message, in place of the model's own")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (512)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens that hold P of the probability (1)")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answer (0)")
    _add_backbone(parser)
    _add_hardware(parser)
    parser.add_argument("--stream", action="store_true", help="print the answer as it grows")


def _add_act(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory with a policy/, local or in a bucket")
    parser.add_argument("--observations", required=True, metavar="FILE.npz", help="state, instruction and images/CAMERA of each")
    parser.add_argument("--robot", required=True, metavar="NAME", help="one of the policy's robots")
    _add_robots_files(parser, "robots of yours: must be those stored with the policy")
    parser.add_argument("--samples", type=_at_least_one, default=1, metavar="N", help="chunks for each observation (1)")
    _add_denoising(parser)
    parser.add_argument("--last", metavar="FILE.npz", help="go on from these chunks, of which as many steps as they say are executed")
    parser.add_argument("--delay", type=int, default=0, metavar="D", help="steps of them that will be executed meanwhile, and are kept (0)")
    _add_backbone(parser)
    _add_hardware(parser)
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="where the chunks go, in the robot's own units")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, "a run as YAML, local or in a bucket; configs/train/ has some", "optimizer.rate=1e-5")


def _add_run(parser: argparse.ArgumentParser, what: str, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=what)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"in place of what it says, such as {example}")
    parser.add_argument("--hardware", metavar="FILE", help="mesh, remat, rows at once and compiler options; configs/hardware/ has some")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, "a run as YAML, or a model alone, which is planned for generation", "hardware.compute.remat=full")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:16x16, v5p:4x4x4, or 2xv5p:4x4x4 for two slices")
    parser.add_argument(
        "--program",
        choices=("train", "sampling", "generation", "all"),
        default="all",
        help="a step, what acts, what answers, or what the run is for (all)",
    )
    parser.add_argument("--rows", type=_at_least_one, metavar="N", help="observations or prompts at once (one a device that has its own)")
    parser.add_argument("--sweep", action="store_true", help="the step on each mesh of the chips, with and without remat")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_eval_openloop(_command(commands, "openloop", eval_openloop, "compare a policy's chunks with what was done in recorded episodes"))
    _add_eval_questions(_command(commands, "questions", eval_questions, "ask questions that have one right answer each"))
    _add_eval_world(_command(commands, "world", eval_world, "let a policy move arms in the embedded world, and count its successes"))


def _add_eval_openloop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory with a policy/, or a training checkpoint; local or in a bucket")
    parser.add_argument("sets", nargs="+", metavar="SET", help="directories of demonstrations, best ones that nothing was learned from")
    parser.add_argument("--robot", required=True, metavar="NAME", help="one of the policy's robots: whose demonstrations they are")
    _add_robots_files(parser, "robots of yours: must be those stored with the policy")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--episodes", type=_numbers, metavar="I,J", help="numbers of each set's episodes, from 0 (all)")
    which.add_argument("--count", type=_at_least_one, metavar="N", help="so many of each set, evenly spread")
    parser.add_argument("--every", type=_at_least_one, metavar="N", help="steps between those looked at (as the robot executes of a chunk)")
    parser.add_argument("--samples", type=_at_least_one, default=1, metavar="N", help="chunks at each step (1)")
    _add_denoising(parser)
    parser.add_argument("--out", metavar="DIR", help="openloop.json, openloop.md and a page with plots, index.html, are written here")
    _add_backbone(parser)
    _add_hardware(parser)


def _add_eval_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory in the Hugging Face layout or a checkpoint, local or in a bucket")
    parser.add_argument("source", metavar="SOURCE", help="conversations, as for blm data prepare; the last answer of each is asked for")
    parser.add_argument("--limit", type=_at_least_one, metavar="N", help="the first N questions (all)")
    parser.add_argument("--out", metavar="DIR", help="questions.json, questions.md and answers.jsonl are written here")
    _add_backbone(parser)
    _add_hardware(parser)


def _add_eval_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as above; or expert, random or still, which need no weights")
    _add_cells(parser)
    parser.add_argument("--episodes", type=_at_least_one, default=50, metavar="N", help="of each robot and task (50)")
    parser.add_argument("--two", action="store_true", help="where one cube would lie there are two, and the instruction says which")
    parser.add_argument("--blind", action="store_true", help="show black pictures: what a policy does without looking")
    parser.add_argument("--shuffled", action="store_true", help="with --two, name the other cube: what a policy does that does not read")
    _add_denoising(parser)
    parser.add_argument("--films", type=_at_least_one, default=0, metavar="N", help="film the first N episodes of each cell into --out (0)")
    parser.add_argument("--out", metavar="DIR", help="world.json, world.md and episodes.jsonl are written here; a run cut off goes on")
    _add_backbone(parser)
    _add_hardware(parser)


def _add_robots_files(parser: Any, what: str = "robots of yours") -> None:
    parser.add_argument("--robots-file", action="append", default=[], metavar="FILE", help=f"{what}; may be repeated")


def _add_denoising(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=_at_least_one, metavar="N", help="denoising steps (as the policy's config says)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (0)")


def _add_backbone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", metavar="MODEL", help="where what a training checkpoint left frozen lies, if it was moved")


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="SIZES", help="devices along each axis, such as data=2,fsdp=4,tensor=1; -1 takes what is left")
    parser.add_argument("--dtype", metavar="D", help="float32 or bfloat16 (float32)")
    parser.add_argument("--attention", metavar="A", help="xla, splash (TPU) or cudnn (GPU), in place of what suits the platform")


def _counts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: write 50, or one for each task: 9,5,5")
    return tuple(_at_least_one(part) for part in text.split(","))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a directory in the Hugging Face layout or a checkpoint, local or in a bucket")
    parser.add_argument("dst", metavar="DST", help="a directory that does not exist yet")
    parser.add_argument("--to", required=True, choices=("hf", "checkpoint", "adapter"), help="what to write; adapter: of LoRA, for peft")
    _add_backbone(parser)
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest safetensors file, such as 5GB or 500MB (5GB)"
    )


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB or 500MB")
    return size
