"""What a step has to compute: our own count of operations, from the batch as it is on the host. Padding is not counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from blm_jax.batch import Batch, IntentRows, Moments, Prompts, VisionRows
from blm_jax.config import BackboneConfig, PolicyConfig, Remat
from blm_jax.counts import Unit, chip_of, training

Amounts = Counter[Unit]


class StepWork(NamedTuple):
    """Of one step, over all devices."""

    rows: int  # of text, or moments
    tokens: int  # that the decoder reads, or tokens of intent where it reads none
    operations: dict[str, int]  # that the step needs, by component
    repeated: int  # forward operations that are made again on the way back, since not all activations are kept

    @property
    def needed(self) -> int:
        return sum(self.operations.values())


class WorkCount:
    """Made once for a run, then asked of each batch, in a millisecond or so.

    `trained` are the arrays that are, by their names in the tree ("decoder.blocks.q.kernel", "policy.bridge.queries"); `ranks` the
    ranks of adapters, by what they stand beside ("decoder.blocks.q"). A step's batch is `parts` times what a process holds of it.
    """

    def __init__(
        self,
        backbone: BackboneConfig | None,
        policy: PolicyConfig | None = None,
        *,
        trained: Iterable[str],
        ranks: Mapping[str, int] | None = None,
        remat: Remat = "none",
        parts: int = 1,
    ):
        self.backbone, self.policy, self.parts = backbone, policy, parts
        self.rates = training(backbone, policy, frozenset(trained), ranks or {}, remat)

    def __call__(self, batch: Batch | Moments) -> StepWork:
        seen, future = (amounts_of_text(batch, self.backbone), Amounts()) if isinstance(batch, Batch) else self._of_moments(batch)
        operations: Counter[str] = Counter()
        repeated = 0
        for (component, unit), rate in self.rates.items():
            # What looks at the future is a target: nothing is learned through it.
            operations[component] += seen[unit] * (rate.forward + rate.backward) + future[unit] * rate.forward
            repeated += seen[unit] * rate.repeated
        rows = len(batch.tokens) if isinstance(batch, Batch) else len(batch.has_future)
        tokens = seen["tokens"] + future["tokens"] if seen["tokens"] else seen["intent_tokens"] + future["intent_tokens"]
        of_all = {name: self.parts * count for name, count in operations.items() if count}
        return StepWork(self.parts * rows, self.parts * tokens, of_all, self.parts * repeated)

    def _of_moments(self, moments: Moments) -> tuple[Amounts, Amounts]:
        if self.policy is None:
            raise ValueError("moments are learned from by a policy")
        seen, future = (self._of_intent(part) for part in (moments.seen, moments.future))
        rows, futures = len(moments.has_future), int(np.count_nonzero(moments.has_future))
        draws, queries = self.policy.objective.draws, self.policy.bridge.queries
        steps = np.count_nonzero(np.asarray(moments.robots.action_mask).any(axis=-1), axis=-1)  # [rows]
        held = -(-steps // self.policy.embodiment.patch)
        tokens = 1 + queries + held  # the state, what foresees the future, the chunk
        seen.update(
            {
                "observations": rows,
                "moments": rows,
                "draws": draws * rows,
                "dit_tokens": draws * int(tokens.sum()),
                "dit_pairs": draws * int((tokens**2).sum()),
                "action_tokens": draws * int(held.sum()),
                "future_draws": draws * futures,
            }
        )
        future["observations"] = futures
        return seen, future

    def _of_intent(self, seen: Prompts | IntentRows) -> Amounts:
        amounts = Amounts() if isinstance(seen, IntentRows) else amounts_of_text(seen.batch, self.backbone)
        amounts["intent_tokens"] = int(np.count_nonzero(seen.mask))
        return amounts


def amounts_of_text(batch: Batch, config: BackboneConfig | None) -> Amounts:
    if config is None:
        raise ValueError("tokens are read by a backbone")
    lengths = segment_lengths(np.asarray(batch.segments))
    amounts = Amounts(
        {
            "tokens": int(lengths.sum()),
            "pairs": int((lengths * (lengths + 1) // 2).sum()),
            "logits": int(np.count_nonzero(batch.weights)),
        }
    )
    if batch.vision is not None:
        amounts.update(_amounts_of_vision(batch.vision, config))
    return amounts


def _amounts_of_vision(rows: VisionRows, config: BackboneConfig) -> Amounts:
    frames = segment_lengths(np.asarray(rows.frames))
    windows = segment_lengths(np.asarray(rows.windows).reshape(-1, config.vision.window_patches))
    patches = int(frames.sum())
    return Amounts(
        {
            "patches": patches,
            "cells": patches // config.vision.merge**2,
            "frame_pairs": int((frames**2).sum()),
            "window_pairs": int((windows**2).sum()),
        }
    )


def segment_lengths(segments: np.ndarray) -> np.ndarray:
    """segments [rows, length], 0 padding -> how long each is, row after row."""
    inner = np.sort(segments, axis=1)
    begins = np.ones(inner.shape, bool)
    begins[:, 1:] = inner[:, 1:] != inner[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, inner.size))
    return lengths[inner.ravel()[starts] > 0]


def peak(devices: Iterable[Any]) -> float | None:
    """Operations a second of all devices of a mesh, by their data sheets; None where one has none, as a CPU."""
    chips = [chip_of(device.device_kind) for device in devices]
    known = [chip.tflops * 1e12 for chip in chips if chip is not None]
    return sum(known) if known and len(known) == len(chips) else None
