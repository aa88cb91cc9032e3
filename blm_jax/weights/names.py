"""The table of names: where each tensor of the Hub's layout stands in the parameter tree, and how it is turned.

A tensor of the Hub is a row-major block `[*rows, *columns]`; in the tree a kernel is `[*columns, *rows]`, stacked over
layers. Nothing but transposing and reshaping happens between the two, so every value survives bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blm_jax.config import BackboneConfig

Path = tuple[str, ...]  # in the parameter tree
Shape = tuple[int, ...]
Slices = tuple[slice, ...]

PIECE_BYTES = 64 * 2**20  # weights are read, turned, hashed and written in pieces no larger than this


@dataclass(frozen=True)
class Entry:
    """One array of the parameter tree and the tensors of the Hub it is made of."""

    path: Path
    hub_name: str  # `{}` stands for the layer
    hub_shape: Shape  # as the Hub's file has it
    rows: Shape  # its first axis as the tree splits it
    columns: Shape = ()  # its other axes as the tree splits or joins them
    layers: int | None = None  # None: not stacked
    turned: bool = True  # the tree has columns first

    @property
    def block(self) -> Shape:
        """One layer in the Hub's order, its axes split as in the tree."""
        return self.rows + self.columns

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of `block` in the tree's order."""
        axes = tuple(range(len(self.block)))
        cut = len(self.rows)
        return axes[cut:] + axes[:cut] if self.turned else axes

    @property
    def shape(self) -> Shape:
        """Of the array in the tree."""
        one = tuple(self.block[axis] for axis in self.order)
        return one if self.layers is None else (self.layers, *one)

    def tensors(self) -> list[Tensor]:
        return [Tensor(self, layer) for layer in ([None] if self.layers is None else range(self.layers))]

    def hub_slices(self, slices: Slices) -> Slices:
        """Slices of one layer in the tree's order -> in the Hub's order."""
        return tuple(slices[self.order.index(axis)] for axis in range(len(self.order)))

    def tree_slices(self, slices: Slices) -> Slices:
        """Slices of one layer in the Hub's order -> in the tree's order."""
        return tuple(slices[axis] for axis in self.order)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the Hub's layout."""

    entry: Entry
    layer: int | None

    @property
    def name(self) -> str:
        return self.entry.hub_name.format(self.layer)


def table(config: BackboneConfig) -> dict[Path, Entry]:
    """Every array of a backbone, in the order in which the Hub's files hold them."""
    vision, decoder = config.vision, config.decoder
    entries: list[Entry] = []

    def add(path: str, hub_name: str, rows: Shape, columns: Shape = (), *, layers: int | None = None, turned: bool = True) -> None:
        hub_shape = (math.prod(rows), *([math.prod(columns)] if columns else []))
        entries.append(Entry(tuple(path.split(".")), hub_name, hub_shape, rows, columns, layers, turned))

    def add_linear(path: str, hub_name: str, rows: Shape, columns: Shape, layers: int | None, *, bias: bool) -> None:
        add(f"{path}.kernel", f"{hub_name}.weight", rows, columns, layers=layers)
        if bias:
            add(f"{path}.bias", f"{hub_name}.bias", rows, layers=layers)

    width, heads, count = (decoder.width,), (decoder.heads, decoder.head_dim), decoder.layers
    kv_heads, ffn = (decoder.kv_heads, decoder.head_dim), (decoder.ffn,)
    add("decoder.embed.embedding", "model.embed_tokens.weight", (decoder.vocab,), width, turned=False)
    blocks, hub = "decoder.blocks", "model.layers.{}"
    add(f"{blocks}.attn_norm.scale", f"{hub}.input_layernorm.weight", width, layers=count)
    add_linear(f"{blocks}.q", f"{hub}.self_attn.q_proj", heads, width, count, bias=True)
    add_linear(f"{blocks}.k", f"{hub}.self_attn.k_proj", kv_heads, width, count, bias=True)
    add_linear(f"{blocks}.v", f"{hub}.self_attn.v_proj", kv_heads, width, count, bias=True)
    add_linear(f"{blocks}.out", f"{hub}.self_attn.o_proj", width, heads, count, bias=False)
    add(f"{blocks}.ffn_norm.scale", f"{hub}.post_attention_layernorm.weight", width, layers=count)
    add_linear(f"{blocks}.gate", f"{hub}.mlp.gate_proj", ffn, width, count, bias=False)
    add_linear(f"{blocks}.up", f"{hub}.mlp.up_proj", ffn, width, count, bias=False)
    add_linear(f"{blocks}.down", f"{hub}.mlp.down_proj", width, ffn, count, bias=False)
    add("decoder.norm.scale", "model.norm.weight", width)
    if not decoder.tied:
        add("decoder.head.kernel", "lm_head.weight", (decoder.vocab,), width)

    width, heads, count, ffn = (vision.width,), (vision.heads, vision.head_dim), vision.layers, (vision.ffn,)
    patch = (vision.channels, vision.temporal_patch, vision.patch, vision.patch)
    entries.append(
        Entry(("vision", "patch_embed", "kernel"), "visual.patch_embed.proj.weight", (vision.width, *patch), width, (vision.patch_values,))
    )
    blocks, hub = "vision.blocks", "visual.blocks.{}"
    add(f"{blocks}.attn_norm.scale", f"{hub}.norm1.weight", width, layers=count)
    add_linear(f"{blocks}.qkv", f"{hub}.attn.qkv", (3, *heads), width, count, bias=True)
    add_linear(f"{blocks}.out", f"{hub}.attn.proj", width, heads, count, bias=True)
    add(f"{blocks}.ffn_norm.scale", f"{hub}.norm2.weight", width, layers=count)
    add_linear(f"{blocks}.gate", f"{hub}.mlp.gate_proj", ffn, width, count, bias=True)
    add_linear(f"{blocks}.up", f"{hub}.mlp.up_proj", ffn, width, count, bias=True)
    add_linear(f"{blocks}.down", f"{hub}.mlp.down_proj", width, ffn, count, bias=True)
    merged = (vision.merge**2 * vision.width,)
    add("vision.merger.norm.scale", "visual.merger.ln_q.weight", width)
    add_linear("vision.merger.inner", "visual.merger.mlp.0", merged, merged, None, bias=True)
    add_linear("vision.merger.outer", "visual.merger.mlp.2", (vision.out_width,), merged, None, bias=True)
    return {entry.path: entry for entry in entries}


def hub_tensors(entries: dict[Path, Entry]) -> list[Tensor]:
    """All tensors of the Hub's layout, layer by layer: the order in which export writes them."""
    place = {path: number for number, path in enumerate(entries)}
    groups: dict[Path, int] = {}  # a stack stands where its first array does

    def key(tensor: Tensor) -> tuple[int, int, int]:
        path = tensor.entry.path
        group = groups.setdefault(path[:2], place[path]) if tensor.layer is not None else place[path]
        return group, tensor.layer or 0, place[path]

    return sorted((tensor for entry in entries.values() for tensor in entry.tensors()), key=key)


def canonical(name: str) -> str:
    """The Hub's name for a tensor, of which transformers has another while it is in memory."""
    for prefix, hub_prefix in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(prefix):
            return hub_prefix + name[len(prefix) :]
    return name


def some(names: list[str]) -> str:
    """The first few names and how many more there are, up to the verb."""
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def pieces(shape: Shape, itemsize: int) -> Iterator[Slices]:
    """Cut a row-major array into contiguous pieces of at most PIECE_BYTES, in order. All but the last along an axis are alike."""
    step = piece_shape(shape, itemsize)

    def cut(axis: int) -> Iterator[Slices]:
        if axis == len(shape):
            yield ()
            return
        for start in range(0, shape[axis], step[axis]):
            for rest in cut(axis + 1):
                yield (slice(start, min(start + step[axis], shape[axis])), *rest)

    yield from cut(0)


def piece_shape(shape: Shape, itemsize: int) -> Shape:
    """The shape of such a piece."""
    axis, inner = len(shape), itemsize  # bytes of what lies right of axis
    while axis > 0 and inner * shape[axis - 1] <= PIECE_BYTES:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        return shape
    return (1,) * (axis - 1) + (_even_part(shape[axis - 1], max(1, PIECE_BYTES // inner)),) + shape[axis:]


def _even_part(size: int, most: int) -> int:
    """A length of at most `most` that divides `size`, if there is one not much shorter."""
    fewest = -(-size // most)
    for parts in range(fewest, 2 * fewest + 1):
        if size % parts == 0:
            return size // parts
    return most


# --- parameter trees -------------------------------------------------------------------------------------------------------


def leaves(tree: Mapping[str, Any], place: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Of nested dicts, each with its path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*place, key))
        else:
            yield (*place, key), value


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = value
    return tree
