"""An experiment as one tree of frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from blm_jax.errors import RequestError


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RequestError(message)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of Qwen2.5-VL."""

    layers: int
    width: int
    heads: int
    ffn: int
    out_width: int  # width of a visual token: the decoder's
    full_attention_layers: tuple[int, ...]  # all others attend within windows
    channels: int = 3
    patch: int = 14  # pixels
    temporal_patch: int = 2  # frames
    merge: int = 2  # merge x merge patches become one visual token
    window: int = 112  # pixels
    tokens_per_second: int = 2  # how far apart in position the seconds of a video lie

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def window_patches(self) -> int:
        """Patches in a full window: the length of a slot."""
        return (self.window // self.patch // self.merge * self.merge) ** 2


@dataclass(frozen=True)
class DecoderConfig:
    """The text decoder of Qwen2.5-VL."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool  # the head is the embedding
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies that follow time, height, width
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    max_positions: int = 128_000

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class TokenConfig:
    """Ids the model gives a meaning of its own. None of them is a constant of the code."""

    image: int = 151655
    video: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653
    pad: int = 151643


# How text goes on after a video: `blm` keeps fractions of a second and never overlaps; the others are what releases of
# transformers do (4.57 cuts seconds to whole numbers; 5.23 lets the next text overlap the video's time axis).
VideoPositions = Literal["blm", "transformers-4.57", "transformers-5.23"]


@dataclass(frozen=True)
class BackboneConfig:
    """Qwen2.5-VL: what its weights fix."""

    vision: VisionConfig
    decoder: DecoderConfig
    tokens: TokenConfig = TokenConfig()
    video_positions: VideoPositions = "blm"

    def __post_init__(self) -> None:
        text, vision = self.decoder, self.vision
        _check(text.width % (2 * text.heads) == 0, f"decoder.width {text.width} is not {text.heads} heads of an even size")
        _check(text.heads % text.kv_heads == 0, f"decoder.kv_heads {text.kv_heads} does not divide the {text.heads} heads")
        halves = f"decoder.mrope_section {list(text.mrope_section)} must sum to half of the head size {text.head_dim}"
        _check(2 * sum(text.mrope_section) == text.head_dim, halves)
        _check(vision.width % (4 * vision.heads) == 0, f"vision.width {vision.width} is not {vision.heads} heads of a size that 4 divides")
        _check(vision.out_width == text.width, f"vision.out_width {vision.out_width} is not decoder.width {text.width}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside products of the decoder; everything else of the model stays as it is."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "out", "gate", "up", "down")

    def __post_init__(self) -> None:
        known = ("q", "k", "v", "out", "gate", "up", "down")
        wrong = [name for name in self.targets if name not in known]
        _check(not wrong and len(self.targets) > 0, f"lora.targets: {', '.join(wrong) or 'none'}: they are among {', '.join(known)}")
        _check(len(set(self.targets)) == len(self.targets), f"lora.targets {list(self.targets)} has one twice")
        _check(self.rank >= 1 and self.alpha > 0, f"lora.rank is {self.rank} and alpha {self.alpha}: at least 1, and above 0")


@dataclass(frozen=True)
class BridgeConfig:
    """The Perceiver that compresses the intent to a few tokens."""

    queries: int = 32  # as many as the policy's future tokens: the target of one is the other
    blocks: int = 2  # each one cross-attention and one self-attention
    width: int = 1536
    heads: int = 24
    ffn: int = 6144
    places: bool = True  # keys know camera, row, column and time: the backbone's own positions are all relative
    cameras: int = 8  # the most an observation may have

    def __post_init__(self) -> None:
        _check(self.width % self.heads == 0, f"bridge.width {self.width} does not divide into {self.heads} heads")


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer. Defaults are GR00T N1.5's."""

    layers: int = 16  # cross-attention on even ones, self-attention on odd ones
    heads: int = 32
    head_dim: int = 48
    ffn: int = 6144
    tap: int = 12  # the future tokens are read after this layer
    dropout: float = 0.2
    time_features: int = 256
    norms: bool = True  # a shallow DiT is more exact without LayerNorms: what one divides by differs from state to state

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def __post_init__(self) -> None:
        _check(self.layers % 2 == 0 and self.layers > 0, f"dit.layers is {self.layers}: layers come in pairs")
        _check(0 <= self.dropout < 1, f"dit.dropout is {self.dropout}: it must lie in [0, 1)")
        _check(self.time_features % 2 == 0 and self.width % 2 == 0, "dit.time_features and dit's width are even: waves come in pairs")
        _check(
            self.tap % 2 == 0 and 0 < self.tap <= self.layers,
            f"dit.tap is {self.tap}: it must be an even number of layers, at most {self.layers}",
        )


@dataclass(frozen=True)
class EmbodimentConfig:
    """Encoders and decoders, one set a robot; every robot's state and action are padded to the same widths."""

    state_width: int = 64
    action_width: int = 32
    hidden: int = 1024
    patch: int = 1  # steps of a chunk that one token holds
    state_dropout: float = 0.0  # how often the whole state is hidden in training


Path = Literal["flow", "clean", "ddim"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """From noise (time 0) to actions (time 1), and what is learned on the way."""

    path: Path = "flow"
    steps: int = 4  # of the sampler
    time_buckets: int = 1000
    beta: tuple[float, float] = (1.5, 1.0)  # flow, clean: time is (span - b) / span for b of this distribution, so mass lies near noise
    beta_span: float = 0.999
    draws: int = 1  # noise draws a sample
    future_weight: float = 0.2  # of the loss on future tokens
    ema: float = 0.995  # of the bridge that makes the future's target
    prefix: int = 0  # train with up to so many given action steps at the front, for chunking in real time

    def __post_init__(self) -> None:
        _check(self.steps >= 1 and self.draws >= 1, f"objective.steps is {self.steps} and draws {self.draws}: both are at least 1")
        _check(0 <= self.ema < 1, f"objective.ema is {self.ema}: it must lie in [0, 1)")


# Where it stands to the pictures: in a causal decoder, pictures before it cannot see it. "alone": after them, and its words alone, which
# have looked at the pictures, are intent: a small part of it, for backbones whose words hold what they name.
Instruction = Literal["before", "after", "alone"]


@dataclass(frozen=True)
class PolicyConfig:
    """From hidden states of block k to chunks of actions."""

    robots: tuple[str, ...] = ("panda", "xarm6", "xarm7", "widowxai")  # rows of the embodiments' weights, in order
    intent_block: int = 14
    intent_width: int = 3584
    instruction: Instruction = "after"
    horizon: int = 16
    bridge: BridgeConfig = BridgeConfig()
    dit: DiTConfig = DiTConfig()
    embodiment: EmbodimentConfig = EmbodimentConfig()
    objective: ObjectiveConfig = ObjectiveConfig()

    def __post_init__(self) -> None:
        _check(self.intent_block >= 1, f"intent_block is {self.intent_block}: it counts blocks from the bottom, the lowest is 1")
        _check(len(set(self.robots)) == len(self.robots) > 0, f"policy.robots {list(self.robots)} must be different names, at least one")
        _check(
            0 <= self.objective.prefix < self.horizon,
            f"objective.prefix is {self.objective.prefix}: it must be less than the horizon of {self.horizon}",
        )
        patch = self.embodiment.patch
        _check(
            patch >= 1 and self.horizon % patch == 0,
            f"embodiment.patch is {patch}: so many steps are one token, and it must divide the horizon of {self.horizon}",
        )
        _check(
            patch == 1 or not self.objective.prefix,
            f"embodiment.patch is {patch} and objective.prefix {self.objective.prefix}: given steps have a time of their own, so with a "
            "prefix each step is a token",
        )

    @property
    def action_tokens(self) -> int:
        """Of a chunk."""
        return self.horizon // self.embodiment.patch


def below_block(backbone: BackboneConfig, policy: PolicyConfig) -> BackboneConfig:
    """What of the backbone makes the intent: no block above, and no head, which a tied model does not have."""
    return replace(backbone, decoder=replace(backbone.decoder, layers=policy.intent_block, tied=True))


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left. Where devices lie in several slices, `data` goes over them first."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


Remat = Literal["none", "full", "dots", "dots_no_batch"]
AttentionName = Literal["auto", "xla", "splash", "cudnn"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed: numbers and memory, never what it means."""

    dtype: Dtype = "float32"  # of activations and matrix products
    remat: Remat = "none"
    attention: AttentionName = "auto"


@dataclass(frozen=True)
class HardwareConfig:
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    rows_at_once: int = 0  # of a step's batch on a device, the others after them; 0: all
    compiler_options: dict[str, str] = field(default_factory=dict)  # XLA's own names and values

    def __post_init__(self) -> None:
        _check(self.rows_at_once >= 0, f"hardware.rows_at_once is {self.rows_at_once}: it must be 0, for all rows, or more")


@dataclass(frozen=True)
class SamplingConfig:
    """How an answer is drawn from the model's probabilities, and when it ends."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int | None = None  # draw among the k likeliest
    top_p: float = 1.0  # draw among the likeliest that hold this much of the probability
    repetition_penalty: float | None = None  # on tokens that stand in prompt or answer; None: as the model's files say
    seed: int = 0
    stop: tuple[int, ...] = ()  # ids that end an answer besides the model's own

    def __post_init__(self) -> None:
        whole = isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1
        _check(whole, f"max_new_tokens is {self.max_new_tokens}: it must be a whole number of at least 1")
        _check(all(0 <= token < 2**31 for token in self.stop), f"stop holds {list(self.stop)}: ids of tokens lie between 0 and 2**31 - 1")
        _check(self.temperature >= 0, f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        _check(self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}: it must be at least 1, or null for all tokens")
        _check(0 < self.top_p <= 1, f"top_p is {self.top_p}: it must lie above 0 and not above 1")
        penalty = self.repetition_penalty
        _check(penalty is None or penalty > 0, f"repetition_penalty is {penalty}: it must be above 0, or null for the model's own")
        _check(0 <= self.seed < 2**32, f"seed is {self.seed}: it must lie between 0 and 2**32 - 1")


@dataclass(frozen=True)
class Experiment:
    """The root: what a YAML file in configs/ describes."""

    model: BackboneConfig
    hardware: HardwareConfig = HardwareConfig()
    sampling: SamplingConfig = SamplingConfig()
