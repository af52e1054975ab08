"""What TurboMind keeps of a token's choice, as the contract wants it. Pure."""

from __future__ import annotations

from typing import Any

from ostinato.v1 import types_pb2


def token_logprobs(token_id: int, ids: Any, values: Any, top: int) -> types_pb2.TokenLogprobs | None:
    """PROCESSED logprobs of the chosen token and of the `top` likeliest, ties by id. `ids` and `values` are numpy, likeliest
    first, of all that were left to choose from; what is impossible is left out, so there may be fewer than `top`. None: the
    chosen token is not among them.

    The floats are the GPU's own, widened: their bits do not depend on `top`.
    """
    chosen = values[ids == token_id]
    if not len(chosen):
        return None
    likeliest: list[tuple[float, int]] = []
    if top:
        # Behind the last wanted one there may be others as likely, with lower ids.
        edge = values[min(top, len(values)) - 1]
        reach = values >= edge
        likeliest = sorted(
            ((-value, each) for each, value in zip(ids[reach].tolist(), values[reach].tolist(), strict=True) if value > -1e30)
        )
    return types_pb2.TokenLogprobs(
        logprob=float(chosen.max()),
        top=[types_pb2.TopLogprob(token_id=each, logprob=-value) for value, each in likeliest[:top]],
    )
