"""A small model to begin from, in the layout of Qwen2.5-VL: its shape, its words, and its files before it has learned anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from blm_jax.config import BackboneConfig, ComputeConfig, DecoderConfig, TokenConfig, VisionConfig
from blm_jax.convert.new import write_new_model
from blm_jax.data.chat import WORDS
from blm_jax.data.chat import Tokenizer as Chat
from blm_jax.data.files import open_path
from blm_jax.data.prompt import PromptEngine
from blm_jax.data.vision.pixels import PixelConfig
from blm_jax.errors import RequestError
from blm_jax.evaluate.world.talk import answering, eyes, finding
from blm_jax.evaluate.world.talk.eyes import FARTHEST, Spoken
from blm_jax.evaluate.world.talk.fitting import Log
from blm_jax.evaluate.world.talk.questions import GRID, NAMES, REGIONS, YES_NO
from blm_jax.evaluate.world.talk.recipe import Recipe
from blm_jax.evaluate.world.talk.stills import FORK, GOAL, NOUNS, STEPS
from blm_jax.evaluate.world.talk.talks import sentences
from blm_jax.evaluate.world.talk.wordings import CHOOSE
from blm_jax.evaluate.world.talk.wordings import WORDINGS as QUESTIONS
from blm_jax.evaluate.world.tasks import COLOURS, TASKS, WORDINGS, instruction
from blm_jax.evaluate.world.view import SIZE
from blm_jax.models.layers import WORD_SCALE, Linear
from blm_jax.models.mllm import Mllm

BRANCH = 0.35  # of what attention and feed-forward layers add at first
EMBEDDED = 0.1  # the standard deviation of words
LOOK = 10.0  # the bias of heads that look at things
FAR = 64  # tokens from a picture to what is said of it, or more
# Each patch is a token of its own: four together would show what several things are, and mix them up.
PIXELS = PixelConfig(min_pixels=28 * 28, max_pixels=4 * SIZE * SIZE, merge=1, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
VOCAB = 1536  # words and their parts, at most; 256 are the bytes, of which any text can be made
NUMBERS = r" ?-?\p{N}{1,2}"  # a number is one word: of digits, each would have to know which the others are
SAID = 4000  # sentences that the words are taken from
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# As Qwen2.5-VL's, but for the system's message that stands there where none is given: here each token counts.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_untrained(path: epath.PathLike, seed: int = 0) -> None:
    """A MODEL of some two million parameters drawn at random."""
    words = tokenizer(seed)
    config = config_of(words)
    write_new_model(path, config, drawn(config, seed), assets_of(words))


def write_base(path: epath.PathLike, recipe: Recipe, seed: int = 0) -> dict[str, Log]:
    """The same, but that it has learned to see (`eyes`), to find what is named (`finding`), and to answer. Losses on the way."""
    recipe.check()
    if open_path(path).exists():  # before hours of learning, and not behind them
        raise RequestError(f"{path} exists; choose another directory or remove it")
    words = tokenizer(seed)
    config, engine, known = config_of(words), engine_of(words), spoken(words)
    params, seeing = eyes.learn(drawn(config, seed), config, PIXELS, known, recipe.eyes, seed)
    params, heads, found = finding.learn(looking(params, config), config, engine, known, recipe.finding, seed)
    params, answered = answering.learn(params, heads, config, engine, known, recipe, seed)
    write_new_model(path, config, params, assets_of(words))
    return {"eyes": seeing, "finding": found, "answering": answered}


def engine_of(words: Tokenizer) -> PromptEngine:
    return PromptEngine(config_of(words), Chat(words, TEMPLATE, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}), PIXELS)


def drawn(config: BackboneConfig, seed: int) -> dict[str, Any]:
    """Parameters at random: what layers add to the residual stream is small."""

    def make() -> dict[str, Any]:
        model = Mllm(config, ComputeConfig(), rngs=nnx.Rngs(seed))
        for path, module in nnx.iter_graph(model):
            if isinstance(module, Linear) and path[-1] in ("out", "down"):
                module.kernel[...] = module.kernel[...] * BRANCH
        embedding = model.decoder.embed.embedding
        embedding[...] = embedding[...] * (EMBEDDED / WORD_SCALE)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return jax.jit(make)()


def looking(params: dict[str, Any], config: BackboneConfig) -> dict[str, Any]:
    """The same, but that half of the heads begin by looking at things: what eyes say of these is in the direction of the picture's word.

    Of all patches few show one; heads that begin with the mean of all learn where to look far more slowly.
    """
    blocks, words = params["decoder"]["blocks"], np.asarray(params["decoder"]["embed"]["embedding"])
    thing = words[config.tokens.image] / np.linalg.norm(words[config.tokens.image])
    keys = np.einsum("w,lwhd->lhd", thing, np.asarray(blocks["k"]["kernel"]))
    _, heads, dim = keys.shape
    # Pairs that the rotary embedding hardly turns between a picture and what is said of it.
    slow = config.decoder.rope_theta ** (-np.arange(dim // 2) / (dim // 2)) < 1 / FAR
    keys = keys * np.tile(slow, 2)
    bias = LOOK * keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    bias[:, : heads // 2] = 0
    decoder = {**params["decoder"], "blocks": {**blocks, "q": {**blocks["q"], "bias": jnp.asarray(bias, jnp.float32)}}}
    return {**params, "decoder": decoder}


def config_of(words: Tokenizer) -> BackboneConfig:
    number = {name: _id(words, name) for name in SPECIAL}
    tokens = TokenConfig(
        image=number["<|image_pad|>"],
        video=number["<|video_pad|>"],
        vision_start=number["<|vision_start|>"],
        vision_end=number["<|vision_end|>"],
        pad=number["<|endoftext|>"],
    )
    width = 128
    vision = VisionConfig(layers=3, width=width, heads=4, ffn=3 * width, out_width=width, merge=PIXELS.merge, full_attention_layers=())
    decoder = DecoderConfig(
        layers=5,
        width=width,
        heads=4,
        kv_heads=4,
        ffn=3 * width,
        vocab=-(-words.get_vocab_size() // 64) * 64,
        rope_theta=1e6,
        mrope_section=(4, 6, 6),
        max_positions=4096,
        tied=True,
    )
    return BackboneConfig(vision=vision, decoder=decoder, tokens=tokens)


def tokenizer(seed: int) -> Tokenizer:
    """Byte-level, with the words of this world; any other text is spelled."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(f"{NUMBERS}|{WORDS}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, min_frequency=2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    made.train_from_iterator(texts(seed), trainer)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return made


def spoken(words: Tokenizer) -> Spoken:
    """The words that eyes learn to say."""

    def each(said: Iterable[str]) -> np.ndarray:
        return np.array([_word(words, one) for one in said], np.int32)

    return Spoken(
        colours=np.stack([each(COLOURS), each(f" {colour}" for colour in COLOURS)]),
        nouns=np.stack([each((*NOUNS, GOAL, FORK)), each(f" {noun}" for noun in (*NOUNS, GOAL, FORK))]),
        columns=each(f"{number}" for number in range(GRID)),
        rows=each(f" {number}" for number in range(GRID)),
        centimetres=each(f" {number}" for number in range(-FARTHEST, FARTHEST + 1)),
    )


def _word(words: Tokenizer, said: str) -> int:
    found = words.encode(said).ids
    if len(found) != 1:
        raise ValueError(f"{said!r} is {len(found)} tokens of the small base, and should be one: show it to the tokenizer more often")
    return found[0]


def texts(seed: int) -> Iterator[str]:
    """What is said in this world, for its words."""
    for _ in range(8):
        yield "system\nuser\nassistant\n"
    for learned, _ in QUESTIONS.values():
        yield from learned
    nouns = (*NOUNS, "thing")
    answers = (*COLOURS, *nouns, GOAL, FORK, *(f"{noun}s" for noun in nouns), *STEPS, *REGIONS, *NAMES.values(), *YES_NO)
    names = " or ".join(answers)
    for _ in range(3):  # each as the first word of an answer, too
        yield from answers
        yield from (f"{number} {number}" for number in range(GRID))
        yield from (f"x -{number} y -{number} z {number}" for number in range(FARTHEST + 1))
    for words in (*CHOOSE[0], *CHOOSE[0]):
        yield words.format(f"the {names}", f"A {names}, B {names}, C yes, D no") + " x -1 y -2"
    for task, wordings in zip(range(len(TASKS)), WORDINGS, strict=True):
        for wording in range(len(wordings)):
            for colour in range(len(COLOURS)):
                yield instruction(task, colour, (colour + 1) % len(COLOURS), wording)
    for asked, answered in islice(sentences(seed, "train"), SAID):
        yield f"{asked} {answered}"


def assets_of(words: Tokenizer) -> dict[str, bytes]:
    """The files beside weights and config.json, by name."""
    pixels = {
        "min_pixels": PIXELS.min_pixels,
        "max_pixels": PIXELS.max_pixels,
        "patch_size": PIXELS.patch,
        "temporal_patch_size": PIXELS.temporal_patch,
        "merge_size": PIXELS.merge,
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    stops = [_id(words, name) for name in ("<|im_end|>", "<|endoftext|>")]
    return {
        "tokenizer.json": words.to_str().encode(),
        "tokenizer_config.json": _json({**names, "model_max_length": 4096, "additional_special_tokens": list(SPECIAL[1:])}),
        "chat_template.jinja": TEMPLATE.encode(),
        "preprocessor_config.json": _json(pixels),
        "generation_config.json": _json({"eos_token_id": stops, "pad_token_id": stops[1], "do_sample": False}),
    }


def _id(words: Tokenizer, name: str) -> int:
    found = words.token_to_id(name)
    assert found is not None
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
