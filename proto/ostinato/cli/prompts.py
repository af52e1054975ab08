"""Where prompts come from: arguments, lines of stdin, and files of JSON lines. Each remembers its place, for errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ostinato import requests
from ostinato.cli import files
from ostinato.cli.session import usage
from ostinato.v1 import types_pb2

_PROMPTS: Mapping[str, Callable[[object], types_pb2.Item]] = {
    "text": lambda value: types_pb2.Item(text=_text(value)),
    "token_ids": lambda value: types_pb2.Item(token_ids=requests.token_ids(value)),
    "messages": lambda value: types_pb2.Item(chat=requests.chat(value)),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """An item and where it stood, such as `questions.jsonl:7`."""

    item: types_pb2.Item
    place: str


def from_arguments(given: Iterable[str]) -> Iterator[Prompt]:
    """Each argument is a prompt; `-` stands for the lines of stdin, blank ones left out."""
    for number, argument in enumerate(given, 1):
        if argument != files.STDIN:
            yield _prompt(argument, f"prompt {number}")
            continue
        for place, text in _lines(argument):
            yield _prompt(text, place)


def from_file(path: Path) -> Iterator[Prompt]:
    """Each line a JSON string, or an object with text, token_ids or messages, and any parameters. Blank lines are left out."""
    for place, text in _lines(path):
        with usage(place):
            yield Prompt(_item(json.loads(text, object_pairs_hook=_object, parse_constant=_constant)), place)


def as_chat(prompt: Prompt) -> Prompt:
    """A text as a chat of one user message; other prompts as they are."""
    if not prompt.item.HasField("text"):
        return prompt
    item = types_pb2.Item(chat=requests.chat([{"role": "user", "content": prompt.item.text}]))
    if prompt.item.HasField("parameters"):
        item.parameters.CopyFrom(prompt.item.parameters)
    return Prompt(item, prompt.place)


def _prompt(text: str, place: str) -> Prompt:
    with usage(place):
        return Prompt(requests.item(text, "text"), place)


def _lines(path: Path | str) -> Iterator[tuple[str, str]]:
    for place, line in files.each_line(path):
        with usage(place):
            text = line.decode()
        yield place, text


def _item(given: object) -> types_pb2.Item:
    if isinstance(given, str):
        given = {"text": given}
    if not isinstance(given, dict):
        raise TypeError("must be a JSON string or object")
    chosen = [name for name in _PROMPTS if name in given]
    if len(chosen) != 1:
        raise ValueError(f"{', '.join(chosen or _PROMPTS)}: exactly one of them")
    item = _PROMPTS[chosen[0]](given.pop(chosen[0]))
    if isinstance(given.get("seed"), str) and given["seed"].isdecimal():
        given["seed"] = int(given["seed"])  # as protobuf's JSON writes it
    if parameters := requests.parameters(given):
        item.parameters.CopyFrom(parameters)
    return item


def _text(value: object) -> str:
    text = requests.text("text", value)
    if not text:
        raise ValueError("text: empty")
    return text


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)}: given twice")
    return made


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name}: is no JSON number")
