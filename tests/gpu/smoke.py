"""`python -m tests.gpu.smoke MODEL`: the engine alone, in this process, with all details. The first command on a new host."""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ostinato.errors import from_status
from ostinato.v1 import engine_pb2, types_pb2

from service.answer import Answer
from service.chat import Conversation
from service.engines.base import Events, Run
from service.engines.turbomind import TurbomindOptions
from service.engines.turbomind.engine import TurbomindEngine, load

PROMPTS = ("Shanghai is", "The theory of evolution says that", "def quicksort(arr):", "In 1969,")
GIVEN = {"temperature": 1.0, "top_k": 40, "top_p": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 24}
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}'
OURS = ("cublas", "cudart", "_turbomind", "overrides-", "nccl")


def say(*parts: object) -> None:
    print(*parts, flush=True)


def show(title: str, lines: Sequence[object]) -> None:
    say(title, *(f"\n    {line}" for line in lines))


def libraries() -> list[str]:
    """The mapped libraries of CUDA, TurboMind and the overrides."""
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return sorted(name for name in names if any(part in name for part in OURS))


class Bench:
    """Runs by number, and their ends."""

    def __init__(self, engine: TurbomindEngine) -> None:
        self.engine, self.count, self.token_events = engine, 0, 0
        self.ends: dict[int, asyncio.Future[types_pb2.Output]] = {}

    def on_events(self, events: Events) -> None:
        for event in events:
            if event.HasField("finished"):
                self.ends[event.run_id].set_result(event.finished.output)
            elif event.HasField("failed"):
                self.ends[event.run_id].set_exception(from_status(event.failed))
            elif event.HasField("tokens"):
                self.token_events += 1

    def run(self, ids: Sequence[int], changes: dict[str, Any], *, stream: bool = False) -> asyncio.Future[types_pb2.Output]:
        self.count += 1
        parameters = types_pb2.ResolvedParameters(**(GIVEN | changes))
        future = self.ends[self.count] = asyncio.get_running_loop().create_future()
        answer = Answer(parameters, self.engine.vocabulary)
        self.engine.submit(Run(self.count, 0, 1, engine_pb2.PURPOSE_UNSPECIFIED, tuple(ids), parameters, 7, stream, answer))
        return future

    async def tell(self, title: str, ids: Sequence[int], *, stream: bool = False, **changes: Any) -> None:
        """Runs it, and prints the answer or the whole error."""
        try:
            output = await asyncio.wait_for(self.run(ids, {"logprobs": 3} | changes, stream=stream), 60)
        except Exception:  # noqa: BLE001  # everything is wanted
            say(f"{title}: FAILED\n{traceback.format_exc()}")
            return
        reason = types_pb2.FinishReason.Name(output.finish_reason).removeprefix("FINISH_REASON_")
        say(f"{title}: {reason}, {len(output.token_ids)} tokens {list(output.token_ids[:12])} {output.text[:90]!r}")
        first = output.logprobs[0]
        say(f"    first logprob {first.logprob!r}, top {[(each.token_id, each.logprob) for each in first.top]}")


async def exercise(engine: TurbomindEngine) -> None:
    bench = Bench(engine)
    engine.start(bench.on_events, lambda grade, reason: say("GRADE", grade, reason))
    encode, tell = engine.vocabulary.encode, bench.tell
    prompts = [encode(prompt, special=True) for prompt in PROMPTS]
    ids = prompts[0]

    def word(text: str) -> list[int]:
        return encode(text, special=False, begin=False)[:1]

    say("prompt ids", prompts)
    for prompt, each in zip(PROMPTS, prompts, strict=True):
        await tell(repr(prompt), each)
    await tell("greedy", ids, temperature=0.0)
    await tell("greedy again, streamed", ids, temperature=0.0, stream=True)
    say(f"    in {bench.token_events} events")
    await tell("all tokens to choose from", ids, top_k=0, logprobs=20)
    await tell("top_k 1024", ids, top_k=1024)
    await tell("seed 2^63 and above is taken", ids, temperature=1.5)
    await tell("stop string", ids, stop=["e"], temperature=0.0)
    await tell("at least 20 new, ends allowed", ids, min_new_tokens=20)
    await tell("ends ignored", ids, ignore_eos=True, max_new_tokens=64)
    await tell("bad words", ids, temperature=0.0, bad_token_ids=sorted({*word(" a"), *word(" the")}))
    await tell("stop token", ids, temperature=0.0, stop_token_ids=word(" and"), max_new_tokens=64)
    await tell("one token", ids[:1])
    await tell("regex", ids, response_format=types_pb2.ResponseFormat(regex="[a-z]{3,9} [0-9]{2}"), max_new_tokens=40)
    await tell("json", ids, response_format=types_pb2.ResponseFormat(json_schema=SCHEMA), max_new_tokens=60)
    try:
        engine.check_format(types_pb2.ResponseFormat(regex="(["))
        say("a broken regex was accepted")
    except ValueError as error:
        say("a broken regex is refused:", error)
    if engine.chat:
        text = engine.vocabulary.render(Conversation([{"role": "user", "content": "What is the capital of France?"}]))
        say("rendered", repr(text))
        await tell("chat", encode(text, special=True), max_new_tokens=40)
    cancelled = bench.run(ids, {"ignore_eos": True, "max_new_tokens": 2000}, stream=True)
    await asyncio.sleep(0.2)
    engine.cancel(bench.count)
    await asyncio.sleep(0.2)
    say("a cancelled run is silent:", not cancelled.done())
    await together(bench, prompts)
    await rates(bench, ids)


async def together(bench: Bench, prompts: list[list[int]]) -> None:
    """A first test of invariance: each alone, then all at once."""
    base = [
        (
            prompts[i % 4] * (1 + 9 * (i % 5)),
            {"temperature": (1.0, 0.0, 0.8)[i % 3], "top_k": (40, 0, 5)[i % 3], "ignore_eos": True, "logprobs": 3},
        )
        for i in range(24)
    ]
    alone = [await bench.run(*each) for each in base]
    company = await asyncio.gather(*(bench.run(*each) for each in base))
    pairs = list(zip(alone, company, strict=True))
    tokens = sum(left.token_ids != right.token_ids for left, right in pairs)
    anything = sum(
        left.SerializeToString(deterministic=True) != right.SerializeToString(deterministic=True) for left, right in pairs
    )
    say(f"24 alone against together: {tokens} differ in tokens, {anything} in anything")


async def rates(bench: Bench, ids: list[int]) -> None:
    changes = {"ignore_eos": True, "max_new_tokens": 128, "temperature": 0.9}
    for batch, stream in ((1, False), (64, False), (256, False), (256, True)):
        began = time.monotonic()
        outputs = await asyncio.gather(*(bench.run(ids, changes, stream=stream) for _ in range(batch)))
        rate = sum(len(output.token_ids) for output in outputs) / (time.monotonic() - began)
        say(f"batch {batch}{' streamed' if stream else ''}: {rate:.0f} tokens/s")


async def smoke(options: TurbomindOptions) -> None:
    began = time.monotonic()
    engine = await asyncio.to_thread(load, options)
    say(f"loaded in {time.monotonic() - began:.1f} s")
    exactness, native = engine._loaded.exactness, engine._loaded.native
    show("libraries", libraries())
    show("fields", [f"{name} = {value}" for name, value in sorted(engine.fields.items())])
    say("ceiling", types_pb2.Grade.Name(engine.ceiling[0]), engine.ceiling[1])
    say("capacity", str(engine.capacity).replace("\n", " "), "cache", native.load())
    say("vocabulary", engine.vocabulary.size, "ends", sorted(engine.vocabulary.end_ids), "chat", engine.chat)
    if exactness.overrides is not None:
        say("overrides", exactness.overrides.path, exactness.overrides.counters)
    if exactness.manifest is not None:
        say("manifest", exactness.manifest.to_json())
    try:
        await exercise(engine)
    finally:
        if exactness.overrides is not None:
            say("overrides", exactness.overrides.counters)
        say("load", native.load())
        began = time.monotonic()
        await engine.close()
        say(f"closed in {time.monotonic() - began:.1f} s")


class Everything(logging.Formatter):
    """Formats records with all their `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        known = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
        extra = {key: value for key, value in vars(record).items() if key not in known}
        return f"{super().format(record)} {extra or ''}"


def main() -> None:
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.smoke")
    parser.add_argument("model", type=Path)
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=256)
    parser.add_argument("--state", type=Path, help="kept from call to call; else a new one")
    parser.add_argument("--tm-log", default="WARNING", help="level of TurboMind's own log")
    given = parser.parse_args()
    os.environ["TM_LOG_LEVEL"] = given.tm_log
    handler = logging.StreamHandler()
    handler.setFormatter(Everything("%(relativeCreated)d ms %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    state = given.state or Path(tempfile.mkdtemp(prefix="ostinato-state-"))
    try:
        options = TurbomindOptions(
            model=given.model, state_dir=state, exact=not given.no_exact, context_tokens=given.context, runs=given.runs
        )
        asyncio.run(smoke(options))
    except Exception:  # noqa: BLE001  # everything is wanted, and then no waiting for threads
        say(traceback.format_exc())
        os._exit(1)
    say("the end; what follows is the interpreter's own")


if __name__ == "__main__":
    main()
