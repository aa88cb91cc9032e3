"""A training run as one tree of frozen dataclasses: which weights, which data, which numbers. Hardware stands apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blm_jax.config import BackboneConfig, HardwareConfig, LoraConfig, PolicyConfig
from blm_jax.errors import RequestError


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RequestError(message)


# --- how weights move --------------------------------------------------------------------------------------------------------

Schedule = Literal["cosine", "linear", "constant"]
Moments = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class ModuleConfig:
    """Parameters whose name matches, such as vision.* or decoder.blocks.*.kernel; the first match counts."""

    match: str
    rate: float = 1.0  # times the run's; 0 freezes

    def __post_init__(self) -> None:
        _check(self.rate >= 0, f"rate {self.rate} of {self.match!r}: it must be 0, which freezes, or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    rate: float
    schedule: Schedule = "cosine"
    warmup: float = 0.03  # share of the steps
    floor: float = 0.0  # where the schedule ends, as a share of the rate
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # of matrices, not of norms and biases
    clip: float = 1.0  # of all slopes' norm
    moments: Moments = "float32"
    modules: tuple[ModuleConfig, ...] = ()
    skips: int = 10  # steps in a row that are not finite, after which the run stops

    def __post_init__(self) -> None:
        _check(self.rate > 0, f"optimizer.rate is {self.rate}: it must be above 0")
        _check(0 <= self.warmup < 1, f"optimizer.warmup is {self.warmup}: it is a share of the steps, from 0 to below 1")
        _check(0 <= self.floor <= 1, f"optimizer.floor is {self.floor}: it is a share of the rate, from 0 to 1")
        _check(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas are {list(self.betas)}: both lie in [0, 1)")
        _check(self.clip > 0 and self.eps > 0, f"optimizer.clip is {self.clip} and eps {self.eps}: both are above 0")
        _check(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}: it must be 0 or more")
        _check(self.skips >= 1, f"optimizer.skips is {self.skips}: it must be at least 1")


# --- what is learned from ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChangesConfig:
    """How pictures are changed, each number the most of it."""

    crop: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    versions: int = 0  # of an episode; 0 makes a new one each time. Cached intents have those they were made with
    seed: int = 0


@dataclass(frozen=True)
class StageOneConfig:
    """The backbone learns from conversations."""

    corpora: dict[str, str]  # path of a prepared corpus -> weight, or percentage of it
    length: int = 4096  # tokens of a row
    row_length: int | None = None  # patches of a vision row; None takes what fills rows best
    changes: ChangesConfig = ChangesConfig()
    lora: LoraConfig | None = None
    kept_blocks: int = 0  # of the decoder's first ones, which stay as they are
    held_out: dict[str, str] = field(default_factory=dict)  # corpora whose loss is told, and not learned from

    def __post_init__(self) -> None:
        _check(self.length >= 1, f"length is {self.length}: a row has at least one token")
        _check(self.kept_blocks >= 0, f"kept_blocks is {self.kept_blocks}: it must be 0, which keeps none, or more")


@dataclass(frozen=True)
class SetConfig:
    """Demonstrations of one robot."""

    path: str
    robot: str
    stats: str  # what `blm data stats` wrote
    share: str = "1"  # a weight, or a percentage of the set
    task: str = ""  # by which its loss is told; empty: its path
    held_out: bool = False  # its loss is told, and not learned from


@dataclass(frozen=True)
class StageTwoConfig:
    """The policy learns from demonstrations; the backbone is frozen."""

    sets: tuple[SetConfig, ...]
    policy: PolicyConfig | None = None  # a new one; None goes on with the base's own
    robots_files: tuple[str, ...] = ()
    intents: tuple[str, ...] = ()  # what `blm data features` wrote, one a robot; none: the backbone looks in each step
    changes: ChangesConfig = ChangesConfig()
    instruction_tokens: int = 64  # of the longest instruction
    only: str = ""  # train the rows of this robot alone: all else of the policy stays as it is
    every: int = 1  # steps from one window of an episode to the next; it divides the robots' horizons

    def __post_init__(self) -> None:
        _check(self.every >= 1, f"every is {self.every}: it must be 1, which takes all, or more")
        _check(any(not one.held_out for one in self.sets), "stage_two.sets has none to learn from")
        _check(not (self.only and self.policy), "stage_two.only trains rows of the base's policy: leave out stage_two.policy")


# --- the run -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps
    keep: int = 3  # the last ones
    keep_every: int = 0  # steps whose multiples are kept for good; 0: none
    best: str = ""  # a number of an evaluation, such as held_out/loss: the checkpoint where it is lowest is kept too

    def __post_init__(self) -> None:
        _check(self.every >= 1 and self.keep >= 1, f"checkpoints.every is {self.every} and keep {self.keep}: both are at least 1")


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps
    wandb: str = ""  # a project there; empty: nothing is sent
    profile: tuple[int, ...] = ()  # the first step, and the one after the last, of which a profile is taken

    def __post_init__(self) -> None:
        _check(self.every >= 1, f"log.every is {self.every}: it must be at least 1")
        good = not self.profile or (len(self.profile) == 2 and 0 <= self.profile[0] < self.profile[1])
        _check(good, f"log.profile is {list(self.profile)}: write [first, last + 1]")


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 0  # steps; 0: at the end alone
    batches: int = 8  # of what is held out

    def __post_init__(self) -> None:
        _check(self.every >= 0 and self.batches >= 1, f"evaluation.every is {self.every} and batches {self.batches}: at least 0 and 1")


@dataclass(frozen=True)
class Run:
    """The root: what `blm train` and `blm plan` read."""

    steps: int
    batch: int  # rows of a step, over all devices
    optimizer: OptimizerConfig
    base: str = ""  # the MODEL begun from
    out: str = ""  # the run's directory
    seed: int = 0
    stage_one: StageOneConfig | None = None
    stage_two: StageTwoConfig | None = None
    workers: int = 0  # processes that read data; 0: threads
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    model: BackboneConfig | None = None  # in place of the base's, for plans without weights

    def __post_init__(self) -> None:
        _check((self.stage_one is None) != (self.stage_two is None), "a run has a stage_one or a stage_two, and not both")
        self._check_best()
        _check(self.steps >= 1 and self.batch >= 1, f"steps is {self.steps} and batch {self.batch}: both are at least 1")
        _check(0 <= self.seed < 2**32, f"seed is {self.seed}: it must lie between 0 and 2**32 - 1")

    def _check_best(self) -> None:
        """A best checkpoint that can never be found would be missed at the end of the run."""
        best, every = self.checkpoints.best, self.evaluation.every
        if not best:
            return
        one, two = self.stage_one, self.stage_two
        names = ("held_out/loss",) if one is not None else ("held_out/action", "held_out/future")
        _check(best in names, f"checkpoints.best is {best!r}: an evaluation tells {' and '.join(names)}")
        held = bool(one.held_out) if one is not None else two is not None and any(part.held_out for part in two.sets)
        _check(held, f"checkpoints.best is {best}, but nothing is held out")
        meet = bool(every) and self.checkpoints.every % every == 0
        _check(meet, f"checkpoints.every {self.checkpoints.every} must be a multiple of evaluation.every {every}, to know the best")
