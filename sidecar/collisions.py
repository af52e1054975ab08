"""Unseeded items that should have differed and did not: the other half of a broken seed."""

from __future__ import annotations

from collections import OrderedDict

from ostinato.digest import output_digest, unseeded_input_digest
from ostinato.v1 import sequencer_pb2, types_pb2
from ostinato.v1.sequencer_pb2 import COLLISION_FOUND, COLLISION_NONE, COLLISION_UNSPECIFIED

TOKENS_MIN = 16
"""Shorter answers may well be equal by chance."""


class Collisions:
    """Remembers the outputs of the inputs_max newest distinct inputs, outputs_max each.

    Only items count whose seeds were derived, that sample freely (temperature above 0, top_k not 1, no response format), and
    whose answers have at least TOKENS_MIN tokens. Equal engine seeds are no collision but arithmetic.
    """

    def __init__(self, inputs_max: int = 4096, outputs_max: int = 64) -> None:
        self._inputs: OrderedDict[bytes, dict[bytes, int]] = OrderedDict()
        self._inputs_max = inputs_max
        self._outputs_max = outputs_max

    def check(self, given: sequencer_pb2.AdmittedPayload, output: types_pb2.Output) -> sequencer_pb2.Collision.ValueType:
        """Whether an equal input with another seed made this very output before; UNSPECIFIED: nothing to compare with."""
        if not given.seed_derived or not _free(given.parameters) or len(output.token_ids) < TOKENS_MIN:
            return COLLISION_UNSPECIFIED
        name, made = unseeded_input_digest(given.token_ids, given.parameters), output_digest(output)
        seen = self._inputs.setdefault(name, {})
        self._inputs.move_to_end(name)
        known = bool(seen)
        collides = made in seen and seen[made] != output.engine_seed
        if len(seen) < self._outputs_max:
            seen.setdefault(made, output.engine_seed)
        if len(self._inputs) > self._inputs_max:
            self._inputs.popitem(last=False)
        if not known:
            return COLLISION_UNSPECIFIED
        return COLLISION_FOUND if collides else COLLISION_NONE


def _free(parameters: types_pb2.ResolvedParameters) -> bool:
    return parameters.temperature > 0 and parameters.top_k != 1 and not parameters.HasField("response_format")
