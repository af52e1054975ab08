"""How much a request may ask for: one object, which Prepare enforces and Describe shows."""

from __future__ import annotations

from dataclasses import dataclass

from ostinato.v1 import types_pb2


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds, each inclusive. The engine and the settings give the first five; the rest are the contract's."""

    context_tokens: int
    new_tokens_max: int
    top_k_max: int
    batch_items_max: int
    prompt_bytes_max: int
    """Of one prompt's text, before it is tokenised."""
    stop_max: int = 16
    stop_bytes_max: int = 256
    stop_token_ids_max: int = 32
    bad_words_max: int = 32
    logprobs_max: int = 20
    format_bytes_max: int = 64 * 1024
    idempotency_key_bytes_max: int = 256
    request_id_bytes_max: int = 256

    def message(self) -> types_pb2.Limits:
        """Those that the contract shows."""
        shown = types_pb2.Limits.DESCRIPTOR.fields_by_name
        return types_pb2.Limits(**{name: getattr(self, name) for name in shown})
