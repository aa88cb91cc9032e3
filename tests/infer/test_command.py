"""`blm generate` from a Hugging Face directory and from a checkpoint, against transformers from text and pixels to text."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

import blm_jax
from blm_jax.cli import main
from blm_jax.config import SamplingConfig
from blm_jax.convert.command import convert
from tests.tiny_model import END_OF_TEXT, IM_END, write_tiny_model

NEW = 12
QUESTION = "Which cube is red? 哪个?"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def picture(hub: Path) -> Path:
    return hub / "picture.png"


def reference(hub: Path, text: str, picture: Path | None) -> tuple[list[int], str]:
    """What transformers answers, by its own tokenizer, template and image processor."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(hub).eval()
    tokenizer = AutoTokenizer.from_pretrained(hub)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    inputs: dict[str, Any] = {}
    if picture is not None:
        pixels = Qwen2VLImageProcessorPil.from_pretrained(hub)(images=[Image.open(picture)], return_tensors="np")
        inputs = {"pixel_values": torch.tensor(pixels["pixel_values"]), "image_grid_thw": torch.tensor(pixels["image_grid_thw"])}
        content.insert(0, {"type": "image"})
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    if picture is not None:
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * int(inputs["image_grid_thw"].prod() // 4))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 151655).int(),
        max_new_tokens=NEW,
        do_sample=False,
        **inputs,
    )[0, ids.shape[1] :].tolist()
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["generate", *map(str, arguments), "--max-new-tokens", str(NEW), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("with_picture", [False, True])
def test_the_answer_is_the_one_transformers_gives(hub: Path, picture: Path, capsys: pytest.CaptureFixture[str], with_picture: bool) -> None:
    """Its generation_config.json is heeded too: the penalty on repetition is on."""
    tokens, text = reference(hub, QUESTION, picture if with_picture else None)
    ours = run(capsys, hub, "--prompt", QUESTION, *(["--image", picture] if with_picture else []))
    assert (ours["tokens"], ours["text"]) == (tokens, text)
    assert ours["finish"] == ("stop" if tokens[-1] in (IM_END, END_OF_TEXT) else "length")


@pytest.mark.parametrize("mesh", ["data=8,fsdp=1", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2"])
def test_any_mesh(hub: Path, picture: Path, capsys: pytest.CaptureFixture[str], mesh: str) -> None:
    one = run(capsys, hub, "--prompt", QUESTION, "--image", picture, "--mesh", "fsdp=8")
    assert run(capsys, hub, "--prompt", QUESTION, "--image", picture, "--mesh", mesh)["tokens"] == one["tokens"]


def test_from_a_checkpoint_and_from_an_export(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(str(hub), str(tmp_path / "checkpoint"), to="checkpoint")
    convert(str(tmp_path / "checkpoint"), str(tmp_path / "export"), to="hf")
    answers = [run(capsys, model, "--prompt", QUESTION)["tokens"] for model in (hub, tmp_path / "checkpoint", tmp_path / "export")]
    assert answers[0] == answers[1] == answers[2]


def test_streaming_gives_the_same_text(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(capsys, hub, "--prompt", QUESTION)
    assert main(["generate", str(hub), "--prompt", QUESTION, "--max-new-tokens", str(NEW), "--stream", "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert "\n".join(shown) == whole["text"]
    assert json.loads(last)["tokens"] == whole["tokens"]


def test_in_python(hub: Path, picture: Path) -> None:
    """One by one, as a batch of different lengths, and in pieces."""
    model = blm_jax.load(str(hub))
    sampling = SamplingConfig(max_new_tokens=NEW)
    conversations = [
        [{"role": "user", "content": QUESTION}],
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": "Describe this at length, please."}],
            }
        ],
    ]
    alone = [model.generate(messages, sampling) for messages in conversations]
    assert model.generate_batch(conversations, sampling) == alone
    pieces = list(model.stream(conversations[1], sampling, every=2))
    assert "".join(piece.text for piece in pieces) == alone[1].text
    assert sum((piece.tokens for piece in pieces), ()) == alone[1].tokens


def test_two_processes_answer_as_one(hub: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four devices each; only process 0 prints."""
    arguments = ["generate", str(hub), "--prompt", QUESTION, "--image", str(picture), "--mesh", "fsdp=4,tensor=2", "--json"]
    arguments += ["--max-new-tokens", str(NEW)]
    outputs = two_processes(arguments)
    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(outputs[0].splitlines()[-1])["tokens"] == alone["tokens"]
    assert outputs[1] == ""


def two_processes(arguments: Sequence[str]) -> list[str]:
    """Standard output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    program = "import sys; from blm_jax.cli import entry; sys.argv[0] = 'blm'; entry()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments, "--coordinator", coordinator, "--processes", "2", "--process", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error[-2000:] for _, error in results]
    return [out for out, _ in results]
