"""Settings: a frozen dataclass, from flags, environment and a file, checked once.

    @dataclass(frozen=True, slots=True)
    class Settings:
        queue_items: int = field(1024, "items that may wait for the engine", minimum=1)
        journal: Path = field(Path("journal"), "file of the journal")

    settings, sources = read(Settings, "sidecar", sys.argv[1:], os.environ)

gives `--queue-items`, OSTINATO_SIDECAR_QUEUE_ITEMS, and `queue_items` in the table [sidecar] of the TOML file that `--config`
or OSTINATO_SIDECAR_CONFIG names. A flag wins over the environment, which wins over the file, which wins over the default.
Types: str, int, float, bool (`--x`, `--no-x`), Path, tuple[str, ...] (comma separated; an array in the file), and each of them
`| None` (an empty value is None). Anything wrong stops the program with exit code 2, and the message names the flag, the
variable, or the file, table and key. Nothing is ignored or clamped.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ostinato import __version__
from serving.logs import report_failure
from serving.program import BAD_CONFIGURATION

TABLES = ("service", "sidecar")
"""Of a settings file. A program checks its own."""
_TABLES = " and ".join(f"[{table}]" for table in TABLES)

MAXIMA = {
    "_seconds": (10 * 366 * 86_400, "ten years"),
    "_bytes": (1 << 50, "a pebibyte"),
    "_bytes_max": (1 << 50, "a pebibyte"),
    "": (2**63 - 1, "the largest number"),
}
"""Of a setting whose name ends so and that has no maximum of its own."""

CONFIG = "config"
"""The name of the settings file among flags and variables. It is not a setting."""

T = TypeVar("T")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_IN_TOML: Mapping[type, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a string"),
    Path: ((str,), "a string"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    tuple: ((list,), "an array of strings"),
}
"""What a setting of each type may be in a file."""
_PASSWORD = re.compile(r"(?<=://)[^\s\"]*(?=@)|(?<=password=)[^&\s\"]*")
"""Of a URL: all before the host. In a malformed URL it is not certain where the name ends and the password begins."""
_NAMES_DATABASE = re.compile("password|://", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""In a text; tabs and newlines may be there: a setting may be JSON."""
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP|SCTP)\w*)?$")


def field(
    default: T,
    help: str,  # noqa: A002  # the usual word
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[object] | None = None,
    shown: Callable[[str], str] | None = None,
    applies: str = "",
) -> T:
    """One setting. Bounds are inclusive. `shown`: what is printed for a text that may have a secret in it. `applies`: the
    default in words, for --help, where `default` does not say it."""
    about = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "shown": shown, "applies": applies}
    made: T = dataclasses.field(default=default, metadata=about, kw_only=True)
    return made


@dataclasses.dataclass(frozen=True)  # without slots: settings may have other bases too
class Common:
    """The settings that both programs have."""

    tls_certificate: Path | None = field(None, "PEM file of the certificate chain, for TCP addresses")
    tls_key: Path | None = field(None, "PEM file of its private key")
    tls_client_ca: Path | None = field(None, "PEM file of CAs; client certificates are then required")
    traces: str = field("", "where spans are exported to, otlp:http://host:4318; empty: as OTEL_… variables say, or nowhere")
    log_format: str = field("human", "format of the log", choices=("human", "json"))
    log_level: str = field("info", "least severe level that is logged", choices=("debug", "info", "warning", "error"))
    drain_seconds: float = field(30.0, "time to finish what was admitted, after SIGTERM", minimum=0.0)


def read(cls: type[T], program: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[T, Mapping[str, str]]:
    """The settings of `program`, and the origin of each that is not its default: "flags", "environment" or the file. Raises
    SystemExit(2) after printing everything that is wrong on stderr."""
    options = list(options_of(cls, program))
    flags, problems = _flags(program, options, argv)
    problems += _unknown(program, options, environ)
    file = _File.of(program, flags, environ)
    problems += file.problems(options)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for option in options:
        try:
            if (found := option.find(flags, environ, file)) is not None:
                values[option.name], sources[option.name] = found
        except ValueError as error:
            problems.append(str(error))
    if not problems:
        try:
            return cls(**values), sources
        except ValueError as error:  # from __post_init__: a relation between settings
            problems.append(str(error))
    for problem in problems:
        report_failure(program, problem, BAD_CONFIGURATION, form=str(values.get("log_format", "")))
    raise SystemExit(BAD_CONFIGURATION)


def lookup(cls: type, program: str, name: str, environ: Mapping[str, str], config: str | None = None) -> Any:
    """One setting from environment and file, or its default, for commands beside the program; other settings may be wrong.
    `config`: the file, where the environment does not name it. Raises ValueError."""
    file = _File.of(program, {CONFIG: config}, environ)
    if file.unusable:
        raise ValueError(file.unusable)
    option = next(option for option in options_of(cls, program) if option.name == name)
    found = option.find({}, environ, file)
    return option.default if found is None else found[0]


def describe(settings: object, sources: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """All settings in one line, `key=value …`, and after them their origins, for the log at start."""
    line = " ".join(f"{f.name}={_shown(f, getattr(settings, f.name))}" for f in _fields(type(settings)))
    origins = dict.fromkeys(sources.values())
    return line + "".join(f"; from {origin}: {', '.join(n for n, o in sources.items() if o == origin)}" for origin in origins)


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A settings file."""

    path: str = ""
    program: str = ""
    document: Mapping[str, object] = dataclasses.field(default_factory=dict)
    unusable: str = ""
    """Why there is no document, with the flag or variable that names the file."""

    @classmethod
    def of(cls, program: str, flags: Mapping[str, Any], environ: Mapping[str, str]) -> _File:
        variable = f"{_prefix(program)}{CONFIG.upper()}"
        source, path = f"--{CONFIG}", flags.get(CONFIG)
        if path is None:
            source, path = variable, environ.get(variable)
        if not path:
            return cls()
        try:
            return cls(path, program, tomllib.loads(Path(path).read_text("utf-8")))
        except OSError as error:
            why = error.strerror or str(error)
        except UnicodeDecodeError:
            why = "is no UTF-8 text"
        except (ValueError, RecursionError) as error:
            why = f"is not TOML: {error}"
        return cls(path, program, unusable=f"{source}: {path}: {why}")

    @property
    def table(self) -> Mapping[str, object]:
        found = self.document.get(self.program)
        return found if isinstance(found, dict) else {}

    def where(self, key: str) -> str:
        return f"{self.path}: [{self.program}] {key}"

    def problems(self, options: Iterable[Option]) -> Iterator[str]:
        if self.unusable:
            yield self.unusable
        for name, found in self.document.items():
            if name not in TABLES and isinstance(found, dict | list):
                yield f"{self.path}: [{name}]: names no table{_near(name, TABLES)}; there are {_TABLES}"
            elif not isinstance(found, dict):
                yield f"{self.path}: {name}: is not in a table; there are {_TABLES}"
        names = [option.name for option in options]
        for key in self.table:
            if key not in names:
                yield f"{self.where(key)}: names no setting{_near(key, names)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A setting, as it is declared."""

    name: str
    variable: str
    kind: type
    optional: bool
    default: object
    about: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def find(self, flags: Mapping[str, Any], environ: Mapping[str, str], file: _File) -> tuple[object, str] | None:
        """The value and its origin; None: the default applies. Raises ValueError that names the place."""
        places: Sequence[tuple[Any, str, str, Callable[[Any], object]]] = (
            (flags.get(self.name), self.flag, "flags", self.parse),
            (environ.get(self.variable), self.variable, "environment", self.parse),
            (file.table.get(self.name), file.where(self.name), file.path, self.typed),
        )
        for given, where, origin, value_of in places:
            if given is None:
                continue
            try:
                return value_of(given), origin
            except ValueError as error:
                shown = "" if self.about["shown"] else f"{_quoted(given)} "
                raise ValueError(f"{where}: {shown}{error}") from None
        return None

    def parse(self, given: str | bool) -> object:
        """The value of a flag or a variable, within its bounds."""
        if isinstance(given, bool) or (self.optional and not given):
            return given if isinstance(given, bool) else None
        return self.bounded(_convert(self.kind, given))

    def typed(self, given: object) -> object:
        """The value from a file, within its bounds."""
        if self.optional and given == "":
            return None
        allowed, what = _IN_TOML[self.kind]
        if type(given) not in allowed or (isinstance(given, list) and not all(isinstance(each, str) for each in given)):
            raise ValueError(f"is not {what}")
        try:
            return self.bounded(self.kind(given))
        except OverflowError:
            raise ValueError("is not finite") from None

    def bounded(self, value: object) -> object:
        """The value. Raises ValueError for one out of bounds."""
        low, high, choices = self.about["minimum"], self.about["maximum"], self.about["choices"]
        if choices is not None:
            chosen = [choice for choice in choices if str(choice).lower() == str(value).lower()]
            if not chosen:
                raise ValueError(f"is not {self.bounds}")
            return chosen[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("is not finite")
        if isinstance(value, int | float) and ((low is not None and value < low) or (high is not None and value > high)):
            raise ValueError(f"is not {self.bounds}")
        if high is None and isinstance(value, int | float):
            most, what = next((most for unit, most in MAXIMA.items() if self.name.endswith(unit)))
            if abs(value) > most:
                raise ValueError(f"is above {what}, {most}")
        if isinstance(value, str) and (bad := _CONTROL.search(value)):
            raise ValueError(f"has the control character U+{ord(bad.group()):04X}")
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
    def applies(self) -> str:
        """The default, as --help has it."""
        return str(self.about["applies"] or plain(self.default))

    @property
    def help(self) -> str:
        parts = [part for part in (self.variable, f"default {self.applies}", self.bounds) if part]
        return f"{self.about['help']} [{'; '.join(parts)}]".replace("%", "%%")


def _fields(cls: type) -> Sequence[dataclasses.Field[object]]:
    """Those that it declares, in this order, and then those that it inherits."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)


def options_of(cls: type, program: str) -> Iterator[Option]:
    """The settings that are declared there, in this order; those that are inherited come last."""
    hints = typing.get_type_hints(cls)
    for f in _fields(cls):
        kind, optional = hints[f.name], False
        if types.NoneType in typing.get_args(kind):
            kind, optional = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType), True
        variable = f"{_prefix(program)}{f.name.upper()}"
        yield Option(f.name, variable, typing.get_origin(kind) or kind, optional, f.default, f.metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ValueError: all faults are reported together."""
        raise ValueError(message.removeprefix("argument "))


def _parser(program: str, options: Sequence[Option]) -> argparse.ArgumentParser:
    parser = _Parser(prog=program, usage=f"python -m {program} [setting ...]", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ostinato-{program} {__version__}")
    about = f"TOML file of settings, named as their flags with _ for -, in {_TABLES}"
    variable = f"{_prefix(program)}{CONFIG.upper()}"
    parser.add_argument(f"--{CONFIG}", metavar="FILE", help=f"{about} [{variable}; default none]")
    for option in options:
        if option.kind is bool:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        else:
            metavar = "LIST" if option.kind is tuple else option.kind.__name__.upper()
            parser.add_argument(option.flag, metavar=metavar, help=option.help)
    return parser


def _flags(program: str, options: Sequence[Option], argv: Sequence[str]) -> tuple[Mapping[str, Any], list[str]]:
    """The flags that can be read, by setting, and what is wrong with the others."""
    given = argparse.Namespace()
    try:
        _, strays = _parser(program, options).parse_known_args(argv, given)
    except ValueError as error:
        return vars(given), [str(error)]
    names = [f"--{CONFIG}", *(option.flag for option in options)]
    hidden = "***" if _NAMES_DATABASE.search(" ".join(argv)) else ""  # words of a database's name, which was not in quotes
    problems, value_may_follow = [], False
    for stray in strays:
        if stray.startswith("-"):
            flag = stray.partition("=")[0]
            problems.append(f"{flag}: names no setting{_near(flag, names)}")
        elif not value_may_follow:
            problems.append(f"{hidden or _quoted(stray)}: is no flag")
        value_may_follow = stray.startswith("-") and "=" not in stray
    return vars(given), problems


def _unknown(program: str, options: Sequence[Option], environ: Mapping[str, str]) -> Iterator[str]:
    prefix = _prefix(program)
    names = [CONFIG.upper(), *(option.name.upper() for option in options)]
    known = {prefix + name for name in names}
    for variable in sorted(name for name in environ if name.startswith(prefix) and name not in known):
        hint = _near(variable.removeprefix(prefix), names, prefix)
        if _SERVICE_LINK.search(variable):
            hint = "; if Kubernetes set it for a Service of that name, turn enableServiceLinks off in the Pod"
        yield f"{variable}: names no setting{hint}"


def _near(name: str, names: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(prefix + each for each in near)}?" if near else ""


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
        return kind(text)
    except ValueError:
        raise ValueError(f"is not {_IN_TOML[kind][1]}") from None


def _shown(f: dataclasses.Field[object], value: object) -> str:
    shown = f.metadata.get("shown")
    return _PASSWORD.sub("***", plain(shown(str(value)) if shown is not None else value))


def _quoted(value: object) -> str:
    return _PASSWORD.sub("***", repr(value) if isinstance(value, str) else plain(value))


def plain(value: object) -> str:
    """A value, as the log and --help print it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return text if re.fullmatch(r"[\w.:/@+,-]+", text, re.ASCII) else json.dumps(text)
