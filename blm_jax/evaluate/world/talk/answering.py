"""The small base learns to answer, and goes on finding what it is asked about.

Answers alone unlearn finding: an answer's own words can look, so the names of a question need not, and a policy that lives on these names
would be blind. So both are learned at once, from the same conversations: each answer's words, and of each name in questions and answers
where it looks and what it holds. Eyes stay as they are, so what they see of a scene is made once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from blm_jax.config import BackboneConfig, ComputeConfig
from blm_jax.data.prompt import PromptEngine, user_turn
from blm_jax.evaluate.world.talk import finding
from blm_jax.evaluate.world.talk.eyes import Spoken
from blm_jax.evaluate.world.talk.finding import COMPARES, LOOKS, Heads, Read, Start
from blm_jax.evaluate.world.talk.fitting import Log, fitted, mean_where
from blm_jax.evaluate.world.talk.naming import Named, named, nothing, spelled
from blm_jax.evaluate.world.talk.questions import Asker, descriptions
from blm_jax.evaluate.world.talk.recipe import Recipe
from blm_jax.evaluate.world.talk.stills import Still
from blm_jax.evaluate.world.talk.talks import sentences
from blm_jax.models.attention import attend
from blm_jax.models.decoder import Decoder
from blm_jax.models.layers import around, unstack

LENGTH, NAMES = 256, 40  # tokens of a conversation, and names in it, at most
TURNS, EACH = 12, 3  # questions about a scene, and of a type
DESCRIBED = 0.75  # of scenes; where there is room, things are named and nothing is said of them
SENTENCES, SAID = 0.2, 9  # conversations without pictures, for each scene; and turns of one

Turn = tuple[str, str | None]  # what is asked, and the answer if one is to be learned


class Rows(NamedTuple):
    seen: Any  # [rows, visual tokens, width]
    tokens: Any  # [rows, LENGTH]
    answers: Any  # [rows, LENGTH] bool
    alone: Any  # [rows] bool: no pictures
    named: Named


def learn(
    params: dict[str, Any], heads: Heads, config: BackboneConfig, engine: PromptEngine, spoken: Spoken, recipe: Recipe, seed: int
) -> tuple[dict[str, Any], Log]:
    """A model's parameters after it, of which all the decoder's are others, and the losses on the way."""
    part = recipe.answering
    seen, scene, rows = _gathered(params, config, engine, part.scenes, seed)
    order: Iterator[int] = iter(())

    def batch(draw: np.random.Generator) -> Rows:
        nonlocal order
        some = []
        while len(some) < part.batch:
            if (one := next(order, None)) is None:
                order = iter(draw.permutation(len(scene)).tolist())  # all of them, before any comes again
            else:
                some.append(one)
        of = scene[some]
        return jax.tree.map(lambda leaf: leaf[some], rows)._replace(seen=np.where((of >= 0)[:, None, None], seen[of], 0))

    loss = partial(_loss, config=config, start=finding.start_of(engine), spoken=spoken, keep=recipe.keep_finding)
    state, log = fitted(loss, {"decoder": params["decoder"], "heads": heads}, None, batch, part, seed, "answering")
    return {**params, "decoder": state["decoder"]}, log


def _loss(
    state: Any, fixed: None, rows: Rows, *, config: BackboneConfig, start: Start, spoken: Spoken, keep: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = around(lambda: Decoder(config.decoder, ComputeConfig(), rngs=nnx.Rngs(0)), state["decoder"])
    first = jnp.where(rows.alone, 0, start.ahead)
    x, rotary = finding.begun(model, rows.seen, rows.tokens, start, config, first)
    # A conversation without pictures does not see that there are some.
    text = jnp.broadcast_to(1 + jnp.asarray(rows.alone, jnp.int32)[:, None], rows.tokens.shape)
    segments = jnp.concatenate([jnp.ones((len(rows.tokens), start.length), jnp.int32), text], axis=1)
    at, reads = start.length + jnp.asarray(rows.named.token), dict[int, Read]()
    for number, block in enumerate(unstack(model.blocks)):
        q, k, v = block.project(x, rotary)
        if number in (LOOKS, COMPARES):
            reads[number] = finding.at_names(block, x, (q, k, v), at, config.decoder.norm_eps)
        x = block.finish(x, attend(q, k, v, segments, causal=True, packed=True, implementation=block.attention))

    each = optax.softmax_cross_entropy_with_integer_labels(model.logits(x[:, start.length - 1 : -1]), jnp.asarray(rows.tokens))
    words = jax.lax.stop_gradient(model.embed.embedding[...])
    found, told = finding.finds(reads[LOOKS], rows.named, state["heads"], words, start, spoken)
    compared, more = finding.compares(reads[COMPARES], rows.named, state["heads"], start)
    answers, alone = jnp.asarray(rows.answers), jnp.asarray(rows.alone)[:, None]
    of_scenes, of_sentences = (mean_where(answers & some, each) for some in (~alone, alone))
    loss = mean_where(answers, each) + keep * (found + compared)
    return loss, {"answers": of_scenes, "sentences": of_sentences, **told, **more}


# --- conversations -------------------------------------------------------------------------------------------------------


def _gathered(
    params: dict[str, Any], config: BackboneConfig, engine: PromptEngine, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, Rows]:
    """What eyes see of scenes; the scene of each row, -1 where there is none; and the rows, which see nothing yet."""
    write = Writer(engine)
    asker, draw, seen, scene, rows = Asker(seed, "train"), random.Random(f"{seed} answering"), [], [], []
    for number, (still, looked) in enumerate(finding.scenes(params, config, engine, count, seed + 2, "conversations")):
        seen.append(looked)
        asked: list[Turn] = [(question.prompt, question.answer) for question in asker.ask(still, TURNS, EACH)]
        told: list[Turn] = draw.sample(descriptions(still, draw), 3) if draw.random() < DESCRIBED else []
        for turns in (asked, [*told, (finding.text_about(still, draw), None)]):
            if turns:
                scene.append(number)
                rows.append(write(turns, still, draw))
    made = sentences(seed, "train")
    for _ in range(round(SENTENCES * count)):
        scene.append(-1)
        rows.append(write([next(made) for _ in range(SAID)], None, draw))
    return np.stack(seen), np.array(scene), jax.tree.map(lambda *some: np.stack(some), *rows)


class Writer:
    """Conversations as tokens."""

    def __init__(self, engine: PromptEngine):
        self._engine, self._spelling, self._side = engine, spelled(engine.tokenizer.backend), finding.side_of(engine)
        # What the template says before a user's words: where there are pictures, it has said that before them.
        self._head = int(np.argmax(finding.start_of(engine).tokens == engine.config.tokens.vision_start))

    def __call__(self, turns: Sequence[Turn], still: Still | None, draw: random.Random) -> Rows:
        messages: list[dict[str, Any]] = []
        for i, (asked, answer) in enumerate(turns):
            # Behind the pictures, a corpus has a line break before the first question, and an instruction none.
            messages.append(user_turn("\n" * (i == 0 and draw.random() < 0.5) + asked))
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        made = self._engine.encode(messages)
        begin = self._head if still is not None else 0
        ids, said = made.tokens[begin:][:LENGTH], made.supervised[begin:][:LENGTH]
        tokens, answers = np.full(LENGTH, self._engine.config.tokens.pad, np.int32), np.zeros(LENGTH, bool)
        tokens[: len(ids)], answers[: len(ids)] = ids, said
        names = nothing(NAMES) if still is None else named(still, ids.tolist(), self._spelling, self._side, NAMES)
        return Rows(np.zeros(0, np.float16), tokens, answers, np.array(still is None), names)
