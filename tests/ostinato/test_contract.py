"""The contract's files: generated code and reference are up to date, lint is clean, and other interfaces are accounted for."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import enums
from ostinato.v1 import engine_pb2, generation_pb2, sequencer_pb2, types_pb2

from service.engines.turbomind.host import VERSIONS
from tests import reference

ROOT = Path(__file__).parents[2]
CODEGEN = ROOT / ".codegen/bin/python"
BUF = shutil.which("buf", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

needs_codegen = pytest.mark.skipif(not CODEGEN.exists(), reason="no code generator: `make install` makes .codegen")
needs_buf = pytest.mark.skipif(BUF is None, reason="no buf: it comes with the extra dev")


def output(*command: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Runs a command and returns its output; fails with the output if the command fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_codegen
def test_generated_code_is_what_is_committed(tmp_path: Path) -> None:
    """Generating again gives every generated file unchanged, and no other file."""
    output("make", "--silent", "--assume-old=.codegen/.installed", "gen", f"OUT={tmp_path}")

    def generated(root: Path) -> dict[str, bytes]:
        found = (path for path in (root / "ostinato").rglob("*_pb2*") if path.suffix in {".py", ".pyi"})
        return {str(path.relative_to(root)): path.read_bytes() for path in found}

    made, committed = generated(tmp_path), generated(ROOT / "proto")
    assert made.keys() == committed.keys()
    assert [name for name in made if made[name] != committed[name]] == []


@needs_buf
def test_the_contract_is_linted_and_laid_out() -> None:
    """buf lint and format accept the .proto files."""
    assert output(str(BUF), "lint") == ""
    assert output(str(BUF), "format", "--diff", "--exit-code", "--path", "proto/ostinato") == ""


@needs_buf
def test_the_contract_only_grows(tmp_path: Path) -> None:
    """The contract has everything that the baseline has; a removal or change is reported."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("*.py*", "__pycache__"))

    def compared() -> str:
        output(str(BUF), "build", "-o", "now.binpb", cwd=tmp_path)
        return output(str(BUF), "breaking", "now.binpb", "--against", str(ROOT / "proto/baseline.binpb"), cwd=tmp_path)

    assert compared() == ""
    types = tmp_path / "proto/ostinato/v1/types.proto"
    types.write_text(types.read_text().replace("uint64 epoch = 3;", "uint32 epoch = 3;"))
    with pytest.raises(AssertionError, match='Field "3" with name "epoch" on message "Stamp" changed type'):
        compared()


@needs_buf
def test_the_reference_is_what_the_contract_says() -> None:
    """docs/reference.md is up to date: `make docs`."""
    assert reference.render(reference.descriptors()) == reference.PAGE.read_text()


def fields_of(package: str) -> set[str]:
    """The fields of another interface, from its installed package, else as recorded; skips if there is neither."""
    if package == "lmdeploy":
        try:
            messages = importlib.import_module("lmdeploy.messages")
        except ImportError:
            return set(reference.others()[package]["recorded"].split())
        return {field.name for field in dataclasses.fields(messages.GenerationConfig)}
    if package == "openai":
        types = pytest.importorskip("openai.types.chat.completion_create_params", reason="openai is not installed")
        return set(types.CompletionCreateParamsBase.__annotations__)
    vllm = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2", reason="smg-grpc-proto is not installed")
    return {field.name for field in vllm.SamplingParams.DESCRIPTOR.fields}


@pytest.mark.parametrize("package", reference.others())
def test_every_field_of_others_is_accounted_for(package: str) -> None:
    """The reference says of each field of the installed package whether it is supported, and of no other."""
    assert set(reference.others()[package]["fields"]) == fields_of(package)


def test_the_recorded_fields_are_those_of_the_supported_version() -> None:
    """The version of LMDeploy whose fields are recorded is one that the engine takes; where it is installed, they are its."""
    recorded = reference.others()["lmdeploy"]
    least, below = VERSIONS

    assert least <= tuple(map(int, recorded["version"].split(".")[:2])) < below
    assert set(recorded["recorded"].split()) == fields_of("lmdeploy")


@pytest.mark.parametrize("package", reference.others())
def test_what_is_supported_is_named(package: str) -> None:
    """Every parameter of the contract that a table names exists."""
    known = set(types_pb2.Parameters.DESCRIPTOR.fields_by_name) | set(types_pb2.Chat.DESCRIPTOR.fields_by_name)
    for name, text in reference.others()[package]["fields"].items():
        if not text.startswith("no: "):
            named = {word.rpartition(".")[2] for word in re.findall(r"`(?:Chat\.)?([a-z_.]+)`", text)}
            formats = set(types_pb2.ResponseFormat.DESCRIPTOR.fields_by_name)
            assert named <= known | formats | {"n", "chat_template_kwargs"}, name


ENUMS = [
    getattr(file, kind.name)
    for file in (types_pb2, generation_pb2, sequencer_pb2, engine_pb2)
    for kind in file.DESCRIPTOR.enum_types_by_name.values()
]


@given(st.sampled_from(ENUMS), st.integers(0, 2**31 - 1))
def test_a_word_is_its_value(enum: Any, number: int) -> None:
    """Every enum value has its own word without the prefix; an unknown value is its number."""
    for value in (*enum.DESCRIPTOR.values_by_number, number):
        assert enums.value(enum, enums.word(enum, value)) == value
    assert enums.word(enum, 0) == "UNSPECIFIED"
    assert number in enum.DESCRIPTOR.values_by_number or enums.word(enum, number) == str(number)


def test_words_of_grades() -> None:
    """A word may contain underscores; an unknown one is a ValueError."""
    assert [enums.word(types_pb2.Grade, value) for value in range(4)] == ["UNSPECIFIED", "BEST_EFFORT", "SERIAL", "EXACT"]
    with pytest.raises(ValueError, match="GRADE_BEST"):
        enums.value(types_pb2.Grade, "BEST")
