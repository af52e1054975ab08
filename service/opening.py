"""From settings to a service that answers: load, test, describe."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from ostinato import enums
from ostinato.digest import model_digest
from ostinato.v1 import types_pb2
from serving.program import StartupError

from service.config import Settings
from service.description import Describer, fingerprint
from service.engines import load
from service.engines.base import Engine, EngineUnusable
from service.fence import Fence
from service.grade import HeldGrade
from service.lexicon import Lexicon
from service.memory import Memory
from service.metrics import Metrics
from service.prepare import Preparer
from service.prompts import Prompts
from service.proof import Proofs, code_digest
from service.runs import Runs
from service.selftest import Finding, self_test
from service.servicer import Ready
from service.stream import Streams

_log = logging.getLogger(__name__)


async def open_engine(settings: Settings) -> tuple[Engine, float]:
    """The loaded engine, and the seconds that took. Raises StartupError with one line about what is missing."""
    began = time.monotonic()
    try:
        engine = await asyncio.to_thread(load, settings)
    except EngineUnusable as error:
        raise StartupError(str(error)) from error
    seconds = round(time.monotonic() - began, 3)
    _log.info("engine loaded", extra={"engine": engine.name, "model": engine.model_name, "seconds": seconds})
    return engine, seconds


async def make_ready(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    incarnation: str,
    memory: Memory | None = None,
    load_seconds: float = 0.0,
) -> Ready:
    """Start the engine, earn its grade, and put together what answers. Raises StartupError where a required grade is missed.
    How long loading took is for the log."""
    fence = Fence(sequences=memory.read() if memory is not None else {})
    identity = fingerprint(engine.fields)
    metrics.describe(engine.capacity, identity.digest, identity.fields)
    metrics.include(engine)
    held = HeldGrade()
    held.watch(lambda: metrics.grade.set(held.grade))
    runs = Runs(engine, held, metrics)
    runs.start()
    lexicon = Lexicon(engine.vocabulary)
    await asyncio.to_thread(lexicon.warm)
    await _earn(held, identity.digest, runs, settings, metrics, load_seconds)
    limits = settings.limits(engine.context_tokens, engine.top_k_max)
    describer = Describer(engine, limits, identity, held, incarnation)
    prompts = Prompts(engine.vocabulary, limits, engine.chat)
    preparer = Preparer(prompts, lexicon, engine.check_format, model_digest(identity.fields))
    streams = Streams(runs, describer, preparer, settings.bounds, metrics, fence, memory)
    return Ready(describer, engine.vocabulary, preparer, streams)


async def _earn(held: HeldGrade, digest: bytes, runs: Runs, settings: Settings, metrics: Metrics, load_seconds: float) -> None:
    """Test, or take a kept proof's word for it; and say what came of it, what that rests on, and what it cost."""
    began = time.monotonic()
    finding = await _find(digest, runs, settings)
    held.earn(finding.grade, finding.reason)
    metrics.self_test_seconds.set(finding.seconds)
    name = enums.word(types_pb2.Grade, held.grade)
    proof_seconds = runs.engine.proof_seconds
    costs = {"load": load_seconds - proof_seconds, "proof": proof_seconds, "self_test": time.monotonic() - began}
    seconds = {f"{part}_seconds": round(max(0.0, value), 3) for part, value in costs.items()}
    _log.info("grade earned", extra={"grade": name, "reason": held.reason, "rests_on": runs.engine.ceiling[1], **seconds})
    if held.grade < settings.required_grade:
        raise StartupError(f"--require-grade: {settings.require_grade} is required, {name} was earned: {held.reason}")


async def _find(digest: bytes, runs: Runs, settings: Settings) -> Finding:
    if settings.self_test == "off":
        return Finding(types_pb2.GRADE_BEST_EFFORT, "not tested", 0.0, 0)
    proofs = Proofs(settings.state_dir / "proofs", await asyncio.to_thread(code_digest, Path(__file__).parent))
    kept = proofs.find(digest) if settings.self_test == "kept" else None
    ceiling, _ = runs.engine.ceiling
    if kept is not None and kept[0].grade <= ceiling:
        finding, made_at = kept
        return replace(finding, reason=f"{finding.reason}; proved at {made_at}")
    finding = await self_test(runs, time.monotonic, settings.self_test_timeout_seconds)
    if finding.grade > types_pb2.GRADE_BEST_EFFORT:
        proofs.keep(digest, finding, datetime.now(UTC).isoformat(timespec="seconds"))
    return finding
