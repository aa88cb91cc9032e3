from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm_jax.config import (
    BackboneConfig,
    ComputeConfig,
    DecoderConfig,
    Experiment,
    HardwareConfig,
    MeshConfig,
    SamplingConfig,
    VisionConfig,
)
from blm_jax.configfile import load, override, parse, read, render
from blm_jax.errors import RequestError

CONFIGS = Path(__file__).parent.parent / "configs"
VISION = VisionConfig(layers=2, width=32, heads=2, ffn=44, out_width=64, full_attention_layers=(1,))
DECODER = DecoderConfig(layers=3, width=64, heads=4, kv_heads=2, ffn=96, vocab=320, tied=False, mrope_section=(2, 3, 3))
SMALL = Experiment(BackboneConfig(VISION, DECODER))

SAMPLING = st.builds(
    SamplingConfig,
    max_new_tokens=st.integers(1),
    temperature=st.floats(0, allow_nan=False),
    top_k=st.none() | st.integers(1),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32 - 1),
    stop=st.lists(st.integers(0, 2**31 - 1)).map(tuple),
)
# Any text may be a name or a value of the compiler's: colons, quotes, line breaks, `null`, `010`, nothing at all.
HARDWARE = st.builds(
    HardwareConfig,
    mesh=st.builds(MeshConfig, st.integers(), st.integers(), st.integers()),
    compute=st.from_type(ComputeConfig),
    compiler_options=st.dictionaries(
        st.text(), st.text() | st.sampled_from(["null", "true", "010", "1e4", "~", "", "- a", "a: b", "#", "..."])
    ),
)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "experiment.yaml") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


@pytest.fixture
def small(write) -> Path:
    return write(render(SMALL), "small.yaml")


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def leaves(tree: Any) -> int:
    return sum(leaves(getattr(tree, field.name)) if is_dataclass(getattr(tree, field.name)) else 1 for field in fields(tree))


# --- out and in again ------------------------------------------------------------------------------------------------------


@given(hardware=HARDWARE, sampling=SAMPLING)
def test_what_is_rendered_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, hardware: HardwareConfig, sampling: SamplingConfig
) -> None:
    tree = replace(SMALL, hardware=hardware, sampling=sampling)
    file = tmp_path_factory.getbasetemp() / "rendered.yaml"
    file.write_text(render(tree))
    assert load(file) == tree


def test_every_field_is_rendered_one_a_line() -> None:
    lines = render(SMALL).splitlines()
    assert len([line for line in lines if not line.endswith(":")]) == leaves(SMALL)
    assert "    rope_theta: 1000000.0" in lines  # a default too


@pytest.mark.parametrize("model", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("hardware", sorted((CONFIGS / "hardware").glob("*.yaml")), ids=lambda file: file.stem)
def test_one_model_file_serves_every_pod(model: Path, hardware: Path, write) -> None:
    tree = load(write(f"include: [{model}, {hardware}]\n"))
    assert tree == load(model, hardware)
    assert tree.model == load(model).model


# --- numbers, words, lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("3", 3.0), (".5", 0.5), ("+2.", 2.0), (".inf", math.inf)],
)
def test_numbers_as_people_write_them(small: Path, text: str, value: float) -> None:
    found = load(small, overrides=[f"sampling.temperature={text}"]).sampling.temperature
    assert found == value and type(found) is float


@pytest.mark.parametrize("text", ["010", "no", "1:30", "2024-01-01", "null_device", "0x10", "1e3", "true"])
def test_text_stays_as_it_is_written(write, small: Path, text: str) -> None:
    file = write(f"hardware: {{compiler_options: {{xla_flag: {text}}}}}\n")
    assert load(small, file).hardware.compiler_options == {"xla_flag": text}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.decoder.layers=2.0", "model.decoder.layers: expected a whole number, found '2.0' (float)"),
        ("model.decoder.layers='2'", "expected a whole number, found '2' (text)"),
        ("model.decoder.layers=true", "expected a whole number, found 'true' (bool)"),
        ("model.decoder.layers=", "expected a whole number, found nothing"),
        ("model.decoder.tied=1", "expected true or false, found '1' (int)"),
        ("model.decoder.tied=yes", "expected true or false, found 'yes' (text)"),
        ("model.decoder.rope_theta=1_000", "expected a number, found '1_000' (text)"),
        ("model.decoder.rope_theta=true", "expected a number, found 'true' (bool)"),
        ("model.decoder.rope_theta=1e999", "1e999 is too large"),
        ("model.decoder.rope_theta=!!float x", "expected a number, found 'x' (float)"),
        ("model.decoder.layers=!!int x", "expected a whole number, found 'x' (int)"),
        ("model.decoder.mrope_section=3", "expected a list, found '3' (int)"),
        ("model.decoder.mrope_section=[2, 3, x]", "model.decoder.mrope_section.2: expected a whole number"),
        ("model.decoder=3", "model.decoder: expected keys and values, found '3' (int)"),
        ("hardware.compute.remat=ful", "'ful' is not one of none, full, dots, dots_no_batch; did you mean full?"),
        ("hardware.compute.dtype=[a]", "expected one of float32, bfloat16, found a list"),
        ("hardware.compiler_options.a=[1]", "expected text, found a list"),
    ],
)
def test_a_value_its_field_cannot_hold_is_refused(small: Path, change: str, says: str) -> None:
    assert says in message(load, small, overrides=[change])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sampling.top_p=0", "sampling: top_p is 0.0"),
        ("sampling.temperature=-1", "temperature is -1.0"),
        ("sampling.max_new_tokens=0", "max_new_tokens is 0"),
        ("sampling.top_k=0", "top_k is 0"),
        ("sampling.seed=-1", "seed is -1"),
        ("model.decoder.heads=5", "model: decoder.width 64 is not 5 heads"),
        ("model.decoder.kv_heads=3", "kv_heads 3 does not divide the 4 heads"),
        ("model.decoder.mrope_section=[1, 1]", "must sum to half of the head size 16"),
        ("model.vision.heads=3", "vision.width 32 is not 3 heads"),
        ("model.vision.out_width=32", "vision.out_width 32 is not decoder.width 64"),
    ],
)
def test_values_that_contradict_each_other_are_refused(small: Path, change: str, says: str) -> None:
    assert says in message(load, small, overrides=[change])


# --- keys ----------------------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_file_line_and_the_near_one(write) -> None:
    file = write("model:\n  decoder:\n    layers: 3\n    kv_hedas: 2\n")
    assert message(load, file) == f"{file}:4: model.decoder.kv_hedas: no such key; did you mean kv_heads?"


def test_an_unknown_key_with_nothing_near_lists_what_there_is(write) -> None:
    assert "zzz: no such key; the keys here are include, model, hardware, sampling" in message(load, write("zzz: 1\n"))


def test_a_key_given_twice_is_refused(write) -> None:
    file = write("hardware:\n  mesh: {data: 1}\n  compute: {}\n  mesh: {data: 2}\n")
    assert message(load, file) == f"{file}:4: hardware.mesh: given twice, first on line 2"


def test_a_missing_field_is_named(write, small: Path) -> None:
    text = "\n".join(line for line in small.read_text().splitlines() if "kv_heads" not in line)
    file = write(text)
    assert message(load, file) == f"{file}: model.decoder.kv_heads is missing"


@pytest.mark.parametrize("text", ["a: [", "\tx: 1", "a: 1\n---\nb: 2\n", "a: *nowhere", "? [a]\n: 1\n", "- 1\n", "text", "\x00"])
def test_what_is_no_tree_of_keys_is_one_line_with_the_file(write, text: str) -> None:
    file = write(text)
    assert message(load, file).startswith(str(file))


def test_an_anchor_that_holds_itself_ends(write) -> None:
    assert "hardware.mesh.mesh: no such key" in message(load, write("hardware: &a {mesh: *a}\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert message(load, tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file"
    assert "cannot be read as text" in message(load, tmp_path / "binary.yaml")
    assert "cannot be read as text" in message(load, tmp_path)


# --- include and override ---------------------------------------------------------------------------------------------------


def test_includes_merge_in_order_beneath_the_file(write, small: Path) -> None:
    write("sampling: {seed: 1, top_p: 0.5, temperature: 1}\n", "parts/first.yaml")
    write("include: [../small.yaml]\nsampling: {seed: 2, temperature: 2}\n", "parts/second.yaml")
    tree = load(write("include: [parts/first.yaml, parts/second.yaml]\nsampling: {seed: 3}\n"))
    # small.yaml, included by the second part, says everything; what stands nearer to the root has the last word.
    assert tree.sampling == replace(SMALL.sampling, seed=3, temperature=2.0)
    assert tree.model == SMALL.model


def test_options_of_the_compiler_are_merged_by_name(write, small: Path) -> None:
    write("hardware: {compiler_options: {a: 1, b: 2}}\n", "h.yaml")
    tree = load(small, write("include: [h.yaml]\nhardware: {compiler_options: {b: 3}}\n"))
    assert tree.hardware.compiler_options == {"a": "1", "b": "3"}


def test_the_same_file_may_be_included_twice_but_not_by_itself(write, small: Path) -> None:
    write("include: [small.yaml]\n", "one.yaml")
    assert load(write("include: [one.yaml, small.yaml]\n")) == SMALL
    write("include: [sub/../b.yaml]\n", "a.yaml")
    b = write("include: [a.yaml]\n", "b.yaml")
    assert "includes itself" in message(load, b)


def test_a_mistake_in_an_included_file_names_that_file(write) -> None:
    part = write("sampling: {sede: 1}\n", "part.yaml")
    file = write("include: [part.yaml]\n")
    assert message(load, file) == f"{part}:1: sampling.sede: no such key; did you mean seed?"
    part.unlink()
    assert f"{part} (included by {file}): no such file" == message(load, file)


def test_overrides_have_the_last_word_in_order(small: Path) -> None:
    tree = load(small, overrides=["sampling.stop=[1, 2]", "hardware.mesh.fsdp=4", "hardware.mesh={data: 2}", "sampling.top_k=null"])
    assert tree.sampling.stop == (1, 2) and tree.sampling.top_k is None
    assert tree.hardware.mesh == MeshConfig(data=2, fsdp=4)


def test_names_of_the_compiler_may_hold_dots(small: Path) -> None:
    assert load(small, overrides=["hardware.compiler_options.xla.a=true"]).hardware.compiler_options == {"xla.a": "true"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed", "'seed': an override is written key=value"),
        ("=3", "an override is written key=value"),
        ("sampling.sede=3", "sampling.sede: no such key; did you mean seed?"),
        ("sampling.seed.x=3", "sampling.seed is a value and has no keys of its own"),
        ("sampling={sede: 3}", "sampling.sede: no such key; did you mean seed?"),
        ("sampling.seed=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_named(small: Path, change: str, says: str) -> None:
    assert says in message(load, small, overrides=[change])


def test_override_leaves_the_tree_it_is_given_alone() -> None:
    before = HardwareConfig(compiler_options={"a": "1"})
    after = override(before, ["compiler_options.b=2", "mesh.tensor=2"])
    assert before == HardwareConfig(compiler_options={"a": "1"})
    assert after == HardwareConfig(mesh=MeshConfig(tensor=2), compiler_options={"a": "1", "b": "2"})


@dataclass(frozen=True)
class Part:
    size: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Whole:
    part: Part | None


@dataclass(frozen=True)
class Rows:
    rows: tuple[Whole, ...] = ()
    parts: tuple[Part, ...] = ()


ROWS = Rows((Whole(Part((5, 6.5))), Whole(None)), (Part(), Part((3, 0.5))))


def test_lists_of_parts_are_read_and_written(write) -> None:
    text = "rows:\n- part:\n    size: [5, 6.5]\n- {part: null}\nparts:\n- {size: [1, 2.0]}\n- {size: [3, 0.5]}\n"
    assert render(ROWS) == text
    assert (
        read(Rows, write(text))
        == parse(Rows, {"rows": [{"part": {"size": [5, 6.5]}}, {"part": None}], "parts": [{}, {"size": [3, 0.5]}]}, "x")
        == ROWS
    )
    assert override(ROWS, ["parts=[]"]) == replace(ROWS, parts=())
    file = write("parts:\n- {size: [1, 2]}\n- {siez: [1, 2]}\n")
    assert message(read, Rows, file) == f"{file}:3: parts.1.siez: no such key; did you mean size?"
    assert message(parse, Rows, {"rows": [{"prt": None}]}, "config.json") == "config.json: rows.0.prt: no such key; did you mean part?"
    assert message(parse, Rows, {"rows": [{}]}, "config.json") == "config.json: rows.0.part is missing"
    assert message(parse, Rows, [1], "config.json") == "config.json: expected keys and values, found a list"
    assert (
        message(parse, Rows, {"parts": [{"size": [1, float("nan")]}]}, "a") == "a: parts.0.size.1: expected a number, found '.nan' (float)"
    )
    assert "include: no such key" in message(read, Rows, write("include: [a.yaml]\n"))


def test_an_optional_part_and_a_tuple_of_fixed_length() -> None:
    assert override(Whole(None), ["part.size=[3, 4]"]) == Whole(Part((3, 4.0)))
    assert override(Whole(Part()), ["part=null"]) == Whole(None)
    assert "part.size: expected 2 values, found 3" in message(override, Whole(None), ["part.size=[1, 2, 3]"])
