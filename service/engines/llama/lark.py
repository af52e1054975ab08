"""Structural tags as a Lark grammar, which llguidance compiles.

A structural tag is xgrammar's JSON: `{"type": "structural_tag", "format": {…}}`, of formats that hold others. Supported are
const_string, json_schema, regex, sequence, or, tag, triggered_tags and any_text. The last two have to be at the end of the
output, or any_text before the end of a tag. Others are refused by name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from service.strict_json import object_of, schema_of

Format = Mapping[str, Any]
DEPTH_MAX = 32
_ANY = r"/(.|\n)*/"


def lark_of(source: str, separators: Mapping[str, object]) -> str:
    """The grammar. `separators`: llguidance's options for JSON. Raises ValueError that names the format."""
    given = object_of(source)
    if given.get("type") != "structural_tag" or not isinstance(given.get("format"), dict):
        raise ValueError('must be {"type": "structural_tag", "format": {…}}')
    return _Grammar(separators).text(given["format"])


class _Grammar:
    def __init__(self, separators: Mapping[str, object]) -> None:
        self._separators = separators
        self._rules: list[str] = []
        self._kinds: Mapping[str, Callable[[Format, str, int, bool], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "regex": self._regex,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "any_text": self._any_text,
        }

    def text(self, given: Format) -> str:
        start = self._expression(given, "format", 0, True)
        return "\n".join([f"start: {start}", *self._rules, ""])

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _expression(self, given: object, path: str, depth: int, last: bool) -> str:
        """`last`: nothing follows it in the output."""
        if not isinstance(given, dict):
            raise ValueError(f"{path} must be an object")
        if depth > DEPTH_MAX:
            raise ValueError(f"{path} is nested deeper than {DEPTH_MAX} formats")
        make = self._kinds.get(str(given.get("type")))
        if make is None:
            raise ValueError(f"{path}.type {json.dumps(given.get('type'))} is not one of {', '.join(self._kinds)}")
        return make(given, path, depth, last)

    def _const_string(self, given: Format, path: str, depth: int, last: bool) -> str:
        return _quoted(_text(given, "value", path))

    def _json_schema(self, given: Format, path: str, depth: int, last: bool) -> str:
        schema = given.get("json_schema")
        parsed = schema_of(schema if isinstance(schema, str) else json.dumps(schema))
        return self._rule(f"%json {json.dumps({'x-guidance': dict(self._separators)} | parsed)}")

    def _regex(self, given: Format, path: str, depth: int, last: bool) -> str:
        pattern = _text(given, "pattern", path)
        if "\0" in pattern or not pattern:
            raise ValueError(f"{path}.pattern is empty or has a NUL character")
        escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
        return "/" + escaped.replace("\n", r"\n") + "/"

    def _sequence(self, given: Format, path: str, depth: int, last: bool) -> str:
        elements = _list(given, "elements", path)
        expressions = [
            self._expression(each, f"{path}.elements[{index}]", depth + 1, last and index == len(elements) - 1)
            for index, each in enumerate(elements)
        ]
        return self._rule(" ".join(expressions))

    def _or(self, given: Format, path: str, depth: int, last: bool) -> str:
        elements = enumerate(_list(given, "elements", path))
        return self._rule(
            " | ".join(self._expression(each, f"{path}.elements[{index}]", depth + 1, last) for index, each in elements)
        )

    def _any_text(self, given: Format, path: str, depth: int, last: bool) -> str:
        if not last:
            raise ValueError(f"{path} is any_text, which something follows: the llama engine cannot tell where it ends")
        return self._rule(_ANY)

    def _tag(self, given: Format, path: str, depth: int, last: bool, begin: str | None = None) -> str:
        """`begin`: the part that has not been generated yet; None: all of it."""
        begin = _text(given, "begin", path) if begin is None else begin
        end, content = _text(given, "end", path), given.get("content")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            inner = self._rule(f"{_ANY} {_quoted(end)}", "[lazy]")
            return self._rule(f"{_quoted(begin)} {inner}" if begin else inner)
        inner = self._expression(content, f"{path}.content", depth + 1, last and not end)
        return self._rule(" ".join(filter(None, [begin and _quoted(begin), inner, end and _quoted(end)])))

    def _triggered_tags(self, given: Format, path: str, depth: int, last: bool) -> str:
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
            by_trigger[trigger].append(self._tag(tag, where, depth + 1, False, begin.removeprefix(trigger)))
        tags = [
            f"{self._rule(f'{_ANY} {_quoted(trigger)}', '[lazy]')} ({' | '.join(bodies)})"
            for trigger, bodies in by_trigger.items()
        ]
        tag = self._rule(" | ".join(tags))
        if stops:
            return tag if once else self._rule(f"{tag} | {_ANY}")
        return self._rule(f"{tag}{'+' if once else '*'} {self._rule(_ANY)}")


def _quoted(text: str) -> str:
    return json.dumps(text)


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
