"""Structural tags as a Lark grammar, which llguidance compiles.

A structural tag is xgrammar's JSON: `{"type": "structural_tag", "format": {…}}`, of formats that hold others. Those of FORMATS
are supported; triggered_tags and any_text have to be at the end of the output, or any_text before the end of a tag.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from service.strict_json import object_of, schema_of

Format = Mapping[str, Any]
FORMATS = ("const_string", "json_schema", "regex", "sequence", "or", "tag", "triggered_tags", "any_text")
DEPTH_MAX = 32
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written on one line, as by json.dumps: with free white space a small model may never leave it."""
_ANY = r"/(.|\n)*/"


def lark_of(source: str) -> str:
    """The grammar. Raises ValueError that names the format."""
    given = object_of(source)
    if given.get("type") != "structural_tag" or not isinstance(given.get("format"), dict):
        raise ValueError('must be {"type": "structural_tag", "format": {…}}')
    grammar = _Grammar()
    start = grammar.expression(given["format"], "format", 0, last=True)
    return "\n".join([f"start: {start}", *grammar.rules, ""])


def on_one_line(schema: Mapping[str, Any]) -> str:
    """The schema as llguidance takes it. A schema's own x-guidance takes precedence."""
    return json.dumps({"x-guidance": SEPARATORS} | dict(schema))


class _Grammar:
    def __init__(self) -> None:
        self.rules: list[str] = []

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attribute}: {body}")
        return name

    def expression(self, given: object, path: str, depth: int, *, last: bool) -> str:
        """`last`: nothing follows it in the output."""
        if not isinstance(given, dict):
            raise ValueError(f"{path} must be an object")
        if depth > DEPTH_MAX:
            raise ValueError(f"{path} is nested deeper than {DEPTH_MAX} formats")
        match given.get("type"):
            case "const_string":
                return json.dumps(_text(given, "value", path))
            case "json_schema":
                schema = given.get("json_schema")
                parsed = schema_of(schema if isinstance(schema, str) else json.dumps(schema))
                return self._rule(f"%json {on_one_line(parsed)}")
            case "regex":
                pattern = _text(given, "pattern", path)
                if not pattern:
                    raise ValueError(f"{path}.pattern is empty")
                escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
                return "/" + escaped.replace("\n", r"\n") + "/"
            case "sequence" | "or" as kind:
                elements = _list(given, "elements", path)
                ends = [last and (kind == "or" or index == len(elements)) for index in range(1, len(elements) + 1)]
                places = enumerate(zip(elements, ends, strict=True))
                inner = [self.expression(each, f"{path}.elements[{i}]", depth + 1, last=end) for i, (each, end) in places]
                return self._rule((" | " if kind == "or" else " ").join(inner))
            case "tag":
                return self._tag(given, path, depth, last=last)
            case "triggered_tags":
                return self._triggered_tags(given, path, depth, last=last)
            case "any_text":
                if not last:
                    raise ValueError(f"{path} is any_text, which something follows: the llama engine cannot tell where it ends")
                return self._rule(_ANY)
            case other:
                raise ValueError(f"{path}.type {json.dumps(other)} is not one of {', '.join(FORMATS)}")

    def _tag(self, given: Format, path: str, depth: int, *, last: bool, begin: str | None = None) -> str:
        """`begin`: the part that has not been generated yet; None: all of it."""
        begin = _text(given, "begin", path) if begin is None else begin
        end, content = _text(given, "end", path), given.get("content")
        opening, closing = (json.dumps(text) if text else "" for text in (begin, end))
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            inner = self._rule(f"{_ANY} {closing}", "[lazy]")
            return self._rule(f"{opening} {inner}".strip())
        inner = self.expression(content, f"{path}.content", depth + 1, last=last and not end)
        return self._rule(" ".join(filter(None, [opening, inner, closing])))

    def _triggered_tags(self, given: Format, path: str, depth: int, *, last: bool) -> str:
        triggers = [_text({"trigger": each}, "trigger", f"{path}.triggers") for each in _list(given, "triggers", path)]
        stops, once = _flag(given, "stop_after_first", path), _flag(given, "at_least_one", path)
        if not (last or stops):
            raise ValueError(f"{path} is triggered_tags, which something follows: set stop_after_first")
        by_trigger: dict[str, list[str]] = defaultdict(list)
        for index, tag in enumerate(_list(given, "tags", path)):
            where = f"{path}.tags[{index}]"
            if not isinstance(tag, dict):
                raise ValueError(f"{where} must be an object")
            begin = _text(tag, "begin", where)
            trigger = next((each for each in triggers if each and begin.startswith(each)), None)
            if trigger is None:
                raise ValueError(f"{where}.begin does not start with a trigger")
            by_trigger[trigger].append(self._tag(tag, where, depth + 1, last=False, begin=begin.removeprefix(trigger)))
        tags = [
            f"{self._rule(f'{_ANY} {json.dumps(trigger)}', '[lazy]')} ({' | '.join(bodies)})"
            for trigger, bodies in by_trigger.items()
        ]
        tag = self._rule(" | ".join(tags))
        if stops:
            return tag if once else self._rule(f"{tag} | {_ANY}")
        return self._rule(f"{tag}{'+' if once else '*'} {self._rule(_ANY)}")


def _text(given: Format, name: str, path: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{path}.{name} must be a string without NUL")
    return value


def _list(given: Format, name: str, path: str) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}.{name} must be a list that is not empty")
    return value


def _flag(given: Format, name: str, path: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{path}.{name} must be true or false")
    return value
