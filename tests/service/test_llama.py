"""The llama engine with a real model: events, order, errors, refusals and close."""

from __future__ import annotations

import asyncio
import ctypes.util
import importlib.util
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from ostinato.errors import EngineFailed, from_status
from ostinato.v1 import types_pb2

from service.engines.base import EngineUnusable
from service.engines.llama import load
from tests.pair import python
from tests.service.llama_kit import LACKING, Bench, bits, on_the_loop, regex, schema, small

if LACKING:
    pytest.skip(f"the llama engine's packages are not installed: {LACKING}", allow_module_level=True)

from service.engines.llama import batching, library
from service.engines.llama.model import LlamaVocabulary, packaged_model
from service.engines.llama.sampling import Grammar

pytestmark = pytest.mark.llama


@pytest.fixture(name="model")
def _model() -> Path:
    return packaged_model()


@on_the_loop
async def test_events_of_a_run(bench: Bench) -> None:
    """Started comes first, then tokens if they are streamed, which together are the output, and one end."""
    silent, streamed = bench.start("Streams", max_new_tokens=4), bench.start("Streams", max_new_tokens=4, stream=True)
    output = await bench.output(streamed)
    await bench.end(silent)
    told = [event.tokens for event in bench.events if event.run_id == streamed and event.HasField("tokens")]

    assert bench.of(silent) == ["started", "finished"]
    assert bench.of(streamed) == ["started", *["tokens"] * len(told), "finished"]
    assert [token_id for tokens in told for token_id in tokens.token_ids] == output.token_ids
    assert "".join(tokens.text for tokens in told) == output.text


@on_the_loop
async def test_cancel(bench: Bench) -> None:
    """A cancelled run reports nothing more, its slot is free again, and its neighbours' bits are those they have alone."""
    about: dict[str, Any] = {"seed": 5, "max_new_tokens": 12, "logprobs": 2}
    alone = bits(await bench.answer("Rivers run", **about))
    neighbours = [bench.start("Rivers run", **about) for _ in range(3)]
    doomed = [bench.start("Endless", stream=True, max_new_tokens=400) for _ in range(6)]
    await bench.until(doomed[0], "tokens")
    for run_id in doomed:
        bench.engine.cancel(run_id)  # the last of them is still waiting for a slot
    heard = [bench.of(run_id) for run_id in doomed]

    assert [bits(await bench.output(run_id)) for run_id in neighbours] == [alone] * 3
    assert bits(await bench.answer("Rivers run", **about)) == alone
    assert [bench.of(run_id) for run_id in doomed] == heard


@on_the_loop
async def test_a_grammar_is_compiled_beside_the_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a grammar is compiled, a run that has a slot goes on to its end; the runs behind the grammar start after it, in
    order; a cancelled one never starts."""
    gate, compiled = threading.Event(), list[bytes]()

    def slow(vocabulary: LlamaVocabulary, kind: str, source: bytes) -> Grammar:
        gate.wait(60)
        compiled.append(source)
        return Grammar(vocabulary, kind, source)

    monkeypatch.setattr(batching, "Grammar", slow)
    running = bench.start("Rivers run", max_new_tokens=30, stream=True)
    await bench.until(running, "tokens")
    held = bench.start("A number: ", max_new_tokens=3, response_format=regex("[0-9]+"))
    gone = bench.start("A number: ", max_new_tokens=3, response_format=regex("[1-9]+"))
    behind = bench.start("Rivers run", max_new_tokens=3)
    await bench.output(running)
    bench.engine.cancel(gone)
    before = [bench.of(run_id) for run_id in (held, gone, behind)]
    gate.set()
    answer = await bench.output(held)
    await bench.output(behind)

    assert before == [[], [], []]
    assert answer.text.isdigit()
    assert bench.of(gone) == []
    started = [event.run_id for event in bench.events if event.HasField("started")]
    assert started.index(held) < started.index(behind)
    assert compiled[0] == b"[0-9]+"


@on_the_loop
async def test_the_queue_keeps_its_order(bench: Bench) -> None:
    """More runs than slots are accepted, and they start in order of submission, whatever their lengths."""
    runs = [bench.start("word " * (70 if index in (1, 5) else 2), max_new_tokens=2) for index in range(14)]
    for run_id in runs:
        await bench.output(run_id)

    assert [event.run_id for event in bench.events if event.HasField("started") and event.run_id in runs] == runs


@on_the_loop
async def test_what_cannot_go_on_fails_alone(bench: Bench) -> None:
    """A run without an allowed token, or at which llama.cpp would end the process, fails alone; the engine continues."""
    size = bench.engine.vocabulary.size
    letters = [token_id for token_id, piece in enumerate(bench.engine.vocabulary.pieces) if piece.startswith(b"a")]
    runs = [
        bench.start("x", response_format=regex("a+"), bad_token_ids=letters),
        bench.start("x", response_format=regex("a"), ignore_eos=True),
        bench.start("x", response_format=schema('{"type": "wizard"}')),
        bench.start("word " * 600),
        bench.start([size]),
        bench.start([]),
    ]
    errors = [from_status((await bench.end(run_id)).failed) for run_id in runs]

    assert all(isinstance(error, EngineFailed) for error in errors)
    assert [error.message.split()[0] for error in errors] == ["no", "no", "llguidance", "prompt", "a", "a"]
    assert len((await bench.answer("x")).token_ids) == 8


@on_the_loop
@pytest.mark.parametrize("fault", ["code", "exception"])
async def test_a_step_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """When llama.cpp or the loop fails, the runs in slots fail with the reason; waiting and later runs work."""

    def decode(*args: object) -> int:
        monkeypatch.undo()
        if fault == "code":
            return 1
        raise MemoryError("no room")

    monkeypatch.setattr(bench.engine._library, "decode", decode)
    runs = [bench.start("Faults", max_new_tokens=2) for _ in range(9)]
    events = [await bench.end(run_id) for run_id in runs]

    failed = [event.failed.message for event in events if event.HasField("failed")]
    assert set(failed) == {"llama.cpp failed with code 1" if fault == "code" else "no room"}
    assert events[-1].HasField("finished")
    assert len((await bench.answer("Faults")).token_ids) == 8


@on_the_loop
async def test_a_full_context() -> None:
    """A run may fill its slot to the last token, also with a context that is not a multiple of a piece."""
    bench = Bench(load(small(context_tokens=131, runs=3, ubatch=32)))
    runs = [bench.start("word " * 100, max_new_tokens=131 - 101) for _ in range(3)]
    outputs = [await bench.output(run_id) for run_id in runs]
    await bench.engine.close()

    assert [output.prompt_tokens + len(output.token_ids) for output in outputs] == [131] * 3


@on_the_loop
async def test_what_the_engine_says_of_itself(bench: Bench, model: Path) -> None:
    """Capacity fits all slots, the fingerprint names what the answers depend on, and the context is what was asked for."""
    engine = bench.engine
    capacity = engine.capacity

    assert (capacity.runs, capacity.kv_blocks * capacity.block_tokens) == (8, 8 * 512)
    assert engine.fields["weights"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert engine.fields["model"] == model.name
    assert {"tokenizer", "template", "library", "engine_version", "kv", "threads", "ubatch", "cpu", "numpy"} <= set(
        engine.fields
    )
    assert all(engine.fields.values())
    assert engine.ceiling[0] == types_pb2.GRADE_EXACT
    assert (engine.context_tokens, engine.chat, engine.top_k_max) == (512, True, engine.vocabulary.size)


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "cut in its metadata", "cut in its weights", "a folder"])
def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path, model: Path, kind: str) -> None:
    """The error names a file that cannot be used."""
    path = tmp_path / "some.gguf"
    with model.open("rb") as whole:
        match kind:
            case "text":
                path.write_text("GGUFs are nice")
            case "empty":
                path.touch()
            case "cut in its metadata":
                path.write_bytes(whole.read(100_000))
            case "cut in its weights":
                path.write_bytes(whole.read(8_000_000))
            case "a folder":
                path.mkdir()

    with pytest.raises(EngineUnusable, match=re.escape(str(path))):
        load(small(model=path))


def test_a_template_that_is_not_text_is_refused(tmp_path: Path, model: Path) -> None:
    """A chat template that is not UTF-8 is an error that names the file."""
    with model.open("rb") as whole:
        head = whole.read(8_000_000)
    at = head.index(b"{%", head.index(b"tokenizer.chat_template"))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(head[:at] + b"\xff" + head[at + 1 :])
    os.truncate(path, model.stat().st_size)  # its weights are zeros that take no room

    with pytest.raises(EngineUnusable, match=f"^--model: {path}: its chat template is not UTF-8 text"):
        load(small(model=path))


@pytest.mark.parametrize("options", [{"context_tokens": 8193}, {"runs": 0}, {"runs": 257}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    """An option that this model or llama.cpp does not allow is refused by name."""
    with pytest.raises(EngineUnusable, match=f"^--{next(iter(options)).replace('_', '-')} must be"):
        load(small(**options))


def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library, or another build than the declared one, is an error with the command that installs it."""
    with pytest.raises(EngineUnusable, match="pip install --no-deps xllamacpp=="):
        library.bind(Path(ctypes.util.find_library("m") or "libm.so.6"))
    monkeypatch.setitem(library._CONTEXT_DEFAULTS, "n_ubatch", 511)
    with pytest.raises(EngineUnusable, match="its default n_ubatch reads 512, not 511"):
        library.bind(library.locate())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnusable, match="not installed; pip install --no-deps xllamacpp=="):
        library.locate()


@on_the_loop
async def test_close_while_running() -> None:
    """Closing stops the runs silently and leaves neither thread nor process; the vocabulary still answers, formats do not."""
    await asyncio.to_thread(int)  # the loop's own helper thread
    threads = set(threading.enumerate())
    engine = load(small(runs=1))
    assert engine.ceiling[0] == types_pb2.GRADE_SERIAL
    bench = Bench(engine)
    engine.check_format(regex("a"))
    runs = [bench.start("Endless", stream=True, max_new_tokens=400) for _ in range(3)]
    await bench.until(runs[0], "tokens")
    await engine.close()
    heard = len(bench.events)
    await asyncio.sleep(0.05)
    await engine.close()

    assert len(bench.events) == heard
    assert set(threading.enumerate()) <= threads
    assert "llama" not in [
        thread.name for thread in threading.enumerate() if thread.name == "llama" and thread is engine._thread
    ]
    assert engine.vocabulary.encode("Hello", special=False) == [19556]
    with pytest.raises(ValueError, match="has closed"):
        engine.check_format(regex("a"))


_EXIT = """
import asyncio
from service.engines.llama import load
from tests.pair import python
from tests.service.llama_kit import Bench, small
async def main():
    bench = Bench(load(small()))
    run_id = bench.start("Endless", stream=True, max_new_tokens=400)
    await bench.until(run_id, "tokens")
asyncio.run(main())
"""


def test_a_process_that_does_not_close_its_engine() -> None:
    """A process that exits during a decode, without closing its engine, exits with 0 and without output."""
    done = python("-c", _EXIT)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
