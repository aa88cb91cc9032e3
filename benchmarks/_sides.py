"""The two sides of the backbone's benchmark: this project, and transformers in PyTorch. Each turns a phase into a timed run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _harness import Run

from blm_jax.batch import Batch, VisionRows
from blm_jax.config import BackboneConfig, ComputeConfig, Dtype, SamplingConfig
from blm_jax.data.collate import collate
from blm_jax.data.positions import Grid, rope_positions
from blm_jax.data.prompt import Example
from blm_jax.data.vision.pictures import Picture
from blm_jax.infer.generate import Generator
from blm_jax.infer.session import for_serving
from blm_jax.models.mllm import Mllm, random_params, with_params
from blm_jax.train.loss import cross_entropy
from blm_jax.weights.config_json import to_json
from blm_jax.weights.names import canonical, table

LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.01
IGNORED = -100  # transformers' label of a token that does not count


@dataclass(frozen=True)
class Phase:
    kind: Literal["prefill", "vision", "decode", "train"]
    rows: int
    length: int = 0  # tokens in a row, those of its pictures included
    pictures: tuple[tuple[int, int], ...] = ()  # sizes in patches, dealt out to the rows
    new: int = 0  # decode: tokens to choose in each row. The first comes from prefill and is not timed

    @property
    def title(self) -> str:
        pictures = f", {len(self.pictures)} picture{'s' * (len(self.pictures) > 1)}" if self.pictures else ""
        match self.kind:
            case "vision":
                rows, columns = self.pictures[0]
                return f"vision tower{pictures} of {rows}x{columns} patches"
            case "decode":
                return f"decode, batch {self.rows}, {self.length} of context"
            case "train":
                return f"training step {self.rows}x{self.length}{pictures}"
        return f"prefill {self.rows}x{self.length}{pictures}"

    @property
    def tokens(self) -> int:
        """That a run reads, or chooses."""
        if self.kind == "vision":
            return sum(rows * columns for rows, columns in self.pictures)
        return self.rows * (self.new - 1 if self.kind == "decode" else self.length)


def examples_of(phase: Phase, config: BackboneConfig, seed: int = 0) -> list[Example]:
    """For each row pictures and random words. Rows are equally long, so that neither side computes padding of text."""
    random = np.random.default_rng(seed)
    ids, merge = config.tokens, config.vision.merge
    words = np.setdiff1d(np.arange(config.decoder.vocab), [ids.image, ids.video, ids.vision_start, ids.vision_end, ids.pad])
    grids = [[Grid(1, *size) for size in phase.pictures[row :: phase.rows]] for row in range(phase.rows)]
    shown = [[t for g in row for t in (ids.vision_start, *[ids.image] * g.visual_tokens(merge), ids.vision_end)] for row in grids]
    length = max(phase.length, *map(len, shown))
    examples = []
    for row, head in zip(grids, shown, strict=True):
        tokens = np.concatenate([head, random.choice(words, length - len(head))]).astype(np.int32)
        patches = [random.normal(size=(grid.patches, config.vision.patch_values)).astype(np.float32) for grid in row]
        positions = rope_positions(tokens, row, config)
        examples.append(Example(tokens, positions, tokens != ids.image, tuple(map(Picture, patches, row)), int(positions.max()) + 1))
    return examples


class Ours:
    name = "blm_jax"

    def __init__(self, config: BackboneConfig, dtype: Dtype, params: dict[str, Any] | None = None):
        """`params` on the host, or random ones made on the device."""
        self.config = config
        self.compute = ComputeConfig(dtype=dtype)
        self.params = params

    @cached_property
    def model(self) -> Mllm:
        dtype = jnp.dtype(self.compute.dtype)
        params = random_params(self.config, dtype, None, 0) if self.params is None else jax.tree.map(jnp.array, self.params)
        return for_serving(self.config, self.compute, params)

    def runs(self, phase: Phase, examples: Sequence[Example]) -> dict[str, Run]:
        if phase.kind == "decode":
            return {self.name: partial(self._decode, phase, examples)}
        batch = collate([[example] for example in examples], self.config)
        batch = jax.tree.map(jnp.asarray, batch)
        match phase.kind:
            case "vision":
                return {self.name: partial(timed, tower, self.model, batch.vision)}
            case "train":
                return {self.name: self._training(batch)}
        last = jnp.full(phase.rows, phase.length - 1)
        return {self.name: partial(timed, prefill, self.model, batch, last, phase.length)}

    def _decode(self, phase: Phase, examples: Sequence[Example]) -> tuple[float, np.ndarray]:
        sampling = SamplingConfig(max_new_tokens=phase.new, repetition_penalty=1.0)
        stream = Generator(self.model, None, self.config.tokens.pad).stream(examples, sampling, stop=())
        first = next(stream)
        start = time.perf_counter()
        rest = list(stream)
        return time.perf_counter() - start, np.concatenate([first, *rest], axis=1)

    def _training(self, batch: Batch) -> Run:
        """Trains what the batch uses: without pictures no vision tower, which PyTorch would leave alone too."""
        assert self.params is not None
        names = ("decoder", "vision") if batch.vision is not None else ("decoder",)
        device = jax.tree.map(jnp.array, self.params)
        params = {name: device.pop(name) for name in names}
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def loss(params: dict[str, Any], frozen: dict[str, Any], batch: Batch) -> jax.Array:
            model = with_params(self.config, self.compute, {**params, **frozen})
            x, kernel = model.heard(batch), model.decoder.head_kernel()
            weights = batch.weights.reshape(-1) / batch.weights.sum()
            return cross_entropy(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype), batch.targets.reshape(-1), weights)[0]

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(params: dict[str, Any], moments: Any, frozen: dict[str, Any], batch: Batch) -> tuple[jax.Array, Any, Any]:
            value, gradients = jax.value_and_grad(loss)(params, frozen, batch)
            updates, moments = optimizer.update(gradients, moments, params)
            return value, optax.apply_updates(params, updates), moments

        state: list[Any] = [params, optimizer.init(params)]

        def run() -> tuple[float, np.ndarray]:
            start = time.perf_counter()
            value, *state[:] = jax.block_until_ready(step(*state, device, batch))
            return time.perf_counter() - start, np.asarray(value)

        return run


@partial(jax.jit, static_argnums=3)
def prefill(model: Mllm, batch: Batch, last: jax.Array, room: int) -> tuple[jax.Array, Any]:
    return model.prefill(batch, last, room)


@jax.jit
def tower(model: Mllm, rows: VisionRows) -> tuple[jax.Array]:
    return (model.vision(rows),)


def timed(function: Callable[..., tuple[Any, ...]], *inputs: Any) -> tuple[float, np.ndarray]:
    """The first of the outputs, the seconds until all are there."""
    start = time.perf_counter()
    outputs = jax.block_until_ready(function(*inputs))
    return time.perf_counter() - start, np.asarray(outputs[0])


class Transformers:
    name = "transformers"

    def __init__(self, config: BackboneConfig, dtype: Dtype, device: str):
        """Random weights, made on the device."""
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen2_5_VLConfig

        self.torch = torch
        self.config = config
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        torch.manual_seed(0)
        with self.device:
            settings = Qwen2_5_VLConfig.from_dict(to_json(config, dtype) | {"bos_token_id": None, "eos_token_id": None})
            self.model: Any = AutoModelForImageTextToText.from_config(settings, dtype=self.dtype, attn_implementation="sdpa").eval()
        # Greedy, to the last token asked for.
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=config.tokens.pad)

    def params(self) -> dict[str, Any]:
        """The weights as our tree, on the host."""
        state = {canonical(name): value.detach().float().cpu().numpy() for name, value in self.model.state_dict().items()}
        tree: dict[str, Any] = {}
        for entry in table(self.config).values():
            blocks = [state[tensor.name].reshape(entry.block).transpose(entry.order) for tensor in entry.tensors()]
            node = tree
            for name in entry.path[:-1]:
                node = node.setdefault(name, {})
            # A copy in either case: PyTorch trains its weights in place.
            node[entry.path[-1]] = blocks[0].copy() if entry.layers is None else np.stack(blocks)
        return tree

    def runs(self, phase: Phase, examples: Sequence[Example]) -> dict[str, Run]:
        inputs = self.inputs(examples)
        match phase.kind:
            case "vision":
                forward = partial(self.model.model.visual, inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
                return {self.name: partial(self._forward, forward, lambda output: output.pooler_output)}
            case "decode":
                return {self.name: partial(self._decode, phase, inputs)}
            case "train":
                # PyTorch's own choice of an optimizer is not its fastest on a CPU, so both take part.
                return {f"{self.name}, {kind} AdamW": self._training(inputs, fused) for kind, fused in (("fused", True), ("default", None))}
        forward = partial(self.model, **inputs, use_cache=True, logits_to_keep=1)
        return {self.name: partial(self._forward, forward, lambda output: output.logits[:, 0])}

    def inputs(self, examples: Sequence[Example]) -> dict[str, Any]:
        torch = self.torch
        ids = np.stack([example.tokens for example in examples]).astype(np.int64)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}
        pictures = [picture for example in examples for picture in example.pictures]
        if pictures:
            inputs["mm_token_type_ids"] = torch.tensor((ids == self.config.tokens.image).astype(np.int64))
            inputs["pixel_values"] = torch.tensor(np.concatenate([picture.patches for picture in pictures])).to(self.dtype)
            inputs["image_grid_thw"] = torch.tensor([[1, picture.grid.rows, picture.grid.columns] for picture in pictures])
        return {name: value.to(self.device) for name, value in inputs.items()}

    def clock(self) -> float:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def _forward(self, forward: Callable[[], Any], pick: Callable[[Any], Any]) -> tuple[float, np.ndarray]:
        with self.torch.inference_mode():
            start = self.clock()
            output = forward()
            seconds = self.clock() - start
            return seconds, pick(output).float().cpu().numpy()

    def _decode(self, phase: Phase, inputs: dict[str, Any]) -> tuple[float, np.ndarray]:
        """generate(), watched where it asks whether to stop, which it does after each token: prefill is over at the first."""
        from transformers import StoppingCriteriaList

        times: list[float] = []

        def never(tokens: Any, scores: Any, **_: Any) -> Any:
            times.append(self.clock())
            return self.torch.zeros(len(tokens), dtype=self.torch.bool, device=tokens.device)

        sequences = self.model.generate(**inputs, max_new_tokens=phase.new, stopping_criteria=StoppingCriteriaList([never]))
        assert len(times) == phase.new
        return times[-1] - times[0], sequences[:, phase.length :].cpu().numpy()

    def _training(self, inputs: dict[str, Any], fused: bool | None) -> Run:
        torch, tokens = self.torch, self.config.tokens
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tokens.image, IGNORED)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)

        def run() -> tuple[float, np.ndarray]:
            start = self.clock()
            optimizer.zero_grad(set_to_none=True)
            loss = self.model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return self.clock() - start, loss.detach().cpu().numpy()

        return run

    def margins(self, phase: Phase, examples: Sequence[Example]) -> np.ndarray:
        """[rows, new] how far the likeliest token stands above the next at each step of greedy decoding."""
        options = {"max_new_tokens": phase.new, "output_scores": True, "return_dict_in_generate": True}
        scores = self.model.generate(**self.inputs(examples), **options).scores
        best = self.torch.stack([self.torch.topk(score, 2).values for score in scores], dim=1)
        return (best[..., 0] - best[..., 1]).float().cpu().numpy()
