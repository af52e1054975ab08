"""Settings: a frozen dataclass, from flags and environment, checked once.

    @dataclass(frozen=True, slots=True)
    class Settings:
        queue_items: int = field(1024, "items that may wait for the engine", minimum=1)
        journal: Path = field(REQUIRED, "file of the journal")

    settings = load(Settings, "sidecar", sys.argv[1:], os.environ)

gives `--queue-items` and OSTINATO_SIDECAR_QUEUE_ITEMS; a flag wins over the environment, which wins over the default. Types:
str, int, float, bool (`--x`, `--no-x`), Path, tuple[str, ...] (comma separated), and each of them `| None` (an empty value is
None). Whatever is wrong stops the program with exit code 2 and names the flag or variable; nothing is ignored or clamped.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ostinato.serving.program import BAD_CONFIGURATION

REQUIRED: Any = dataclasses.MISSING
"""As a default: there is none."""

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_PASSWORD = re.compile(r"(?<=://)[^\s\"]*(?=@)|(?<=password=)[^&\s\"]*")
"""Of a URL: all before the host, since nobody can tell in what is not quite a URL where a name ends and a password begins."""
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP|SCTP)\w*)?$")


def field(
    default: T,
    help: str,  # noqa: A002  # the word everybody knows it by
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[object] | None = None,
    secret: bool = False,
) -> T:
    """One setting. Bounds are inclusive; a secret's value is never printed."""
    about = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "secret": secret}
    made: T = dataclasses.field(default=default, metadata=about, kw_only=True)
    return made


def load(cls: type[T], program: str, argv: Sequence[str], environ: Mapping[str, str]) -> T:
    """The settings of `program`. Raises SystemExit(2), after saying on stderr everything that is wrong."""
    options = list(_options(cls, program))
    flags = vars(_parser(program, options).parse_args(argv))
    problems = list(_unknown(program, options, environ))
    values: dict[str, object] = {}
    for option in options:
        try:
            values |= option.read(flags, environ)
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        try:
            return cls(**values)
        except ValueError as error:  # from __post_init__: a relation between settings
            problems.append(str(error))
    sys.stderr.writelines(f"{program}: {problem}\n" for problem in problems)
    raise SystemExit(BAD_CONFIGURATION)


def describe(settings: object) -> str:
    """All settings in one line, `key=value …`, for the log at start."""
    assert dataclasses.is_dataclass(settings)
    return " ".join(f"{f.name}={_shown(f, getattr(settings, f.name))}" for f in dataclasses.fields(settings))


@dataclasses.dataclass(frozen=True, slots=True)
class _Option:
    name: str
    variable: str
    kind: type
    optional: bool
    default: object
    about: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def read(self, flags: Mapping[str, str | bool | None], environ: Mapping[str, str]) -> Mapping[str, object]:
        """This setting by its name, or nothing where the default holds. Raises ValueError that says where what is wrong."""
        source, given = self.flag, flags[self.name]
        if given is None:
            source, given = self.variable, environ.get(self.variable)
        if given is None:
            if self.default is REQUIRED:
                raise ValueError(f"{self.flag} ({self.variable}): is required")
            return {}
        try:
            return {self.name: given if isinstance(given, bool) else self.parse(given)}
        except ValueError as error:
            shown = "" if self.about["secret"] else f"{given!r} "
            raise ValueError(f"{source}: {shown}{error}") from None

    def parse(self, text: str) -> object:
        """The value, within its bounds."""
        if self.optional and not text:
            return None
        value = _convert(self.kind, text)
        low, high, choices = self.about["minimum"], self.about["maximum"], self.about["choices"]
        if choices is not None and value not in choices:
            raise ValueError(f"is not {self.bounds}")
        if isinstance(value, int | float) and ((low is not None and value < low) or (high is not None and value > high)):
            raise ValueError(f"is not {self.bounds}")
        return value

    @property
    def bounds(self) -> str:
        low, high, choices = self.about["minimum"], self.about["maximum"], self.about["choices"]
        if choices is not None:
            return "one of " + ", ".join(map(str, choices))
        if low is None:
            return "" if high is None else f"at most {high}"
        return f"at least {low}" if high is None else f"{low} to {high}"

    @property
    def help(self) -> str:
        default = "required" if self.default is REQUIRED else f"default {_plain(self.default)}"
        parts = [part for part in (self.variable, default, self.bounds) if part]
        return f"{self.about['help']} [{'; '.join(parts)}]".replace("%", "%%")


def _options(cls: type, program: str) -> Iterator[_Option]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind, optional = hints[f.name], False
        if types.NoneType in typing.get_args(kind):
            kind, optional = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType), True
        variable = f"{_prefix(program)}{f.name.upper()}"
        yield _Option(f.name, variable, typing.get_origin(kind) or kind, optional, f.default, f.metadata)


def _parser(program: str, options: Sequence[_Option]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, usage=f"python -m {program} [setting ...]", allow_abbrev=False)
    for option in options:
        if option.kind is bool:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        else:
            metavar = "LIST" if option.kind is tuple else option.kind.__name__.upper()
            parser.add_argument(option.flag, metavar=metavar, help=option.help)
    return parser


def _unknown(program: str, options: Sequence[_Option], environ: Mapping[str, str]) -> Iterator[str]:
    prefix, known = _prefix(program), {option.variable for option in options}
    for variable in sorted(name for name in environ if name.startswith(prefix) and name not in known):
        names = [option.name.upper() for option in options]
        near = difflib.get_close_matches(variable.removeprefix(prefix), names)
        hint = f"; did you mean {' or '.join(prefix + name for name in near)}?" if near else ""
        if _SERVICE_LINK.search(variable):
            hint = "; if Kubernetes set it for a Service of that name, turn enableServiceLinks off in the Pod"
        yield f"{variable}: names no setting{hint}"


def _prefix(program: str) -> str:
    return f"OSTINATO_{program.upper().replace('-', '_')}_"


def _convert(kind: type, text: str) -> object:
    if kind is bool:
        if text.lower() not in _WORDS:
            raise ValueError("is neither true nor false")
        return _WORDS[text.lower()]
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"is no {kind.__name__}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not finite")
    return value


def _shown(f: dataclasses.Field[object], value: object) -> str:
    return "***" if f.metadata.get("secret") else _PASSWORD.sub("***", _plain(value))


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return text if re.fullmatch(r"[\w.:/@+,-]+", text, re.ASCII) else json.dumps(text)
