"""Comparison of answers: every target alone, and then among others."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

from ostinato.digest import logprobs_digest, output_digest
from ostinato.errors import OstinatoError
from ostinato.v1 import types_pb2

from tests.gpu.fronts import Answers, Front
from tests.gpu.plan import Plan, Reference, say
from tests.gpu.stack import Stack
from tests.gpu.traffic import Ask, mixed, plain

WORTH_TELLING = (
    "product measured",
    "KV cache",
    "not exact",
    "model loaded",
    "prefix cache off",
    "kernel plans",
    "own kernels",
    "grade lost",
    "grade earned",
)


async def introduce(stack: Stack, title: str) -> types_pb2.Model:
    """Prints the model, its grade and what the start measured."""
    model = await stack.front.describe()
    say(f"== {title}: up after {stack.started_seconds:.1f} s, {grade(model)}: {model.grade_reason}")
    for record in stack.service.records():
        if record.get("message") in WORTH_TELLING:
            say(f"   { ({key: record[key] for key in record if key not in ('time', 'level', 'logger')}) }")
    return model


def grade(model: types_pb2.Model) -> str:
    return types_pb2.Grade.Name(model.grade).removeprefix("GRADE_")


async def alone(stack: Stack, plan: Plan) -> Reference:
    """The targets' answers, one request at a time."""
    model = await stack.front.describe()
    began = time.monotonic()
    asks: dict[str, Ask] = {}
    answers: Answers = {}
    for given in plan.asks(model.context_tokens):
        ask, before = given, answers.get(given.follows)
        if isinstance(before, types_pb2.Output):
            ask = given.behind(asks[given.follows], before)
        asks[ask.name] = ask
        answers |= await stack.front.ask([ask])
    seconds, whole = time.monotonic() - began, digest(answers)
    failed = {name: str(answer)[:200] for name, answer in answers.items() if isinstance(answer, OstinatoError)}
    say(f"   alone: {len(asks)} targets in {seconds:.1f} s, digest {whole}" + (f", FAILED {failed}" if failed else ""))
    if failed:
        plan.bad.append(f"{len(failed)} of {len(asks)} targets failed when they were alone: {next(iter(failed.items()))}")
    return Reference(list(asks.values()), answers, whole, model)


def digest(answers: Answers) -> str:
    """Digest of all tokens and logprob bits."""
    whole = hashlib.sha256()
    for name in sorted(answers):
        answer = answers[name]
        if isinstance(answer, types_pb2.Output):
            whole.update(output_digest(answer) + logprobs_digest(answer))
    return whole.hexdigest()[:16]


def divergence(expected: Answers, actual: Answers, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Targets whose tokens differ (or that failed), and those whose tokens are equal but logprob bits are not."""
    tokens, bits = [], []
    for name in names:
        left, right = expected.get(name), actual.get(name)
        if (
            not isinstance(left, types_pb2.Output)
            or not isinstance(right, types_pb2.Output)
            or output_digest(left) != output_digest(right)
        ):
            tokens.append(name)
        elif logprobs_digest(left) != logprobs_digest(right):
            bits.append(name)
    return tokens, bits


async def together(front: Front, reference: Reference, total: int, seed: int, plan: Plan) -> tuple[int, int]:
    """How many targets differ in tokens, and in logprob bits only: in batches of `total`, or, if there are fewer targets,
    among background requests."""
    asks, began = list(reference.asks), time.monotonic()
    answers: Answers = {}
    if total < len(asks):
        for start in range(0, len(asks), total):
            answers |= await front.ask(asks[start : start + total])
    else:
        everyone = mixed(asks, total, seed, reference.model.context_tokens)
        answers = await front.ask(plain(everyone) if plan.engine == "scripted" else everyone)
    tokens, bits = divergence(reference.answers, answers, [ask.name for ask in asks])
    say(f"   {total} in all, {time.monotonic() - began:.1f} s: {len(tokens)} differ in tokens {tokens[:12]},"
        f" {len(bits)} in logprob bits only {bits[:12]}")  # fmt: skip
    for name in tokens[:2]:
        if isinstance(answers.get(name), OstinatoError):
            say(f"     {name}: {str(answers[name])[:300]}")
    return len(tokens), len(bits)


async def company(front: Front, reference: Reference, plan: Plan, title: str, *, trials: int, must_match: bool) -> int:
    """Targets among others, several times. Returns how many differed in all."""
    count, sum_of_all = len(reference.asks), 0
    for total in plan.totals:
        cells = []
        for trial in range(trials):
            if plan.late():
                break
            tokens, bits = await together(front, reference, total, 1000 * total + trial, plan)
            cells.append(f"{tokens}+{bits}")
            sum_of_all += tokens + bits
            if must_match and (tokens or bits):
                plan.bad.append(f"{title}: {tokens}+{bits} of {count} diverged among {total}")
        plan.lines.append(f"{title:8} {total:4} in all: {' '.join(cells) or 'no time'} of {count} (tokens + logprobs only)")
    return sum_of_all
