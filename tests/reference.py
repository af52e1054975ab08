"""`python -m tests.reference`: docs/reference.md, from the contract's .proto files, their comments, and the settings."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

from serving.settings import options_of

from service.config import Settings as Service
from sidecar.config import Settings as Sidecar

ROOT = Path(__file__).parents[1]
BUF = Path(sys.executable).parent / "buf"
PAGE = ROOT / "docs" / "reference.md"
OTHERS = ROOT / "tests" / "others.toml"
PACKAGE = "ostinato.v1"
HEAD = """# Reference

Every service, message and enum of `ostinato.v1`, as the [.proto files](../proto/ostinato/v1/) say it, and
[every setting](#settings); written by `make docs`. What the bytes, digests and reasons mean is in [protocol.md](protocol.md).
"""
# Where things stand in a descriptor: the field numbers of descriptor.proto, which source locations are made of.
MESSAGES, ENUMS, SERVICES, SYNTAX = 4, 5, 6, 12
MEMBERS = 2  # of a message, an enum or a service alike

Place = tuple[int, ...]
Kind = FieldDescriptorProto
_SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in Kind.Type.items()}


def render(files: FileDescriptorSet) -> str:
    """The page: what callers need, what that is made of, and what only sidecar and service say to each other."""
    ours = [file for file in files.file if file.package == PACKAGE]
    ours.sort(key=lambda file: (file.name.endswith("/engine.proto"), not file.service, file.name))
    known = {each.name for file in ours for each in file.message_type} | {each.name for file in ours for each in file.enum_type}
    return "\n".join([HEAD, *(line for file in ours for line in _File(file, known).lines()), *_settings(), *_others()])


def _settings() -> Iterator[str]:
    yield "## Settings\n"
    yield "How they are given is in [operations.md](operations.md#settings).\n"
    for program, declared in {"sidecar": Sidecar, "service": Service}.items():
        yield f"### `python -m {program}`\n\n| flag | | default | bounds |\n| --- | --- | --- | --- |"
        for option in options_of(declared, program):
            yield f"| `{option.flag}` | {option.about['help']} | {_text(option.applies)} | {option.bounds} |"
        yield ""


def others() -> dict[str, dict[str, Any]]:
    """What becomes of the fields of other interfaces, by interface."""
    return tomllib.loads(OTHERS.read_text())


def _others() -> Iterator[str]:
    yield "## Parameters of others\n"
    yield "What becomes of every field of three other interfaces: how it is supported, or why it is not.\n"
    for other in others().values():
        yield f"### {other['title']}\n"
        yield f"| field | {other['here']} |"
        yield "| --- | --- |"
        yield from (f"| `{name}` | {text} |" for name, text in other["fields"].items())
        yield ""


class _File:
    def __init__(self, file: FileDescriptorProto, known: set[str]) -> None:
        self._file, self._known = file, known
        places = file.source_code_info.location
        self._said = {tuple(place.path): _text(place.leading_comments or place.trailing_comments) for place in places}

    def lines(self) -> Iterator[str]:
        yield f"## {self._file.name.rpartition('/')[2]}\n"
        if self._said.get((SYNTAX,)):
            yield f"{self._said[SYNTAX,]}\n"
        for number, service in enumerate(self._file.service):
            yield from self._service(service, (SERVICES, number))
        for number, message in enumerate(self._file.message_type):
            yield from self._message(message, (MESSAGES, number))
        for number, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (ENUMS, number))

    def _service(self, service: ServiceDescriptorProto, place: Place) -> Iterator[str]:
        yield from self._title("service", service.name, place)
        yield "| call | request | answer | |\n|---|---|---|---|"
        for number, method in enumerate(service.method):
            asked = "stream of " * method.client_streaming + self._link(method.input_type)
            answered = "stream of " * method.server_streaming + self._link(method.output_type)
            yield f"| `{method.name}` | {asked} | {answered} | {self._cell((*place, MEMBERS, number))} |"
        yield ""

    def _message(self, message: DescriptorProto, place: Place) -> Iterator[str]:
        yield from self._title("message", message.name, place)
        if message.field:
            yield "| | field | type | |\n|---|---|---|---|"
        for number, field in enumerate(message.field):
            kind, said = self._type(message, field), self._cell((*place, MEMBERS, number))
            yield f"| {field.number} | `{field.name}` | {kind} | {said} |"
        yield "" if message.field else "Empty.\n"

    def _enum(self, enum: EnumDescriptorProto, place: Place) -> Iterator[str]:
        yield from self._title("enum", enum.name, place)
        yield "| | value | |\n|---|---|---|"
        for number, value in enumerate(enum.value):
            yield f"| {value.number} | `{value.name}` | {self._cell((*place, MEMBERS, number))} |"
        yield ""

    def _title(self, kind: str, name: str, place: Place) -> Iterator[str]:
        yield f"### {name}\n"
        yield f"*{kind}*" + (f" {self._said[place]}" if self._said.get(place) else "") + "\n"

    def _cell(self, place: Place) -> str:
        return self._said.get(place, "").replace("\n\n", "<br>").replace("|", "\\|")

    def _type(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        entry = next(
            (each for each in message.nested_type if each.options.map_entry and field.type_name.endswith(each.name)), None
        )
        if entry is not None:
            return f"map of {self._name(entry.field[0])} to {self._name(entry.field[1])}"
        if field.label == Kind.LABEL_REPEATED:
            return f"repeated {self._name(field)}"
        if field.proto3_optional:
            return f"optional {self._name(field)}"
        if field.HasField("oneof_index"):
            return f"{self._name(field)}, one of *{message.oneof_decl[field.oneof_index].name}*"
        return self._name(field)

    def _name(self, field: FieldDescriptorProto) -> str:
        return self._link(field.type_name) if field.type_name else _SCALARS[field.type]

    def _link(self, full_name: str) -> str:
        package, _, name = full_name.removeprefix(".").rpartition(".")
        return f"[{name}](#{name.lower()})" if package == PACKAGE and name in self._known else f"{package}.{name}"


def _text(comment: str) -> str:
    """A comment as paragraphs of one line; what Markdown would take for a tag or for emphasis is escaped."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n[ ]*\n", comment.strip()))
    return "\n\n".join(re.sub(r"([<>*])", r"\\\1", paragraph) for paragraph in paragraphs)


def descriptors() -> FileDescriptorSet:
    """The contract, comments included."""
    built = subprocess.run(
        [BUF, "build", "proto", "--as-file-descriptor-set", "-o", "-"], cwd=ROOT, capture_output=True, check=True
    )
    return FileDescriptorSet.FromString(built.stdout)


if __name__ == "__main__":
    PAGE.write_text(render(descriptors()))
