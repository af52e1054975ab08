"""The sidecar's settings, looked at closely."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.settings import describe, options_of, read

from sidecar import commands
from sidecar.config import Settings, shown


def settings(*argv: str) -> Settings:
    return read(Settings, "sidecar", argv, {})[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--listen="], "--listen: needs at least one address"),
        (["--journal="], "--journal: needs a file, or the URL of a database"),
        (["--engine="], "--engine: '' is no address: unix:path or host:port"),
        (["--engine=127.0.0.1:7002"], "--engine: 127.0.0.1:7002: there both programs must prove themselves"),
        (["--engine=unix-abstract:e"], "--engine: unix-abstract:e: there both programs must prove themselves"),
        (["--engine-ca=a"], "--engine-ca, --engine-certificate, --engine-key: none of them goes without the others"),
        (["--engine-ca=a", "--engine-certificate=a", "--engine-key=a"], "--engine-ca is for a TCP address of the service"),
        (["--engine=nonsense"], "--engine: 'nonsense' is no address: unix:path or host:port"),
        (["--engine=unix:"], "--engine: 'unix:': a socket's path is 1 to 107 bytes long"),
        (["--engine=unix:/" + "x" * 107], "a socket's path is 1 to 107 bytes long"),
        (["--writer="], "--writer: 1 to 128 bytes"),
        (["--writer=a\nb"], "--writer: 1 to 128 bytes, and no control characters"),
        (["--tick-seconds=1e300"], "--tick-seconds: '1e300' is above ten years, 316224000"),
        (["--held-call-bytes-max=600000000"], "--held-call-bytes-max is above --held-bytes-max"),
        (["--journal-bytes-max=33554432"], "--journal-bytes-max must be more than twice --journal-reserve-bytes"),
        (["--tls-key=x"], "--tls-certificate, --tls-key: one needs the other"),
        (["--joined-tenants=a"], "--joined-tenants: groups of two tenants or more"),
        (["--joined-tenants=a+b,b+c"], "and no tenant twice"),
        (["--joined-tenants=a+"], "--joined-tenants: groups of two tenants or more"),
        (["--witness=heads.jsonl"], "--witness needs --signing-key"),
        (["--witness-token=t"], "--witness-token, --witness-ca: need --witness"),
        (
            ["--signing-key=k", "--witness=http://h/", "--witness-token=t"],
            "--witness-token: is for https:// and for another sidecar",
        ),
        (["--signing-key=k", "--witness=https://u:p@h/"], "--witness: a URL has no user and no password here"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that could never work stops the sidecar before it opens anything, and is named."""
    with pytest.raises(SystemExit, match="2"):
        settings(*argv)

    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "journal",
    [
        "host=db user=me password=Tiger dbname=x",
        "dbname=x password = 'Ti ger'",
        "password=Tiger",
        "service=Tiger",
        "postgresql:/me:Tiger@h/x",
        "POSTGRESQL://me:Tiger@h/x",
        "jdbc:postgresql://h/x?password=Tiger",
        "pgsql://me:Tiger@h/x",
        " postgresql://me:Tiger@h/x",
        "'postgresql://me:Tiger@h/x'",
        "PASSWORD=Tiger",
    ],
)
@pytest.mark.parametrize("form", ["flag", "variable", "command"])
def test_a_database_in_another_form_is_no_file(
    journal: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database that is not named by our kind of URL is refused, by its place and without its text, and no file is made."""
    monkeypatch.chdir(tmp_path)
    starts: dict[str, Callable[[], object]] = {
        "flag": lambda: settings(f"--journal={journal}"),
        "variable": lambda: read(Settings, "sidecar", [], {"OSTINATO_SIDECAR_JOURNAL": journal})[0],
        "command": lambda: commands.main(["verify", "--journal", journal]),
    }
    with pytest.raises(SystemExit, match="2"):
        starts[form]()

    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert "a database is named by a URL" in said
    assert "ger" not in said
    assert not list(tmp_path.iterdir())


def test_help_does_not_show_the_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--help of a command has our default, also where a settings file names a database with its password."""
    file = tmp_path / "ostinato.toml"
    file.write_text('[sidecar]\njournal = "postgresql://me:Tiger@h/x"\n')
    with pytest.raises(SystemExit, match="0"):
        commands.main(["verify", "--config", str(file), "--help"])

    shown_there = capsys.readouterr().out
    assert ".run/journal.sqlite" in shown_there
    assert "Tiger" not in shown_there


@given(st.text("QXZ@:/?#%&= '[],5.", min_size=1))
def test_a_password_is_never_shown(password: str) -> None:
    """The line at start shows host and name of a database, and no letter of a password, however it is written."""
    for journal in ("postgresql://me:{}@h/db", "postgresql://h/db?password={}", "host=h password={}"):
        assert not set(shown(journal.format(password))) & set("QXZ"), journal
    assert "QXZ" not in describe(Settings(journal="postgresql://me:QX/Z@h/db"))


@pytest.mark.parametrize(
    ("journal", "name"),
    [
        ("journal.sqlite", "journal.sqlite"),
        ("./host=1", "./host=1"),
        ("postgresql://me:tiger@h:5432,[::1]:1/db?sslmode=x", "postgresql://h:5432,[::1]:1/db"),
        ("postgresql:///db?host=%2Frun", "postgresql:///db"),
    ],
)
def test_a_journal_is_shown_by_its_name(journal: str, name: str) -> None:
    """A file by its path, a database by its hosts and name."""
    assert shown(Settings(journal=journal).journal) == name


@pytest.mark.parametrize(
    "address", ["unix:a", "unix:/run/engine.sock", "unix:///run/engine.sock", "engine:7000", "[::1]:7000", "dns:///engine:7000"]
)
def test_an_engine_is_where_grpc_finds_it(address: str) -> None:
    """Sockets, names and numbers, with a port."""
    assert settings(f"--engine={address}", "--engine-secret=file").engine == address


def test_help_says_in_words_what_has_no_value() -> None:
    """Of a setting without a value as its default, --help says what applies."""
    said = {option.name: option.applies for option in options_of(Settings, "sidecar")}

    assert said["high_water"] == "the journal's file, with .mark"
    assert Settings(journal="a/b").mark == Path("a/b.mark")
    assert said["canaries"] == "the sidecar's own"
    assert said["connections_max"] == "what ulimit -n leaves room for, at most 1024"
