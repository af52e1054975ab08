"""Settings, looked at closely."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostinato.serving.settings import load
from ostinato.v1 import types_pb2

from service.config import Settings


def settings(*argv: str) -> Settings:
    return load(Settings, "service", argv, {})


def test_socket_paths_become_absolute() -> None:
    """A relative socket path is taken from where the service was started; ports are left alone."""
    assert settings("--listen", "unix:a/b.sock,127.0.0.1:7001").addresses == [f"unix:{Path.cwd()}/a/b.sock", "127.0.0.1:7001"]


def test_limits_follow_the_engine() -> None:
    """The longest answer is what the context leaves to a prompt of one token, unless a smaller one is set."""
    assert settings().limits(2048, 40).new_tokens_max == 2047
    assert settings("--new-tokens-max", "100").limits(2048, 40).new_tokens_max == 100
    assert settings("--new-tokens-max", "5000").limits(2048, 40).new_tokens_max == 2047
    assert settings().limits(2048, 40).top_k_max == 40


def test_required_grade() -> None:
    """None given is none required."""
    assert settings().required_grade == types_pb2.GRADE_UNSPECIFIED
    assert settings("--require-grade", "SERIAL").required_grade == types_pb2.GRADE_SERIAL


def test_an_engine_gets_its_own_settings() -> None:
    """Only what was given, by the engine's own names."""
    assert settings("--threads", "1", "--kv", "f16").own("llama") == {"threads": 1, "kv": "f16"}
    assert settings().own("llama") == {}
    assert settings("--engine", "turbomind", "--no-exact", "--kv-bits", "8").own("turbomind") == {"exact": False, "kv_bits": 8}


@pytest.mark.parametrize("argv", [["--engine", "scripted", "--runs", "4"], ["--engine", "turbomind", "--script", "{}"]])
def test_another_engines_settings_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What would be ignored is refused."""
    with pytest.raises(SystemExit) as caught:
        settings(*argv)

    assert caught.value.code == 2
    assert f"{argv[2]}: is not for engine {argv[1]}" in capsys.readouterr().err


def test_everything_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names every setting and its variable."""
    with pytest.raises(SystemExit):
        settings("--help")
    shown = capsys.readouterr().out

    assert "--self-test" in shown
    assert "OSTINATO_SERVICE_BUFFER_BYTES_MAX" in shown
