"""Why a batch gets no numbers, and why a numbered item must not run on the engine that is here now."""

from __future__ import annotations

from ostinato import errors
from ostinato.v1 import types_pb2

from sidecar.core.events import Admit
from sidecar.core.item import Bounds, Item
from sidecar.core.window import Window


def refusal(admit: Admit, window: Window | None, queued: int, bounds: Bounds, *, draining: bool) -> errors.OstinatoError | None:
    """None: the batch may be numbered."""
    soon = bounds.retry_after_seconds
    if draining:
        return errors.Draining("the sidecar is draining", retry_after=soon)
    if window is None:
        return errors.EngineUnavailable("no engine is connected", retry_after=soon)
    for index, need in enumerate(admit.needs):
        if not window.ever_fits(need.kv_tokens):
            return errors.invalid(f"items[{index}]", _too_big(need.kv_tokens, window))
        if need.required_grade > window.engine.grade:
            earned = types_pb2.Grade.Name(window.engine.grade)
            return errors.GradeNotEarned(f"the engine has earned {earned}", details={"earned": earned})
    if queued + len(admit.needs) > bounds.queue_items_max:
        return errors.QueueFull(f"{queued} items wait, {bounds.queue_items_max} may", retry_after=soon)
    return None


def unfit(item: Item, window: Window) -> errors.OstinatoError | None:
    """None: this engine may run it. Else another one prepared it, promised more for it, or was larger."""
    if item.need.model_digest != window.engine.model_digest:
        return errors.FingerprintChanged("another model, tokenizer or template runs now")
    if item.need.required_grade > window.engine.grade:
        return errors.GradeLost(f"the engine has only earned {types_pb2.Grade.Name(window.engine.grade)}")
    if not window.ever_fits(item.need.kv_tokens):
        return errors.EngineFailed(_too_big(item.need.kv_tokens, window))
    return None


def _too_big(kv_tokens: int, window: Window) -> str:
    return f"needs {window.need(kv_tokens)} KV blocks at worst, the engine has {window.engine.kv_blocks}"
