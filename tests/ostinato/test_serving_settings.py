"""Settings: where they come from, and what stops the program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostinato.serving.settings import REQUIRED, describe, field, load


@dataclass(frozen=True, slots=True)
class Settings:
    """One of each type."""

    journal: Path = field(REQUIRED, "file of the journal")
    queue_items: int = field(1024, "items that may wait", minimum=1, maximum=2**64 - 1)
    grace_seconds: float = field(10.0, "how long a stop waits", minimum=0)
    audit: bool = field(True, "whether to audit 100% of it")
    log_format: str = field("human", "form of the log", choices=("human", "json"))
    listen: tuple[str, ...] = field(("127.0.0.1:7001",), "addresses")
    writer: str | None = field(None, "name of this writer")
    share: float | None = field(None, "share to audit", minimum=0, maximum=1)
    token: str = field("", "what to show at the door", secret=True)
    limit: int = field(7, "a secret number", maximum=9, secret=True)

    def __post_init__(self) -> None:
        if self.audit and self.queue_items == 13:
            raise ValueError("queue_items cannot be 13 with audit")


def settings(*argv: str, **environ: str) -> Settings:
    """Settings with the one that is required."""
    return load(
        Settings, "sidecar", ["--journal=j", *argv], {f"OSTINATO_SIDECAR_{key}": value for key, value in environ.items()}
    )


def refusal(
    capsys: pytest.CaptureFixture[str], argv: Sequence[str] = (), environ: Mapping[str, str] = {}, *, journal: bool = True
) -> str:
    """What is said on stderr when these settings stop the program with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        load(Settings, "sidecar", [*(["--journal=j"] if journal else []), *argv], environ)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_where_nothing_is_said() -> None:
    """Without flags and variables every setting has its default."""
    assert settings() == Settings(journal=Path("j"))


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    """Flag, environment, default: in this order."""
    assert settings("--queue-items=5", QUEUE_ITEMS="6").queue_items == 5
    assert settings(QUEUE_ITEMS="6").queue_items == 6


def test_every_type_is_read_from_flags() -> None:
    """Numbers, texts, paths, lists, booleans and optional values come out as what they are declared to be."""
    got = settings(
        *("--queue-items", "18446744073709551615", "--grace-seconds", "0.5", "--no-audit", "--log-format", "json"),
        *("--listen", "127.0.0.1:1, unix:/s", "--writer", "w", "--share", "1", "--token", "t"),
    )

    assert got == Settings(
        journal=Path("j"),
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


def test_an_empty_value_is_none_where_none_may_be() -> None:
    """A manifest can switch an optional setting off, in the environment and by flag."""
    assert settings(WRITER="", SHARE="").writer is None
    assert settings("--share=", SHARE="0.5").share is None


@pytest.mark.parametrize(
    "value",
    ["nan", "inf", "-inf", "1e999", "-0.1", "ten", ""],
)
def test_a_number_that_is_none_or_out_of_bounds_stops_the_program(capsys: pytest.CaptureFixture[str], value: str) -> None:
    """NaN compares with nothing and infinity waits for ever, so both are refused like any other bad number."""
    assert "--grace-seconds" in refusal(capsys, [f"--grace-seconds={value}"])
    assert "OSTINATO_SIDECAR_GRACE_SECONDS" in refusal(capsys, [], {"OSTINATO_SIDECAR_GRACE_SECONDS": value})


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--queue-items=0", "1 to 18446744073709551615"),
        ("--queue-items=18446744073709551616", "1 to 18446744073709551615"),
        ("--queue-items=1.5", "no int"),
        ("--log-format=xml", "human, json"),
        ("--queue-items=13", "cannot be 13 with audit"),
        ("--que=5", "--que"),
        ("--nothing=5", "--nothing"),
    ],
)
def test_a_bad_flag_is_named(capsys: pytest.CaptureFixture[str], flag: str, words: str) -> None:
    """The message names what is wrong and what would be right; flags are never abbreviated."""
    assert words in refusal(capsys, [flag])


def test_a_required_setting_is_asked_for_under_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever left it out learns the flag and the variable."""
    message = refusal(capsys, journal=False)

    assert "--journal" in message
    assert "OSTINATO_SIDECAR_JOURNAL" in message


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
    assert "file of the journal [OSTINATO_SIDECAR_JOURNAL; required]" in text
    assert "--no-audit whether to audit 100% of it" in text


def test_a_secret_is_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A secret's value is neither in the line at start nor in a complaint about it."""
    assert "token=***" in describe(settings("--token=tiger"))
    assert "1234" not in refusal(capsys, ["--limit=1234"])


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
        "share=none token=*** limit=***"
    )


def test_settings_do_not_change() -> None:
    """What was printed at start is what holds until the end."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().queue_items = 5  # type: ignore[misc]
