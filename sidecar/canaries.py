"""Canaries as a file has them: prompts whose answers are to be known."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ostinato import requests
from ostinato.v1 import types_pb2

DEFAULT = Path(__file__).with_name("canaries.toml")
CANARIES_MAX = 256
NAME_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt, all that determines its answer, and a name for people."""

    name: str
    item: types_pb2.Item


def read(path: Path | None) -> tuple[Canary, ...]:
    """Those in this file, or those that come with the sidecar. Raises ValueError: the file, and what is wrong in it."""
    path = path or DEFAULT
    try:
        canaries = tuple(_canaries(tomllib.loads(path.read_text())))
        names = [canary.name for canary in canaries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)!r} is the name of two canaries")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return canaries


def _canaries(document: dict[str, object]) -> Iterator[Canary]:
    listed = document.get("canary", [])
    if set(document) - {"canary"} or not isinstance(listed, list):
        raise ValueError("holds something else than [[canary]] tables")
    if len(listed) > CANARIES_MAX:
        raise ValueError(f"canary: {len(listed)} tables, at most {CANARIES_MAX} are allowed")
    for position, given in enumerate(listed):
        try:
            yield _canary(given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"canary[{position}].{error}") from error


def _canary(given: dict[str, object]) -> Canary:
    for field in given:
        if field not in ("name", "text", "parameters"):
            raise ValueError(f"{field}: no such field; a canary has name, text and parameters")
    name, text = (requests.text(field, given.get(field, "")) for field in ("name", "text"))
    for field, value in (("name", name), ("text", text)):
        if not value:
            raise ValueError(f"{field}: is missing")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"name: at most {NAME_BYTES_MAX} bytes are allowed")
    sampling = given.get("parameters", {})
    if not isinstance(sampling, dict):
        raise TypeError("parameters: is no table")
    try:
        parameters = requests.parameters(sampling)
    except (ValueError, TypeError) as error:
        raise ValueError(f"parameters.{error}") from error
    if parameters is None or not parameters.HasField("seed"):
        raise ValueError("parameters.seed: is missing; an answer is known by its seed")
    return Canary(name, types_pb2.Item(text=text, parameters=parameters))
