"""BLM's policy in PyTorch, in one file: copy it into a robot's stack. It needs torch and safetensors, and for the intent
transformers' Qwen2.5-VL.

    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
    from blm_policy import BLMPolicy

    backbone = Qwen2_5_VLForConditionalGeneration.from_pretrained("MODEL").eval()
    processor = AutoProcessor.from_pretrained("MODEL")
    policy = BLMPolicy.from_pretrained("MODEL/policy")

    messages = [policy.messages("panda", {"base": base_picture, "wrist": wrist_picture}, "put the red cube on the green one")]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    intent = policy.intent(backbone, inputs)
    (chunks,) = policy.sample_actions(intent, ["panda"], [joints_and_gripper])  # [samples, horizon, dims]: what to command

One batch may mix robots: a list of messages, of names and of states, a chunk for each. The state is in the robot's own units and
order (policy.robots["panda"].state), and so are the chunks, absolute and within its limits.

To make chunks while the robot moves, give what is left of the last one, beginning with the step at which the state was read,
and how many of these steps will have been executed when the new chunk is ready:

    (chunks,) = policy.sample_actions(intent, ["panda"], [state], last=[chunk[executed:]], delay=3)

Denoising is one function of tensors without a step back to Python that looks at numbers: compile it with
`policy.denoise = torch.compile(policy.denoise)`.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FORMAT = 1  # of the directory that this file was written into
PLACE_FEATURES = 64  # for each of row, column and time


class Intent(NamedTuple):
    """Hidden states of the backbone, one observation a row, and where each token was seen."""

    hidden: Tensor  # [rows, tokens, intent width]
    mask: Tensor  # [rows, tokens] bool: the pictures and the prompt after them
    places: Tensor  # [rows, tokens, 4]: camera counted from 1, row, column, time, in visual tokens; zeros for text


class Memory(NamedTuple):
    keys: Tensor  # [rows, heads, memory, head_dim]
    values: Tensor


class Condition(NamedTuple):
    """All that an observation says to the denoiser, made once: for every step, and for every sample of noise."""

    memory: list[Memory]  # one a pair of layers
    state: Tensor  # [rows, 1, width]
    chosen: Tensor  # [rows, robots], one-hot
    mask: Tensor  # [rows, horizon, action_width] bool: what the robot's chunks have


class Committed(NamedTuple):
    """What is left of the last chunk. Its first `delay` steps are decided, the others are wishes."""

    actions: Tensor  # [rows * samples, horizon, action_width], normalised
    delay: Tensor  # []
    overlap: Tensor  # []: how many steps are left, at least `delay`


# --- layers --------------------------------------------------------------------------------------------------------------


def waves(x: Tensor, features: int, longest: float) -> Tensor:
    """[...] -> [..., features]: cosines, then sines."""
    frequencies = longest ** -(torch.arange(features // 2, dtype=torch.float32, device=x.device) / (features // 2))
    angles = x.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Norm(nn.LayerNorm):
    """Where it does not normalise, its weight and bias remain."""

    def __init__(self, width: int, *, affine: bool = True, normalises: bool):
        super().__init__(width, elementwise_affine=affine)
        self.normalises = normalises

    def forward(self, x: Tensor) -> Tensor:
        if self.normalises:
            return super().forward(x)
        return x * self.weight + self.bias if self.elementwise_affine else x


class Layer(nn.Module):
    """Attention, to a memory or to itself, then a feed-forward network. `modulated` layers have their first norm's scale and
    shift from outside. Without `norms` none of them normalises."""

    def __init__(self, width: int, heads: int, ffn: int, memory_width: int, *, modulated: bool, norms: bool = True):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width, affine=not modulated, normalises=norms)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(memory_width, width)
        self.v = nn.Linear(memory_width, width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = Norm(width, normalises=norms)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)

    def remember(self, memory: Tensor) -> Memory:
        """memory [rows, tokens, memory_width], to be attended to as often as wanted."""
        return Memory(self._heads(self.k(memory)), self._heads(self.v(memory)))

    def to_memory(self, x: Tensor, memory: Memory, seen: Tensor | None = None, modulation: Sequence[Tensor] = ()) -> Tensor:
        """x [memory rows * n, tokens, width]: n rows that follow each other share a row of the memory."""
        q = self.q(self._normed(x, modulation)).reshape(memory.keys.shape[0], -1, x.shape[-1])
        return self._finish(x, F.scaled_dot_product_attention(self._heads(q), memory.keys, memory.values, attn_mask=seen))

    def to_itself(self, x: Tensor, seen: Tensor | None = None, modulation: Sequence[Tensor] = ()) -> Tensor:
        h = self._normed(x, modulation)
        return self._finish(x, F.scaled_dot_product_attention(self._heads(self.q(h)), *self.remember(h), attn_mask=seen))

    def _normed(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        if not modulation:
            return self.norm(x)
        scale, shift = modulation
        return self.norm(x) * (1 + scale) + shift

    def _heads(self, x: Tensor) -> Tensor:
        """[rows, tokens, width] -> [rows, heads, tokens, head_dim]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x)), approximate="tanh"))


# --- the bridge: from hidden states, however many, to a few tokens -----------------------------------------------------------


class Places(nn.Module):
    """What a key knows of where it was seen: a learned vector a camera, and waves for row, column and time."""

    def __init__(self, config: Any):
        super().__init__()
        self.cameras = nn.Parameter(torch.empty(config.cameras + 1, config.width))
        self.project = nn.Linear(3 * PLACE_FEATURES, config.width, bias=False)

    def forward(self, places: Tensor) -> Tensor:
        """places [rows, tokens, 4] -> [rows, tokens, width]. Camera 0 is text, which has no place."""
        camera = places[..., 0]
        seen = waves(places[..., 1:], PLACE_FEATURES, longest=1e3).flatten(-2) * (camera > 0)[..., None]
        return self.cameras[camera] + self.project(seen.to(self.cameras.dtype))


class BridgeBlock(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.cross = Layer(config.width, config.heads, config.ffn, config.width, modulated=False)
        self.own = Layer(config.width, config.heads, config.ffn, config.width, modulated=False)

    def forward(self, x: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
        return self.own.to_itself(self.cross.to_memory(x, self.cross.remember(keys), seen))


class Bridge(nn.Module):
    def __init__(self, config: Any, intent_width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.queries, config.width))
        self.intent_norm = nn.LayerNorm(intent_width)
        self.project = nn.Linear(intent_width, config.width)
        self.places = Places(config) if config.places else None
        self.blocks = nn.ModuleList(BridgeBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, intent: Intent) -> Tensor:
        """-> [rows, queries, width]. Padding is masked, so that its length changes nothing."""
        # where and not the mask alone: what stands in padding may be anything, NaN too.
        hidden = torch.where(intent.mask[..., None], intent.hidden, 0).to(self.queries.dtype)
        keys = self.project(self.intent_norm(hidden))
        if self.places is not None:
            keys = keys + self.places(intent.places)
        x = self.queries.expand(keys.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, keys, intent.mask[:, None, None])
        return self.norm(x)


# --- the diffusion transformer: [state | future tokens | actions] --------------------------------------------------------------


class Clock(NamedTuple):
    """Times of a sequence: that of the noise, and for steps which are given already, that of the end."""

    embedded: Tensor  # [rows or 1, 1 or 2, width]
    given: Tensor | None  # [rows or 1, tokens, 1] bool

    def modulation(self, modulate: nn.Module) -> Sequence[Tensor]:
        """Scale and shift, each [rows or 1, tokens or 1, width]."""
        made = modulate(F.silu(self.embedded))
        if self.given is not None:
            made = torch.where(self.given, made[:, 1:], made[:, :1])
        return made.chunk(2, dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.features = features
        self.inner = nn.Linear(features, width)
        self.outer = nn.Linear(width, width)

    def forward(self, bucket: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(waves(bucket, self.features, longest=1e4).to(self.inner.weight.dtype))))


class DiTLayer(nn.Module):
    def __init__(self, config: Any, width: int, memory_width: int):
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.layer = Layer(width, config.heads, config.ffn, memory_width, modulated=True, norms=config.norms)


class DiTPair(nn.Module):
    def __init__(self, config: Any, width: int, memory_width: int):
        super().__init__()
        self.cross = DiTLayer(config, width, memory_width)
        self.own = DiTLayer(config, width, width)

    def forward(self, x: Tensor, memory: Memory, seen: Tensor, clock: Clock) -> Tensor:
        x = self.cross.layer.to_memory(x, memory, modulation=clock.modulation(self.cross.modulate))
        return self.own.layer.to_itself(x, seen, clock.modulation(self.own.modulate))


class DiT(nn.Module):
    def __init__(self, config: Any, memory_width: int):
        super().__init__()
        width = config.heads * config.head_dim
        self.tap = config.tap // 2 - 1
        self.time = TimeEmbedding(config.time_features, width)
        self.pairs: Any = nn.ModuleList(DiTPair(config, width, memory_width) for _ in range(config.layers // 2))
        self.norm = Norm(width, affine=False, normalises=config.norms)
        self.modulate = nn.Linear(width, 2 * width)

    def remember(self, memory: Tensor) -> list[Memory]:
        return [pair.cross.layer.remember(memory) for pair in self.pairs]

    def forward(self, x: Tensor, memory: list[Memory], seen: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """x [rows, tokens, width] -> the same, and what it was after the tapped layer."""
        tapped = x
        for number, (pair, remembered) in enumerate(zip(self.pairs, memory, strict=True)):
            x = pair(x, remembered, seen, clock)
            tapped = x if number == self.tap else tapped
        scale, shift = clock.modulation(self.modulate)
        return self.norm(x) * (1 + scale) + shift, tapped


# --- what is a robot's own -------------------------------------------------------------------------------------------------------


class GroupedLinear(nn.Module):
    """A product in which each row of x has its robot's weights.

    x is laid into its robot's stretch of a row as long as all robots' inputs, zeros elsewhere: one plain product, in which no
    weight is copied for a row of the batch.
    """

    def __init__(self, robots: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(robots, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(robots, outputs))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [rows, tokens, inputs], chosen [rows, robots] one-hot -> [rows, tokens, outputs]."""
        laid = (x[:, :, None] * chosen[:, None, :, None]).flatten(-2)
        return laid @ self.weight.flatten(0, 1) + (chosen @ self.bias)[:, None]


class Embodiments(nn.Module):
    def __init__(self, robots: int, config: Any, width: int):
        super().__init__()
        self.width = width
        self.patch = config.patch
        held = config.patch * config.action_width  # by a token
        self.state_inner = GroupedLinear(robots, config.state_width, config.hidden)
        self.state_outer = GroupedLinear(robots, config.hidden, width)
        self.action_inner = GroupedLinear(robots, held, width)
        self.action_timed = GroupedLinear(robots, 2 * width, width)
        self.action_outer = GroupedLinear(robots, width, width)
        self.decode_inner = GroupedLinear(robots, width, config.hidden)
        self.decode_outer = GroupedLinear(robots, config.hidden, held)

    def encode_state(self, state: Tensor, chosen: Tensor) -> Tensor:
        """state [rows, state_width] -> [rows, 1, width]."""
        return self.state_outer(F.relu(self.state_inner(state[:, None], chosen)), chosen)

    def encode_actions(self, actions: Tensor, bucket: Tensor, chosen: Tensor) -> Tensor:
        """actions [rows, horizon, action_width], bucket [rows or 1, tokens] of each token's time -> [rows, tokens, width]."""
        embedded = self.action_inner(actions.reshape(len(actions), -1, self.patch * actions.shape[-1]), chosen)
        timed = waves(bucket, self.width, longest=1e4).to(embedded.dtype).expand_as(embedded)
        return self.action_outer(F.silu(self.action_timed(torch.cat([embedded, timed], dim=-1), chosen)), chosen)

    def decode_actions(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [rows, tokens, width] -> [rows, horizon, action_width]."""
        made = self.decode_outer(F.relu(self.decode_inner(x, chosen)), chosen)
        return made.reshape(len(made), made.shape[1] * self.patch, -1)


class FutureHead(nn.Module):
    """From the DiT's future tokens to the bridge's tokens of the observation a chunk later: trained with, not acted with."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.inner = nn.Linear(inputs, outputs)
        self.outer = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(self.norm(x)), approximate="tanh"))


class Affine(NamedTuple):
    """The model reads (value - center) / scale. A scale of 0 marks a dimension that never moved: it is its center, always."""

    center: Tensor  # [dims] float64
    scale: Tensor

    @staticmethod
    def of(summary: Any, scheme: str) -> Affine:
        numbers = {name: torch.tensor(getattr(summary, name), dtype=torch.float64) for name in ("min", "max", "q01", "q99", "mean", "std")}
        center, scale = (numbers["min"] + numbers["max"]) / 2, (numbers["max"] - numbers["min"]) / 2
        flat = scale <= 1e-6 * center.abs().clamp(min=1)
        if scheme == "quantile":
            inner_center, inner_scale = (numbers["q01"] + numbers["q99"]) / 2, (numbers["q99"] - numbers["q01"]) / 2
            wide = inner_scale > 1e-3 * scale  # else they miss what matters: a gripper that opens in one of a hundred steps
            center, scale = torch.where(wide & ~flat, inner_center, center), torch.where(wide, inner_scale, scale)
        elif scheme == "mean_std":
            center, scale = torch.where(flat, center, numbers["mean"]), numbers["std"]
        return Affine(center, torch.where(flat, 0.0, scale))

    def normalise(self, values: Tensor) -> Tensor:
        return torch.where(self.scale > 0, (values - self.center) / torch.where(self.scale > 0, self.scale, 1), 0).float()

    def unnormalise(self, values: Tensor) -> Tensor:
        return values.double() * self.scale + self.center


class Robot:
    """A robot's entry, and the way between its units and what the model reads. On the CPU, where its controller is."""

    def __init__(self, entry: Any, statistics: Any, row: int):
        self.name, self.row, self.horizon, self.hz, self.executed = entry.name, row, entry.horizon, entry.hz, entry.executed
        self.state = [f"{dimension.name} ({dimension.unit})" for dimension in entry.state]
        self.action = [f"{dimension.name} ({dimension.unit})" for dimension in entry.action]
        self.cameras = [camera.name for camera in entry.cameras]
        self._state = Affine.of(statistics.state, statistics.scheme)
        self._action = Affine.of(statistics.action, statistics.scheme)
        low, high = (torch.tensor([getattr(d, side) for d in entry.action], dtype=torch.float64) for side in ("low", "high"))
        # Rounded inward, so that a number clipped to them never passes the true ones.
        self._low = torch.where(low.float() < low, torch.nextafter(low.float(), torch.tensor(torch.inf)), low.float())
        self._high = torch.where(high.float() > high, torch.nextafter(high.float(), torch.tensor(-torch.inf)), high.float())
        # Joints of a chunk are relative to the state at its start, where the entry says so; grippers are absolute always.
        places = {dimension.name: i for i, dimension in enumerate(entry.state)}
        self._relative = torch.tensor([entry.relative and dimension.kind == "joint" for dimension in entry.action])
        self._moves = torch.tensor([places.get(dimension.name, 0) for dimension in entry.action])

    def read_state(self, state: Any) -> Tensor:
        """[dims] float64, checked."""
        values = torch.as_tensor(state, dtype=torch.float64, device="cpu")
        if values.shape != (len(self.state),) or not values.isfinite().all():
            raise ValueError(f"the state of {self.name} must be {len(self.state)} finite numbers: {', '.join(self.state)}")
        return values

    def encode_state(self, state: Tensor) -> Tensor:
        return self._state.normalise(state)

    def read_left(self, left: Any, samples: int) -> Tensor:
        """What is left of the last chunk, [samples, steps, dims] within the robot's limits, checked."""
        values = torch.as_tensor(left, dtype=torch.float32, device="cpu")
        fits = values.shape[-1:] == (len(self.action),) and values.shape[:-2] in ((), (samples,)) and values.ndim > 1
        if not fits or values.shape[-2] > self.horizon or not values.isfinite().all():
            shapes = f"[steps, {len(self.action)}] or [{samples}, steps, {len(self.action)}]"
            raise ValueError(f"what is left of {self.name}'s last chunk must be {shapes} finite numbers, at most {self.horizon} steps")
        return values.clamp(self._low, self._high).expand(samples, -1, -1)

    def encode_actions(self, actions: Tensor, state: Tensor) -> Tensor:
        """Absolute actions [..., steps, dims] -> what the model reads."""
        return self._action.normalise(actions.double() - self._start(state))

    def decode_actions(self, actions: Tensor, state: Tensor) -> Tensor:
        """What the model says [..., steps, dims] -> absolute actions within the robot's limits."""
        absolute = self._action.unnormalise(actions.cpu()) + self._start(state)
        return absolute.float().clamp(self._low, self._high)

    def _start(self, state: Tensor) -> Tensor:
        return torch.where(self._relative, state[self._moves], 0.0)


# --- paths from noise (time 0) to actions (time 1) ---------------------------------------------------------------------------------


class NoisePath(NamedTuple):
    mix: Callable[[Tensor], tuple[Tensor, Tensor]]  # time -> how much of actions, how much of noise
    foretold: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, what the model says, mix -> actions at time 1
    shown: Callable[[Tensor, Tensor], Tensor]  # mix -> what x is multiplied by for the model to see; given steps are seen as they are


OPEN = 0.07  # "clean": how far an observation leaves actions open, of their spread


def _kept(alpha: Tensor, sigma: Tensor) -> Tensor:
    """How much of x is in the actions that "clean" foretells."""
    return alpha * OPEN**2 / (alpha**2 * OPEN**2 + sigma**2)


def _one(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


PATHS = {
    "flow": NoisePath(lambda t: (t, 1 - t), lambda x, said, alpha, sigma: x + sigma * said, _one),
    "clean": NoisePath(lambda t: (t, 1 - t), lambda x, said, alpha, sigma: said + _kept(alpha, sigma) * (x - alpha * said), _kept),
    "ddim": NoisePath(
        lambda t: (torch.sin(torch.pi / 2 * t), torch.cos(torch.pi / 2 * t)),
        lambda x, said, alpha, sigma: alpha * x - sigma * said,
        _one,
    ),
}


def soft_mask(committed: Committed, horizon: int, device: torch.device) -> Tensor:
    """[horizon, 1]: 1 on decided steps, fading over the rest of the last chunk, 0 beyond it."""
    place = torch.arange(horizon, device=device)
    fade = (committed.overlap - place) / (committed.overlap - committed.delay + 1)
    fade = fade * torch.expm1(fade) / (torch.e - 1)
    return torch.where(place < committed.delay, 1.0, torch.where(place < committed.overlap, fade, 0.0))[:, None]


# --- the policy --------------------------------------------------------------------------------------------------------------------


class BLMPolicy(nn.Module):
    def __init__(self, config: Any, robots: Mapping[str, Robot]):
        super().__init__()
        self.config = config
        self.robots = robots
        width = config.dit.heads * config.dit.head_dim
        self.bridge = Bridge(config.bridge, config.intent_width)
        self.dit = DiT(config.dit, config.bridge.width)
        self.embodiments = Embodiments(len(config.robots), config.embodiment, width)
        self.future_tokens = nn.Parameter(torch.empty(config.bridge.queries, width))
        self.action_places = nn.Parameter(torch.empty(config.horizon // config.embodiment.patch, width))
        self.future_head = FutureHead(width, config.bridge.width)

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> BLMPolicy:
        """The policy in a MODEL's directory policy/, ready to act. config.json is its contract: sizes, robots and statistics."""
        text = (Path(directory) / "config.json").read_text()
        contract = json.loads(text, object_hook=lambda entries: SimpleNamespace(**entries))
        if contract.format != FORMAT:
            raise ValueError(f"{directory} has format {contract.format}, this file reads {FORMAT}: take the blm_policy.py that lies there")
        if not hasattr(contract.policy.dit, "norms"):  # an older export: its LayerNorms all normalise, and its "clean" is another path
            if contract.policy.objective.path == "clean":
                raise ValueError(f"{directory} is of an older release's path clean: take the blm_policy.py that lies there")
            contract.policy.dit.norms = True
        robots = {}
        for row, entry in enumerate(contract.robots):
            if hasattr(contract.statistics, entry.name):  # a robot that was never trained has none
                robots[entry.name] = Robot(entry, getattr(contract.statistics, entry.name), row)
        with torch.device("meta"):  # no memory and no random numbers for what is loaded next
            policy = cls(contract.policy, robots)
        policy.load_state_dict(load_file(Path(directory) / "model.safetensors"), assign=True)
        return policy.to(device, dtype).eval().requires_grad_(False)

    # From an observation to the intent

    def messages(self, robot: str, pictures: Mapping[str, Any], instruction: str) -> list[dict[str, Any]]:
        """What the processor's chat template reads: the pictures in the order of the robot's cameras, the instruction before or after.

        A camera gives one picture. No robot has a camera of video; what of videos `intent` takes, it says.
        """
        cameras = self._robot(robot).cameras
        if set(pictures) != set(cameras):
            raise ValueError(f"{robot} needs a picture of each of {', '.join(cameras)}, not of {', '.join(pictures)}")
        for camera, picture in pictures.items():
            if isinstance(picture, list | tuple) or getattr(picture, "ndim", 3) > 3:
                raise ValueError(f"{robot}'s camera {camera} gives one picture, not several or a video")
        shown = [{"type": "image", "image": pictures[camera]} for camera in cameras]
        said = [{"type": "text", "text": instruction}]
        return [{"role": "user", "content": said + shown if self.config.instruction == "before" else shown + said}]

    @torch.no_grad()
    def intent(self, backbone: Any, inputs: Mapping[str, Tensor]) -> Intent:
        """Hidden states of transformers' Qwen2.5-VL for what its processor returned. No block above the intent's is computed, no head.

        Pictures and videos that the processor made something of are numbered as cameras in the order of a prompt; the time of
        a video's tokens counts the steps of its grid.
        """
        view = _first_blocks(backbone.model, self.config.intent_block)
        inputs = {name: value.to(backbone.device) for name, value in inputs.items()}
        tokens = inputs["input_ids"]
        kinds = (tokens == backbone.config.image_token_id).int() + 2 * (tokens == backbone.config.video_token_id).int()
        # Without it, some releases give pictures the positions of text and say nothing.
        if "mm_token_type_ids" in inspect.signature(view.forward).parameters:
            inputs.setdefault("mm_token_type_ids", kinds)
        hidden = view(**inputs, use_cache=False).last_hidden_state

        grids = [inputs[name].tolist() if name in inputs else [] for name in ("image_grid_thw", "video_grid_thw")]
        places = torch.zeros(*tokens.shape, 4, dtype=torch.long)
        visual = kinds > 0
        places[visual.cpu()] = self._places(kinds, grids, backbone.config.vision_config.spatial_merge_size)
        # The first picture, and all that follows it; or what follows the last one.
        alone = self.config.instruction == "alone"
        behind = visual.flip(1).cumsum(dim=1).flip(1) == 0 if alone else visual.cumsum(dim=1) > 0
        mask = behind & inputs.get("attention_mask", torch.ones_like(tokens)).bool()
        return Intent(hidden, mask, places.to(hidden.device))

    def _places(self, kinds: Tensor, grids: list[list[list[int]]], merge: int) -> Tensor:
        """Where each visual token of the batch was seen, in their order. Cameras are counted anew in each row.

        kinds [rows, tokens]: 1 of a picture, 2 of a video; the grids [frames, rows, columns] of all pictures, and of all videos.
        """
        left = [iter(each) for each in grids]
        seen: list[Tensor] = []
        for row in kinds.tolist():
            visual = [kind for kind in row if kind]
            if not visual:
                raise ValueError("there is a prompt without a picture, and intent begins with one")
            start, camera = 0, 0
            while start < len(visual) and (grid := next(left[visual[start] - 1], None)) is not None:
                camera += 1
                axes = (torch.arange(n) for n in (grid[0], grid[1] // merge, grid[2] // merge))
                time, vertical, horizontal = torch.meshgrid(*axes, indexing="ij")
                seen.append(torch.stack([torch.full_like(time, camera), vertical, horizontal, time], dim=-1).reshape(-1, 4))
                start += len(seen[-1])
            if camera > self.config.bridge.cameras or start != len(visual):
                raise ValueError(f"pictures and their tokens do not match, or there are more than {self.config.bridge.cameras} a row")
        return torch.cat(seen)

    # From the intent to actions

    @torch.no_grad()
    def sample_actions(
        self,
        intent: Intent,
        robots: Sequence[str],
        states: Sequence[Any],
        *,
        samples: int = 1,
        steps: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        last: Sequence[Any] | None = None,
        delay: int = 0,
    ) -> list[Tensor]:
        """Chunks [samples, horizon, dims] for each row: absolute, in the robot's units, within its limits, float32 on the CPU.

        `noise` [rows, samples, horizon, action_width] instead of a draw of the generator. `last` is, a row, what is left of the
        last chunk, [left, dims] or [samples, left, dims], as it was given here; its first `delay` steps are kept. A policy that was
        trained with given prefixes is given them; any other is guided towards them, and less and less towards what follows.
        """
        config, device = self.config, self.device
        who = [self._robot(name) for name in robots]
        where = [robot.read_state(state) for robot, state in zip(who, states, strict=True)]
        rows, horizon, width = len(who), config.horizon, config.embodiment.action_width
        state = torch.zeros(rows, config.embodiment.state_width)
        state_mask = torch.zeros_like(state, dtype=torch.bool)
        action_mask = torch.zeros(rows, horizon, width, dtype=torch.bool)
        for i, robot in enumerate(who):
            state[i, : len(robot.state)] = robot.encode_state(where[i])
            state_mask[i, : len(robot.state)] = True
            action_mask[i, : robot.horizon, : len(robot.action)] = True
        row = torch.tensor([robot.row for robot in who])
        condition = self.condition(intent, *(x.to(device) for x in (row, state, state_mask, action_mask)))

        if noise is None:
            place = device if generator is None else generator.device
            noise = torch.randn(rows, samples, horizon, width, generator=generator, device=place)
        samples = noise.shape[1]
        if delay and last is None:
            raise ValueError(f"the delay is {delay}, but of which chunk? Give what is left of the last one")
        left = None if last is None else self._left(who, last, samples, delay)
        made = self.denoise(
            condition,
            noise.flatten(0, 1).to(device),
            steps or config.objective.steps,
            None if left is None else self._committed(who, where, left, delay),
            guided=config.objective.prefix == 0,
        ).unflatten(0, (rows, samples))
        chunks = [robot.decode_actions(made[i, :, : robot.horizon, : len(robot.action)], where[i]) for i, robot in enumerate(who)]
        if left is not None:
            # They are executed whatever the model makes of them, in dimensions that never move by its statistics too.
            chunks = [torch.cat([old[:, :delay], new[:, delay:]], dim=1) for old, new in zip(left, chunks, strict=True)]
        return chunks

    def condition(self, intent: Intent, robot: Tensor, state: Tensor, state_mask: Tensor, action_mask: Tensor) -> Condition:
        """robot [rows], state and its mask [rows, state_width] normalised, action_mask [rows, horizon, action_width]."""
        dtype = self.future_tokens.dtype
        chosen = F.one_hot(robot, len(self.config.robots)).to(dtype)
        shown = torch.where(state_mask, state, 0).to(dtype)
        return Condition(self.dit.remember(self.bridge(intent)), self.embodiments.encode_state(shown, chosen), chosen, action_mask)

    def velocity(self, condition: Condition, noised: Tensor, time: Tensor, given: Tensor | None = None) -> Tensor:
        """What the model says of noised [rows * samples, horizon, action_width], samples of a row following each other: like noised.

        time [rows * samples or 1]; given [rows * samples or 1, horizon] bool: steps that are known, and have time 1.
        """
        x, _ = self._transform(condition, noised, time, given)
        samples = noised.shape[0] // condition.state.shape[0]
        chosen, mask = (part.repeat_interleave(samples, dim=0) for part in (condition.chosen, condition.mask))
        made = self.embodiments.decode_actions(x[:, 1 + self.config.bridge.queries :], chosen)
        return torch.where(mask, made.float(), 0)

    def foresee(self, condition: Condition, noised: Tensor, time: Tensor, given: Tensor | None = None) -> Tensor:
        """The bridge's tokens of the observation a chunk later, [rows * samples, queries, bridge width]."""
        _, tapped = self._transform(condition, noised, time, given)
        return self.future_head(tapped[:, 1 : 1 + self.config.bridge.queries])

    def _transform(self, condition: Condition, noised: Tensor, time: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        ahead = 1 + self.config.bridge.queries
        samples = noised.shape[0] // condition.state.shape[0]
        state, chosen, mask = (part.repeat_interleave(samples, dim=0) for part in (condition.state, condition.chosen, condition.mask))

        times = time[:, None]
        step_times = times.expand(-1, len(self.action_places))
        if given is not None:
            times = torch.stack([time, torch.ones_like(time)], dim=1)
            step_times = torch.where(given, 1.0, step_times)
            given = F.pad(given, (ahead, 0))[..., None]
        clock = Clock(self.dit.time(self._bucket(times)), given)

        actions = torch.where(mask, noised, 0).to(self.action_places.dtype)
        actions = self.embodiments.encode_actions(actions, self._bucket(step_times), chosen) + self.action_places
        x = torch.cat([state, self.future_tokens.expand(len(actions), -1, -1), actions], dim=1)
        # Steps that a robot's chunk does not have see each other, and are seen by nothing else.
        real = F.pad(mask.reshape(len(mask), len(self.action_places), -1).any(dim=-1), (ahead, 0), value=True)
        seen = (real[:, :, None] == real[:, None, :])[:, None]
        return self.dit(x, condition.memory, seen, clock)

    @torch.no_grad()
    def denoise(
        self,
        condition: Condition,
        noise: Tensor,
        steps: int,
        committed: Committed | None = None,
        *,
        guided: bool = True,
        strength: float = 5.0,
    ) -> Tensor:
        """noise [rows * samples, horizon, action_width] -> actions, normalised. Nothing of the observation is made again.

        With `committed`, the decided steps are given to the model, or it is `guided` towards all of them: by the gradient of the
        foretold actions' distance to them, through the model (real-time chunking, Black et al. 2025).
        """
        path = PATHS[self.config.objective.path]
        mask = condition.mask.repeat_interleave(noise.shape[0] // condition.mask.shape[0], dim=0)
        times = torch.arange(steps + 1, dtype=torch.float32, device=noise.device) / steps
        decided = None if committed is None else (torch.arange(noise.shape[1], device=noise.device) < committed.delay)[None, :, None]
        given = None if guided or decided is None else decided[..., 0]

        def settle(x: Tensor) -> Tensor:
            return x if committed is None or decided is None else torch.where(decided, committed.actions, x)

        def foretell(x: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = path.mix(time)
            seen = path.shown(alpha, sigma) * x
            if given is not None:
                seen = torch.where(given[..., None], x, seen)
            return path.foretold(x, self.velocity(condition, seen, time[None], given), alpha, sigma)

        x = torch.where(mask, noise.float(), 0)
        for time, after in pairwise(times):
            (alpha, sigma), (alpha_after, sigma_after) = path.mix(time), path.mix(after)
            if committed is None or not guided:
                x = settle(x)
                actions = foretell(x, time)
            else:
                actions, pull = torch.func.vjp(lambda x, time=time: foretell(x, time), x)[:2]
                wish = soft_mask(committed, noise.shape[1], noise.device) * torch.where(mask, committed.actions - actions, 0)
                # The variance of actions given x, for actions of unit variance; the gain is bounded where it would explode.
                variance = sigma**2 / (alpha**2 + sigma**2)
                gain = (sigma / (alpha * variance).clamp(min=1e-6)).clamp(max=strength)
                actions = actions + sigma * gain * pull(wish)[0]
            x = alpha_after * actions + sigma_after * (x - alpha * actions) / sigma
        return torch.where(mask, settle(x), 0)

    def _left(self, who: list[Robot], last: Sequence[Any], samples: int, delay: int) -> list[Tensor]:
        left = [robot.read_left(one, samples) for robot, one in zip(who, last, strict=True)]
        lengths = {one.shape[1] for one in left}
        if len(lengths) > 1 or not 0 <= delay <= min(lengths):
            raise ValueError(f"each row must have as many steps left of its last chunk, and at least the delay of {delay}")
        prefix = self.config.objective.prefix
        if prefix and delay > prefix:
            raise ValueError(f"the delay is {delay} steps, but the policy was trained with at most {prefix} given: ask sooner")
        return left

    def _committed(self, who: list[Robot], where: list[Tensor], left: list[Tensor], delay: int) -> Committed:
        """As the model reads it: relative to the states of now."""
        samples, overlap = left[0].shape[:2]
        actions = torch.zeros(len(who), samples, self.config.horizon, self.config.embodiment.action_width)
        for i, (robot, state, chunk) in enumerate(zip(who, where, left, strict=True)):
            actions[i, :, :overlap, : chunk.shape[-1]] = robot.encode_actions(chunk, state)
        # As tensors: a compiled denoiser is then none of one delay.
        return Committed(*(x.to(self.device) for x in (actions.flatten(0, 1), torch.tensor(delay), torch.tensor(overlap))))

    def _bucket(self, time: Tensor) -> Tensor:
        return torch.floor(time * self.config.objective.time_buckets)

    def _robot(self, name: str) -> Robot:
        if name not in self.robots:
            raise ValueError(f"this policy was not trained for {name}: it drives {', '.join(self.robots)}")
        return self.robots[name]

    @property
    def device(self) -> torch.device:
        return self.future_tokens.device


def _first_blocks(backbone: Any, blocks: int) -> Any:
    """The backbone as if it had no more blocks and no norm behind them. The weights are shared; the backbone is left as it is,
    so that others may go on to generate with it."""
    text = backbone.language_model
    text = _with(text, layers=nn.ModuleList(text.layers[:blocks]), norm=nn.Identity())
    return _with(backbone, language_model=text)


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    # Either would lead back to the module with all its blocks: what accelerate and torch.compile put on it.
    view.__dict__.pop("forward", None)
    view.__dict__.pop("_compiled_call_impl", None)
    return view
