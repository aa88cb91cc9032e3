"""What pods would make of our programs: each row of the table below, compiled by the TPU compiler on a machine without TPUs.

Compiling takes minutes a row, so each is written when it is done, and one that is there, of the same code and versions, is kept.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness

from blm_jax.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent
# What decides a compiled program and what is read of it.
CODE = ("mesh.py", "batch.py", "config.py", "recipe.py", "counts.py", "models", "plan", "train", "infer/act.py", "infer/generate.py")


@dataclass(frozen=True)
class Row:
    title: str
    topology: str
    files: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    program: str = "train"
    rows: int | None = None
    compute_at_most: float = 1.4  # operations as compiled over those needed
    memory_at_most: float | None = None  # GB of a chip, beside what it has


ONE, TWO, CACHED = (f"train/{name}.yaml" for name in ("stage_one", "stage_two", "stage_two_cached"))
ROWS = {
    "stage_two_cached": Row("Stage II from cached intents, 7B", "v5e:4x4", (CACHED, "hardware/v5e_4x4.yaml")),
    "stage_one": Row("Stage I, 7B, 256 rows of 4096", "v5e:16x16", (ONE, "hardware/v5e_16x16.yaml")),
    "sampling": Row("acting on 64 observations, 7B", "v5e:2x2", (TWO,), ("hardware.compute.dtype=bfloat16",), program="sampling", rows=64),
    "stage_two": Row("Stage II with the backbone, 7B", "v5e:4x4", (TWO, "hardware/v5e_4x4.yaml")),
    "stage_one_v5p": Row("Stage I, 7B, 64 rows of 4096", "v5p:4x4x4", (ONE, "hardware/v5p_4x4x4.yaml"), ("batch=64",)),
    "stage_one_16": Row(
        "Stage I, 7B, a row a chip",
        "v5e:4x4",
        (ONE, "hardware/v5e_4x4.yaml"),
        ("batch=16", "hardware.mesh.data=1", "hardware.mesh.fsdp=16"),  # all chips hold a part, or it would not fit
    ),
    "two_slices": Row("Stage I, 7B, 128 rows of 4096", "2xv5p:4x4x4", (ONE, "hardware/2xv5p_4x4x4.yaml"), ("batch=128",)),
    "largest": Row(
        "Stage I, 72B, 512 rows of 4096",
        "v5p:8x8x8",
        (ONE, "model/qwen2_5_vl_72b.yaml", "hardware/v5p_8x8x8.yaml"),
        ("batch=512",),
        memory_at_most=40.0,
    ),
}


def measure(row: Row) -> dict[str, Any]:
    from blm_jax.plan.command import plan_run, read_plan

    of = read_plan([str(ROOT / "configs" / file) for file in row.files], row.overrides)
    found = plan_run(
        of,
        row.topology,
        which=row.program,  # pyright: ignore[reportArgumentType]
        rows=row.rows,
        remedy=False,
    )
    (program,) = found["programs"]
    return {"title": row.title, "program": program, "text": found["text"], "measures": measures(row, of, program)}


def measures(row: Row, of: Any, program: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a row, and whether it holds."""
    memory = program["memory"]
    found: dict[str, Any] = {"fits": program["fits"], "memory_gib": round(memory["used"] / 2**30, 2)}
    if row.memory_at_most is not None:
        found["memory_gb"] = _bounded(memory["used"] / 1e9, row.memory_at_most)
    if program["fits"]:
        found["computed_over_needed"] = _bounded(program["operations"] * program["chips"] / program["needed"], row.compute_at_most)
        for axis, least in program["least"].items():
            sent = sum(one["bytes"] for one in program["collectives"] if axis in one["over"])
            found[f"sent_over_least_{axis}"] = _bounded(sent / least, 1.3)
        if program["mesh"]["tensor"] > 1:
            sent = sum(one["bytes"] for one in program["collectives"] if list(one["over"]) == ["tensor"])
            found["sent_over_least_tensor"] = _bounded(sent / activations(row, of, program), 1.15)
        found["faults"] = len(program["faults"])
        found |= between_slices(program)
    found["compile_seconds"] = _bounded(program["compile_seconds"], 300)
    found["compile_cpu_seconds"] = program["compile_cpu_seconds"]
    return found


def between_slices(program: dict[str, Any]) -> dict[str, Any]:
    """What leaves a slice. At least its sums of slopes must, of which each chip takes the part that is its own among the copies."""
    crossing = [one for one in program["collectives"] if one["between_slices"]]
    if not crossing:
        return {}
    slices, copies = int(program["topology"].partition("x")[0]), program["mesh"]["data"]
    own = program["least"]["data"] * copies / (copies - 1) / 2  # bytes of a chip's slopes
    least = 2 * own * slices / copies * (slices - 1) / slices
    kinds = {one["kind"]: 0 for one in crossing}
    for one in crossing:
        kinds[one["kind"]] += one["bytes"]
    return {
        "between_slices_gb": {kind: round(sent / 1e9, 3) for kind, sent in kinds.items()},
        "sent_over_least_between_slices": _bounded(sum(kinds.values()) / least, 1.3),
    }


def activations(row: Row, of: Any, program: dict[str, Any]) -> int:
    """Bytes that a device must receive along the tensor axis: a sum after each product that it cuts through, padding included."""
    from blm_jax.plan import rows
    from blm_jax.plan.programs import backbone_of, policy_of, robot_of

    model, training = backbone_of(of), row.program == "train"
    parts, apart = program["mesh"]["tensor"], program["mesh"]["data"] * program["mesh"]["fsdp"]
    text, vision = model.decoder, model.vision
    each = 5 if training else 2  # of a layer; backward as many, and once more what remat makes again
    if of.stage_one is not None:
        batch, layers = rows.conversation(model, of.stage_one.length, of.stage_one.row_length), text.layers
        numbers = of.stage_one.length * text.width  # the slopes below the head
    else:
        policy = policy_of(of)
        prompts = rows.prompts(model, policy, robot_of(of.stage_two), of.stage_two.instruction_tokens)
        batch, layers = prompts.batch, policy.intent_block
        numbers = 2 * each * policy.bridge.blocks * policy.bridge.queries * policy.bridge.width
        tokens = 1 + policy.bridge.queries + policy.action_tokens
        numbers += policy.objective.steps * each * policy.dit.layers * tokens * policy.dit.width
    patches = 0 if batch.vision is None else batch.vision.patches.shape[1]
    numbers += batch.tokens.shape[1] * text.width * (1 + each * layers) + patches * each * vision.layers * vision.width
    numbers += patches // vision.merge**2 * vision.out_width
    return round((row.rows or of.batch) / apart * numbers * 2 * 2 * (parts - 1) / parts)


def _bounded(value: float, most: float) -> dict[str, Any]:
    return {"value": round(value, 3), "at_most": most, "holds": value <= most}


def grown(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """The same work a chip on more chips: what changes, as a share of what it was. Of N chips a byte comes from the N - 1 others."""
    one, other = small["program"], large["program"]
    if not (one["fits"] and other["fits"]):
        return {}

    def sent(program: dict[str, Any]) -> float:
        return sum(one["bytes"] for one in program["collectives"]) * program["chips"] / (program["chips"] - 1)

    return {
        "operations": _bounded(abs(other["operations"] / one["operations"] - 1), 0.02),
        "temporaries": _bounded(abs(other["memory"]["temporaries"] / one["memory"]["temporaries"] - 1), 0.05),
        "sent": _bounded(abs(sent(other) / sent(one) - 1), 0.1),
    }


def code() -> str:
    """Of all that a row is made from."""
    digest = hashlib.sha256()
    for name in CODE:
        path = ROOT / "blm_jax" / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def terms(row: Row) -> dict[str, Any]:
    configs = hashlib.sha256(repr(row).encode() + b"".join((ROOT / "configs" / file).read_bytes() for file in row.files))
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("blm-jax", "jax", "libtpu", "flax")},
        "code": code(),
        "config": configs.hexdigest()[:16],
    }


def main(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="blm bench plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(ROWS)} (all)")
    parser.add_argument("--save", action="store_true", help=f"write each row to {_harness.RESULTS.name}/plan.json when it is done")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.rows if name not in ROWS]
    if unknown:
        raise RequestError(f"no row {', '.join(unknown)}: there are {', '.join(ROWS)}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    result: dict[str, Any] = {"rows": {}}
    for name in arguments.rows or ROWS:
        known = read() if arguments.save else result  # another process may make other rows meanwhile
        row = known["rows"].get(name)
        if row is None or any(row[key] != value for key, value in terms(ROWS[name]).items()):
            _harness.progress(f"plan {name}: {ROWS[name].title} on {ROWS[name].topology}")
            row = terms(ROWS[name]) | {"date": datetime.date.today().isoformat(), "cpu": _harness.cpu_name()} | measure(ROWS[name])
        result = _with(read() if arguments.save else result, name, row)
        if arguments.save:
            _harness.save("plan", result)
    show(result)
    return result


def read() -> dict[str, Any]:
    file = _harness.RESULTS / "plan.json"
    return json.loads(file.read_text()) if file.exists() else {"rows": {}}


def _with(result: dict[str, Any], name: str, row: dict[str, Any]) -> dict[str, Any]:
    made = {**result["rows"], name: row}
    rows = {name: made[name] for name in ROWS if name in made}
    small, large = rows.get("stage_one_16"), rows.get("stage_one")
    missing = [name for name in ROWS if name not in rows]
    return {"rows": rows, "missing": missing, "from_16_to_256_chips": grown(small, large) if small and large else {}}


def show(result: dict[str, Any]) -> None:
    for name, row in result["rows"].items():
        print(f"{name}: {row['title']}\n{row['text']}")
        print("  asked for: " + ", ".join(f"{key} {_told(value)}" for key, value in row["measures"].items()))
    if result.get("from_16_to_256_chips"):
        print("from 16 to 256 chips: " + ", ".join(f"{key} {_told(value)}" for key, value in result["from_16_to_256_chips"].items()))
    if result.get("missing"):
        print(f"missing: {', '.join(result['missing'])}")


def _told(value: Any) -> str:
    if isinstance(value, dict) and "at_most" in value:
        return f"{value['value']} ({'holds' if value['holds'] else 'MISSES'} {value['at_most']})"
    return str(value)


if __name__ == "__main__":
    _harness.run_as_script("plan", main)
