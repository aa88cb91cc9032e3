"""Reading what a user names: paths (local or in a bucket) and URLs."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import os
import secrets
import urllib.parse
from typing import Any

from etils import epath

from blm_jax.errors import RequestError

# What reads a kind of bucket, and how to install it.
BUCKETS = {"gs": ("gcsfs", "pip install 'blm-jax[gcs]'"), "s3": ("s3fs", "pip install s3fs")}


def open_path(path: epath.PathLike) -> epath.Path:
    """A path a user gave, local or in a bucket that can be read here."""
    kind, mark, _ = os.fspath(path).partition("://")
    if mark and kind not in BUCKETS:
        raise RequestError(f"{path}: no such kind of path; buckets begin with {' or '.join(f'{known}://' for known in BUCKETS)}")
    if mark and importlib.util.find_spec(BUCKETS[kind][0]) is None:
        raise RequestError(f"{path} lies in a bucket: install what reads it with {BUCKETS[kind][1]}")
    return epath.Path(path)


def read_source(source: Any, kind: str) -> tuple[bytes, str]:
    """Contents and printable name of a path or URL."""
    if isinstance(source, str) and source.startswith("data:"):
        return read_data_url(source, kind), f"the {kind} in a data: URL"
    path = source_path(source, kind)
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise RequestError(f"{kind} {path} cannot be opened: {error.strerror or one_line(error)}") from error


def source_path(source: Any, kind: str) -> epath.Path:
    if not isinstance(source, (str, epath.Path)) and not hasattr(source, "__fspath__"):
        raise RequestError(f"a {kind} is a path, a file: or data: URL, bytes, an image or an array, not {type(source).__name__}")
    text = str(source)
    if text.startswith("file:"):
        text = urllib.parse.unquote(urllib.parse.urlparse(text).path)
    if text.startswith(("http:", "https:")):
        raise RequestError(f"{kind} {text} is not fetched from the net: give a path, or the contents as a data: URL")
    path = open_path(text)
    if not path.exists():
        raise RequestError(f"{kind} {path} does not exist")
    return path


def read_data_url(url: str, kind: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise RequestError(f"the data: URL of a {kind} has no comma: it reads data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the data: URL of a {kind} is no base64: {one_line(error)}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must hold a JSON object")
    return value


def read_text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except (ValueError, OSError) as error:
        raise RequestError(f"{path} cannot be read as text: {one_line(error)}") from error


def write_whole(path: epath.Path, contents: bytes) -> None:
    """A file that appears whole or not at all, its directories with it."""
    try:
        if "://" in os.fspath(path):  # an object in a bucket appears when all of it is there
            path.write_bytes(contents)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{path.name}.{secrets.token_hex(4)}"
        try:
            partial.write_bytes(contents)
            os.rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
