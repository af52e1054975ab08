"""Settings: where they come from, and what stops the program."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.settings import describe, field, lookup, read


@dataclass(frozen=True, slots=True)
class Settings:
    """One of each type."""

    journal: Path = field(Path("j"), "file of the journal")
    queue_items: int = field(1024, "items that may wait", minimum=1, maximum=2**64 - 1)
    grace_seconds: float = field(10.0, "how long a stop waits", minimum=0)
    audit: bool = field(True, "whether to audit 100% of it")
    log_format: str = field("human", "form of the log", choices=("human", "json"))
    listen: tuple[str, ...] = field(("127.0.0.1:7001",), "addresses")
    writer: str | None = field(None, "name of this writer")
    share: float | None = field(None, "share to audit", minimum=0, maximum=1)
    token: str = field("", "may have a secret in it", shown=lambda _: "hidden")
    limit: int = field(7, "a number", maximum=9)

    def __post_init__(self) -> None:
        if self.audit and self.queue_items == 13:
            raise ValueError("queue_items cannot be 13 with audit")


def settings(*argv: str, **environ: str) -> Settings:
    """The settings by these flags, and variables without their prefix."""
    return read(Settings, "sidecar", argv, {f"OSTINATO_SIDECAR_{key}": value for key, value in environ.items()})[0]


def refusal(capsys: pytest.CaptureFixture[str], argv: Sequence[str] = (), environ: Mapping[str, str] = {}) -> str:
    """What is said on stderr when these settings stop the program with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        read(Settings, "sidecar", argv, environ)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_where_nothing_is_said() -> None:
    """Without flags and variables every setting has its default."""
    assert settings() == Settings()


def test_every_type_is_read_from_flags() -> None:
    """Numbers, texts, paths, lists, booleans and optional values come out as what they are declared to be."""
    got = settings(
        *("--queue-items", "18446744073709551615", "--grace-seconds", "0.5", "--no-audit", "--log-format", "json"),
        *("--listen", "127.0.0.1:1, unix:/s", "--writer", "w", "--share", "1", "--token", "t"),
    )

    assert got == Settings(
        queue_items=2**64 - 1,
        grace_seconds=0.5,
        audit=False,
        log_format="json",
        listen=("127.0.0.1:1", "unix:/s"),
        writer="w",
        share=1.0,
        token="t",
    )


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("Yes", True), ("off", False), ("0", False)])
def test_a_boolean_in_the_environment_is_a_word(text: str, value: bool) -> None:
    """The usual words for true and false are read."""
    assert settings(AUDIT=text).audit is value


def test_a_choice_is_read_in_either_case() -> None:
    """Both programs take --log-level=debug and DEBUG, whichever of them they list."""
    assert settings("--log-format=JSON").log_format == "json"


def test_an_empty_value_is_none_where_none_may_be() -> None:
    """A manifest can switch an optional setting off, in the environment and by flag."""
    assert settings(WRITER="", SHARE="").writer is None
    assert settings("--share=", SHARE="0.5").share is None


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "-0.1", "ten", "", "1e300", "316224001"])
def test_a_number_that_is_none_or_out_of_bounds_stops_the_program(capsys: pytest.CaptureFixture[str], value: str) -> None:
    """NaN compares with nothing, and infinity or a thousand years never end: they are refused like any other bad number."""
    assert "--grace-seconds" in refusal(capsys, [f"--grace-seconds={value}"])
    assert "OSTINATO_SIDECAR_GRACE_SECONDS" in refusal(capsys, [], {"OSTINATO_SIDECAR_GRACE_SECONDS": value})


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--queue-items=0", "1 to 18446744073709551615"),
        ("--queue-items=18446744073709551616", "1 to 18446744073709551615"),
        ("--queue-items=1.5", "is not a whole number"),
        ("--log-format=xml", "human, json"),
        ("--writer=a\x07b", "has the control character U+0007"),
        ("--queue-items=13", "cannot be 13 with audit"),
        ("--que=5", "--que"),
        ("--nothing=5", "--nothing"),
    ],
)
def test_a_bad_flag_is_named(capsys: pytest.CaptureFixture[str], flag: str, words: str) -> None:
    """The message names what is wrong and what would be right; flags are never abbreviated."""
    assert words in refusal(capsys, [flag])


def test_a_variable_that_names_no_setting_stops_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt variable is not a default in disguise; the nearest names are offered. Other programs' variables are theirs."""
    message = refusal(capsys, [], {"OSTINATO_SIDECAR_QUEUE_ITEM": "5", "OSTINATO_SERVICE_QUEUE_ITEMS": "5"})

    assert "OSTINATO_SIDECAR_QUEUE_ITEM: names no setting; did you mean OSTINATO_SIDECAR_QUEUE_ITEMS?" in message
    assert "OSTINATO_SERVICE" not in message


def test_a_variable_of_kubernetes_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Kubernetes sets variables for every Service; one named like our program would puzzle without a hint."""
    assert "enableServiceLinks" in refusal(capsys, [], {"OSTINATO_SIDECAR_PORT_7000_TCP_ADDR": "10.0.0.1"})


def test_everything_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Three mistakes are three lines, not three attempts."""
    message = refusal(capsys, ["--queue-items=0"], {"OSTINATO_SIDECAR_AUDIT": "maybe", "OSTINATO_SIDECAR_X": ""})

    assert len(message.splitlines()) == 3


def test_help_shows_variable_default_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    """--help is the whole reference: every flag with its variable, default and bounds."""
    with pytest.raises(SystemExit) as stopped:
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())

    assert stopped.value.code == 0
    assert "items that may wait [OSTINATO_SIDECAR_QUEUE_ITEMS; default 1024; 1 to 18446744073709551615]" in text
    assert "file of the journal [OSTINATO_SIDECAR_JOURNAL; default j]" in text
    assert "--no-audit whether to audit 100% of it" in text


@pytest.mark.parametrize(
    "name", ["postgresql://me:tiger@h/db", "postgresql://me:ti@g/er@h/db", "postgresql://h/db?password=tiger&x=1"]
)
def test_a_password_in_a_url_is_never_shown(name: str) -> None:
    """Of a URL the line at start shows the server, and neither who connects nor how."""
    line = describe(settings(f"--writer={name}"))

    assert "writer=" in line and "h/db" in line
    assert "ti" not in re.sub(r"items|writer", "", line)


def test_the_line_at_start_is_one_line() -> None:
    """All settings fit one line of key=value, whatever a value contains."""
    line = describe(settings("--writer=a b\nc"))

    assert line == (
        'journal=j queue_items=1024 grace_seconds=10.0 audit=true log_format=human listen=127.0.0.1:7001 writer="a b\\nc" '
        "share=none token=hidden limit=7"
    )


# A settings file.

File = Callable[[str], Path]


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> File:
    def write(text: str) -> Path:
        path = tmp_path / "ostinato.toml"
        path.write_text(text)
        return path

    return write


ALL = """
[service]
anything = "is the service's to judge"

[sidecar]
queue_items = 18446744073709551615
grace_seconds = 1
audit = false
log_format = "json"
listen = ["127.0.0.1:1", "unix:/s"]
writer = ""
share = 0.5
token = "t"
"""


def test_every_type_is_read_from_a_file(file: File) -> None:
    """TOML's own types are the settings' types; a whole number may be a number, and an empty text is none where none may be."""
    got = settings(f"--config={file(ALL)}")

    assert got == Settings(
        queue_items=2**64 - 1,
        grace_seconds=1.0,
        audit=False,
        log_format="json",
        listen=("127.0.0.1:1", "unix:/s"),
        share=0.5,
        token="t",
    )
    assert type(got.grace_seconds) is float


def test_flag_and_environment_win_over_the_file(file: File) -> None:
    """Flag, environment, file, default: in this order. The file itself may be named by flag or environment, likewise."""
    path = str(file("[sidecar]\nqueue_items = 7\ngrace_seconds = 7\nlimit = 7\n"))

    got = settings("--queue-items=5", CONFIG=path, QUEUE_ITEMS="6", GRACE_SECONDS="6")
    assert (got.queue_items, got.grace_seconds, got.limit) == (5, 6.0, 7)
    assert settings(f"--config={path}", CONFIG="/nowhere").queue_items == 7
    assert settings("--config=", CONFIG=path).queue_items == 1024
    assert settings(CONFIG="").queue_items == 1024


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sidecar]\nqueue_item = 1", "[sidecar] queue_item: names no setting; did you mean queue_items?"),
        ("[sidecar]\nqueue-items = 1", "[sidecar] queue-items: names no setting; did you mean queue_items?"),
        ("[sidecar]\nconfig = 'x'", "[sidecar] config: names no setting"),
        ("[sidecra]\nqueue_items = 1", "[sidecra]: names no table; did you mean sidecar?; there are [service] and [sidecar]"),
        ("[[sidecars]]", "[sidecars]: names no table"),
        ("queue_items = 1", "queue_items: is not in a table; there are [service] and [sidecar]"),
        ("sidecar = 1", "sidecar: is not in a table"),
        ("service = 1", "service: is not in a table"),
        ("[sidecar]\nqueue_items = '1'", "[sidecar] queue_items: '1' is not a whole number"),
        ("[sidecar]\nqueue_items = true", "[sidecar] queue_items: true is not a whole number"),
        ("[sidecar]\nqueue_items = 1.0", "[sidecar] queue_items: 1.0 is not a whole number"),
        ("[sidecar]\ngrace_seconds = inf", "[sidecar] grace_seconds: inf is not finite"),
        ("[sidecar]\ngrace_seconds = 1" + 400 * "0", " is not finite"),
        ("[sidecar]\ngrace_seconds = false", "[sidecar] grace_seconds: false is not a number"),
        ("[sidecar]\naudit = 1", "[sidecar] audit: 1 is not true or false"),
        ("[sidecar]\nlisten = 'unix:/s'", "[sidecar] listen: 'unix:/s' is not an array of strings"),
        ("[sidecar]\nlisten = [7001]", '[sidecar] listen: "[7001]" is not an array of strings'),
        ("[sidecar]\njournal = 1979-05-27", "[sidecar] journal: 1979-05-27 is not a string"),
        ("[sidecar]\nwriter = {a = 1}", "[sidecar] writer: "),
        ("[sidecar]\nqueue_items = 13", "queue_items cannot be 13 with audit"),
        ("[sidecar\n", "--config: {path}: is not TOML: "),
        ("[sidecar]\nlimit = 1\nlimit = 2", "--config: {path}: is not TOML: "),
        ("a = " + 2000 * "[", "--config: {path}: is not TOML: "),
    ],
)
def test_a_bad_file_is_named(file: File, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    """Whatever is wrong in a file is one line that names the file, the table and the key, and what would be right."""
    path = file(text)
    message = refusal(capsys, [f"--config={path}"])

    assert words.replace("{path}", str(path)) in message
    assert len(message.splitlines()) == 1
    assert str(path) in message or "cannot be 13" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file, a folder and bytes that are no text are named with the flag or variable that names them."""
    (tmp_path / "bytes").write_bytes(b"\xff")

    assert refusal(capsys, ["--config=/nowhere"]) == "sidecar: --config: /nowhere: No such file or directory\n"
    assert refusal(capsys, [], {"OSTINATO_SIDECAR_CONFIG": str(tmp_path)}).startswith(
        f"sidecar: OSTINATO_SIDECAR_CONFIG: {tmp_path}: Is a directory"
    )
    assert "bytes: is no UTF-8 text" in refusal(capsys, [f"--config={tmp_path}/bytes"])


def test_a_secret_in_a_file_is_never_shown(file: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a text that may hold a secret nor a password in a URL is quoted in a complaint about it."""
    for text in ("[sidecar]\ntoken = ['tiger']", "[sidecar]\nlog_format = 'x://me:tiger@h'"):
        message = refusal(capsys, [f"--config={file(text)}"])

        assert "[sidecar]" in message and "tiger" not in message


def test_the_line_at_start_says_where_settings_come_from(file: File) -> None:
    """Behind the settings stand those that are not left to their defaults, by where they come from."""
    path = file("[sidecar]\nqueue_items = 7\ngrace_seconds = 7\n")
    argv, environ = ["--journal=j", f"--config={path}", "--no-audit"], {"OSTINATO_SIDECAR_GRACE_SECONDS": "1"}
    line = describe(*read(Settings, "sidecar", argv, environ))

    assert line.endswith(f"; from flags: journal, audit; from {path}: queue_items; from environment: grace_seconds")


def test_a_command_looks_up_one_setting(file: File) -> None:
    """What stands beside a program reads single settings, whatever else is wrong."""
    path = file("[sidecar]\nqueue_items = 7\nodd = 1\nlimit = 99\n")

    assert lookup(Settings, "sidecar", "queue_items", {}, str(path)) == 7
    assert lookup(Settings, "sidecar", "queue_items", {"OSTINATO_SIDECAR_QUEUE_ITEMS": "6"}, str(path)) == 6
    assert lookup(Settings, "sidecar", "writer", {}) is None
    with pytest.raises(ValueError, match="limit: 99 is not at most 9"):
        lookup(Settings, "sidecar", "limit", {}, str(path))
    with pytest.raises(ValueError, match="/nowhere: No such file"):
        lookup(Settings, "sidecar", "queue_items", {}, "/nowhere")


# How it is said.


def test_a_misspelt_flag_is_named_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown flag is one line, and its value no further one."""
    assert refusal(capsys, ["--queue-item", "5"]) == "sidecar: --queue-item: names no setting; did you mean --queue-items?\n"
    assert refusal(capsys, ["--confg=x"]) == "sidecar: --confg: names no setting; did you mean --config?\n"
    assert refusal(capsys, ["5"]) == "sidecar: '5': is no flag\n"
    assert "ger" not in refusal(capsys, ["--writer", "postgresql://me:Ti", "ger@h/x"])
    assert refusal(capsys, ["--audit=maybe"]).startswith("sidecar: --audit/--no-audit: ")
    assert refusal(capsys, ["--writer"]) == "sidecar: --writer: expected one argument\n"


@pytest.mark.parametrize("where", ["flag", "variable", "file"])
def test_a_refusal_is_a_record_where_the_log_is_json(where: str, file: File, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever --log-format json stands, what is wrong is a JSON record of level CRITICAL with the exit code."""
    argv = ["--queue-items=0"]
    environ = {}
    match where:
        case "flag":
            argv.append("--log-format=json")
        case "variable":
            environ["OSTINATO_SIDECAR_LOG_FORMAT"] = "json"
        case _:
            text = "[sidecar]\nlog_format = 'json'"
            argv.append(f"--config={file(text)}")
    record = json.loads(refusal(capsys, argv, environ))

    assert (record["level"], record["logger"], record["exit_code"]) == ("CRITICAL", "sidecar", 2)
    assert record["message"] == "--queue-items: '0' is not 1 to 18446744073709551615"


def test_the_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the program's name and the version that pyproject.toml has."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    with pytest.raises(SystemExit, match="0"):
        settings("--version")

    assert capsys.readouterr().out == f"ostinato-sidecar {project['version']}\n"
