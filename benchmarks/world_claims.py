"""The paper's claims as far as the embedded world can test them: what Stage I gives the policy, whether one model drives four robots as
well as four models do, and what ten demonstrations teach a robot that the policy never saw.

    python benchmarks/world_claims.py DEMO [--out DIR] [--seeds N] [--episodes N] [--new ROBOT] [--save]

DEMO is what `blm demo` wrote: its demonstrations, corpora and configs are learned from. All policies play the same episodes, so they are
compared episode by episode; intervals are of both, other seeds and other episodes. What was done is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _harness import Result, hardware, progress, run_as_script, save

from blm_jax.demo.story import BASE, INSTRUCTION, ROBOTS, TASKS, Command, demonstrations, line
from blm_jax.errors import RequestError
from blm_jax.flags import parse

FEW = 10  # demonstrations of each task, of a robot that is new
RATE = 5e-4  # of Stage I
DRAWS = 10_000
SURE = 0.95
BACKBONES = ("base", "plain", "embodied")  # the small base; and as many steps of text alone; and Stage I
FEW_SEED = 1000  # of those demonstrations, and one more each: others than all policies know
COMPARED = (  # what is claimed to be better, than what, on which robots
    ("Stage I beside none", "embodied", "base"),
    ("Stage I beside text alone", "embodied", "plain"),
    ("one model beside one a robot", "embodied", "apart"),
    ("ten demonstrations beside none of others", "tuned", "alone"),
)


@dataclass(frozen=True)
class Place:
    demo: Path
    out: Path
    episodes: int
    new: str  # the robot held out

    def config(self, name: str) -> dict[str, Any]:
        return yaml.safe_load((self.demo / "configs" / f"{name}.yaml").read_text())

    def intents(self, backbone: str, robot: str) -> Path:
        return self.out / backbone / "intents" / robot

    def sets(self, robot: str) -> tuple[Path, Path]:
        """A robot's demonstrations and their statistics, in the demo."""
        return self.demo / "demonstrations" / f"world_{robot}", self.demo / "stats" / f"world_{robot}.json"


def main(argv: list[str]) -> Result:
    parser = argparse.ArgumentParser(
        prog="blm bench world_claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="a finished one's directory")
    parser.add_argument("--out", type=Path, default=Path("out/claims"), help="where runs and episodes go (default: out/claims)")
    parser.add_argument("--seeds", type=int, default=3, help="of both stages (default: 3)")
    parser.add_argument("--episodes", type=int, default=50, help="of a cell (default: 50)")
    parser.add_argument("--new", choices=ROBOTS, default="xarm7", help="the robot that one policy learns last (default: xarm7)")
    parser.add_argument("--save", action="store_true", help="write the result to results/")
    args = parser.parse_args(argv)
    if not (args.demo / "report.json").exists():
        raise RequestError(f"{args.demo} is no finished demo: run `blm demo --out {args.demo}` first")
    place = Place(args.demo, args.out, args.episodes, args.new)
    played = [measured(place, seed) for seed in range(args.seeds)]
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax", "jaxlib")},
        "terms": {
            "seeds": args.seeds,
            "episodes": args.episodes,
            "new": args.new,
            "few": FEW,
            "rate": RATE,
            **{name: place.config(name)["steps"] for name in ("stage_one", "stage_two")},
        },
        **told(played),
    }
    print(as_markdown(result))
    if args.save:
        save("world_claims", result)
    return result


# --- what is learned -----------------------------------------------------------------------------------------------------


def measured(place: Place, seed: int) -> dict[str, dict[tuple[str, str, int], bool]]:
    """Of each policy, which of its episodes succeeded."""
    found = {}
    for backbone in BACKBONES:
        model = _backbone(place, backbone, seed)
        policy = _policy(place, backbone, model, f"{seed}/{backbone}", seed, ROBOTS)
        found[backbone] = _play(place, policy, ROBOTS)
    model = _backbone(place, "embodied", seed)
    found["apart"] = {}
    for robot in ROBOTS:
        policy = _policy(place, "embodied", model, f"{seed}/apart_{robot}", seed, (robot,))
        found["apart"] |= _play(place, policy, (robot,))
    found |= _new_robot(place, model, seed)
    return found


def _backbone(place: Place, name: str, seed: int) -> str:
    """A MODEL: learned anew for each seed, as Stage II is."""
    if name == "base":
        return str(BASE)
    config = place.config("stage_one")
    # All of it learns, as in the paper; in the demo what a policy reads stays as it is.
    config["optimizer"] |= {"rate": RATE, "modules": []}
    config["stage_one"]["kept_blocks"] = 0
    corpora = config["stage_one"]["corpora"]
    if name == "plain":
        config["stage_one"]["corpora"] = {path: share for path, share in corpora.items() if "sentences" in path}
    return _trained(place, f"{seed}/{name}_backbone", config, base=str(BASE), seed=seed)


def _policy(place: Place, backbone: str, model: str, name: str, seed: int, robots: Sequence[str]) -> str:
    """One that drives some robots, and sees as many moments of each of them as one that drives all."""
    key = backbone if backbone == "base" else f"{seed}/{backbone}"
    for robot in robots:
        _featured(place, model, robot, *place.sets(robot), place.intents(key, robot))
    config = place.config("stage_two")
    stage = config["stage_two"]
    stage["policy"]["robots"] = [f"world_{robot}" for robot in robots]
    stage["sets"] = [one for one in stage["sets"] if one["robot"] in stage["policy"]["robots"]]
    stage["intents"] = [str(place.intents(key, robot)) for robot in robots]
    config["steps"] = config["steps"] * len(robots) // len(ROBOTS)
    return _trained(place, name, config, base=model, seed=seed)


def _new_robot(place: Place, model: str, seed: int) -> dict[str, dict[tuple[str, str, int], bool]]:
    """Its rows alone learned into a policy of the others, and a policy of its own, from the same few demonstrations."""
    few, robot = place.out / f"{seed}" / "few", f"world_{place.new}"
    _done(place, f"{seed}/few", [*demonstrations(str(few), (FEW,), FEW_SEED + seed), "--robots", place.new])
    sets, stats, intents = few / robot, few.with_name("few_stats.json"), few.with_name("few_intents")
    _done(place, f"{seed}/few_stats", ["data", "stats", str(sets), "--robot", robot, "--out", str(stats)])
    _featured(place, model, place.new, sets, stats, intents)
    others = _policy(place, "embodied", model, f"{seed}/others", seed, [name for name in ROBOTS if name != place.new])
    found = {}
    for name in ("tuned", "alone"):
        config = place.config("stage_two")
        stage = config["stage_two"]
        stage["sets"] = [{"path": str(sets), "robot": robot, "stats": str(stats)}]
        stage["intents"] = [str(intents)]
        config["steps"] //= len(ROBOTS)
        if name == "tuned":
            del stage["policy"]
            stage["only"] = robot
        else:
            stage["policy"]["robots"] = [robot]
        found[name] = _play(
            place, _trained(place, f"{seed}/{name}", config, base=others if name == "tuned" else model, seed=seed), [place.new]
        )
    return found


def _trained(place: Place, name: str, config: dict[str, Any], base: str, seed: int) -> str:
    out = str(place.out / name)
    file = place.out / "configs" / f"{name.replace('/', '_')}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({**config, "base": base, "out": out, "seed": seed}, sort_keys=False))
    _done(place, name, ["train", str(file)])
    return out


def _featured(place: Place, model: str, robot: str, sets: Path, stats: Path, out: Path) -> None:
    run = ["--run", str(place.demo / "configs" / "stage_two.yaml"), "--instruction-tokens", str(INSTRUCTION)]
    command = ["data", "features", model, str(sets), "--robot", f"world_{robot}", "--stats", str(stats), *run, "--out", str(out)]
    _done(place, str(out.relative_to(place.out)), command)


def _play(place: Place, model: str, robots: Sequence[str]) -> dict[tuple[str, str, int], bool]:
    out = f"{model}_world"
    cells = ["--robots", ",".join(robots), "--tasks", ",".join(TASKS), "--episodes", str(place.episodes)]
    _done(place, str(Path(out).relative_to(place.out)), ["eval", "world", model, *cells, "--out", out])
    lines = (json.loads(text) for text in (Path(out) / "episodes.jsonl").read_text().splitlines())
    return {(one["robot"], one["task"], one["episode"]): one["success"] for one in lines}


def _done(place: Place, name: str, command: Command) -> None:
    note = place.out / "parts" / f"{name.replace('/', '_')}.txt"
    if note.exists() and note.read_text() == line(command):
        return
    progress(line(command))
    asked = parse([*command, "--json"])
    asked.run(asked, 0)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(line(command))


# --- what came out -------------------------------------------------------------------------------------------------------


def told(played: Sequence[Mapping[str, Mapping[tuple[str, str, int], bool]]]) -> dict[str, Any]:
    names = {"base": "base", "plain": "text alone", "embodied": "Stage I", "apart": "one a robot", "tuned": "tuned", "alone": "alone"}
    policies = {}
    for name, title in names.items():
        shares = [float(np.mean(list(one[name].values()))) for one in played]
        by_task = {task: float(np.mean([ok for one in played for (_, at, _), ok in one[name].items() if at == task])) for task in TASKS}
        policies[name] = {"title": title, "success": float(np.mean(shares)), "by_seed": shares, "by_task": by_task}
    claims = []
    for what, better, worse in COMPARED:
        keys = sorted(played[0][better].keys() & played[0][worse].keys())
        gains = np.array([[float(one[better][key]) - float(one[worse][key]) for key in keys] for one in played])
        low, high = interval(gains)
        claims.append({"what": what, "better": better, "worse": worse, "gain": float(gains.mean()), "low": low, "high": high})
    return {"policies": policies, "claims": claims}


def interval(gains: np.ndarray) -> tuple[float, float]:
    """Of the mean of [seeds, episodes], by drawing both anew."""
    draw = np.random.default_rng(0)
    seeds, episodes = gains.shape
    means = [gains[draw.integers(seeds, size=seeds)][:, draw.integers(episodes, size=episodes)].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [(1 - SURE) / 2, (1 + SURE) / 2])
    return float(low), float(high)


def as_markdown(result: Result) -> str:
    rows = ["| policy | success | by seed | " + " | ".join(TASKS) + " |", "| --- | --- | --- |" + " --- |" * len(TASKS)]
    for one in result["policies"].values():
        seeds = " ".join(f"{100 * share:.0f}" for share in one["by_seed"])
        tasks = " | ".join(f"{100 * one['by_task'][task]:.0f}" for task in TASKS)
        rows.append(f"| {one['title']} | {100 * one['success']:.1f} % | {seeds} | {tasks} |")
    rows += ["", "| claim | gain, points | 95 % |", "| --- | --- | --- |"]
    for claim in result["claims"]:
        rows.append(f"| {claim['what']} | {100 * claim['gain']:+.1f} | {100 * claim['low']:+.1f} to {100 * claim['high']:+.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    run_as_script("world_claims", main)
