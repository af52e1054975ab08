"""How much time a caller has left, and whether it left because it had none: gRPC cancels a handler for both alike."""

from __future__ import annotations

from typing import Any

import grpc

EARLY_SECONDS, EARLY_SHARE = 0.05, 0.02
"""A caller's own clock runs out before ours: by the way here, and because gRPC rounds a timeout up, by up to a hundredth."""


def remaining(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Seconds until the caller's deadline; None: it has none."""
    left: float | None = context.time_remaining()
    return left


def ran_out(left: float | None, patience: float | None) -> bool:
    """Whether a caller that came with `patience` seconds to its deadline, and was gone with `left`, waited for as long as it
    could. None: it has no deadline."""
    return left is not None and patience is not None and left <= EARLY_SECONDS + EARLY_SHARE * patience
