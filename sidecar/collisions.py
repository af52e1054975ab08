"""How an answer was sampled, and unseeded answers that are equal where they should differ."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from ostinato.digest import output_digest, unseeded_input_digest
from ostinato.v1 import sequencer_pb2, types_pb2
from ostinato.v1.sequencer_pb2 import COLLISION_FOUND, COLLISION_NONE, COLLISION_UNSPECIFIED


def sampling_label(given: types_pb2.ResolvedParameters) -> str:
    """What is not at its default and may matter to a divergence, names ascending by importance; `defaults` if nothing is.

    Numbers have six digits at most, and what a format demands is not said, so that like items are alike.
    """
    greedy = given.temperature == 0
    numbers = (
        ("temperature", given.temperature, 1.0),
        ("top_k", given.top_k, 0),
        ("top_p", given.top_p, 1.0),
        ("min_p", given.min_p, 0.0),
        ("repetition_penalty", given.repetition_penalty, 1.0),
    )
    words = ["greedy"] if greedy else []
    words += [
        f"{name}={value:g}"
        for name, value, default in numbers
        if value != default and not (greedy and name != "repetition_penalty")
    ]
    if given.HasField("response_format"):
        words.append(given.response_format.WhichOneof("format") or "response_format")
    if given.HasField("logprobs"):
        words.append("logprobs")
    return " ".join(words) or "defaults"


TOKENS_MIN = 16
"""Shorter answers may well be equal by chance."""
CHOICE_BITS_MIN = 32.0
"""Answers that took less choice are not compared. Of two independent answers one equals the other with probability 2^-32 at
most: with 100,000 answers a day, each compared with 64 others, that is one false alarm in 670 days if all of them took no more
choice than this."""
DISTINCT_TOKEN_BITS = 1.25
"""What a token that the answer has not had before is taken for where no logprobs are known, times the temperature (1 at most)
and the square of top_p. One that comes back counts as none, so that a loop does not look like choice. A guess, by what a small
model took (docs/determinism.md): a model that is sure of its answer may take less."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is known of the choice that an answer took."""

    tokens: int
    distinct_tokens: int
    logprobs_known: bool
    """Whether `bits` are from logprobs; else they are a guess from the distinct tokens."""
    bits: float
    """Estimated: an independent answer is equal with probability 2^-bits."""


class Collisions:
    """Remembers the outputs of the inputs_max newest distinct inputs, outputs_max each.

    Only items count whose seeds were derived, that sample freely (temperature above 0, top_k not 1, no response format), and
    whose answers have at least TOKENS_MIN tokens and took at least CHOICE_BITS_MIN bits of choice. Two seeds that the engine
    folds into one must give one answer, and do not collide.
    """

    def __init__(self, inputs_max: int = 4096, outputs_max: int = 64) -> None:
        self._inputs: OrderedDict[bytes, dict[bytes, int]] = OrderedDict()
        self._inputs_max = inputs_max
        self._outputs_max = outputs_max

    def check(self, given: sequencer_pb2.AdmittedPayload, output: types_pb2.Output) -> sequencer_pb2.Collision.ValueType:
        """Whether an equal input with another seed made this very output before; UNSPECIFIED: nothing to compare with, or an
        equal output would say nothing."""
        if not given.seed_derived or not _free(given.parameters) or len(output.token_ids) < TOKENS_MIN:
            return COLLISION_UNSPECIFIED
        if choice_of(given.parameters, output).bits < CHOICE_BITS_MIN:
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


def choice_of(parameters: types_pb2.ResolvedParameters, output: types_pb2.Output) -> Choice:
    """PROCESSED logprobs are of the distribution that was drawn from: their sum is the answer's probability. So are RAW ones
    where no parameter reshapes it. Where one does, RAW ones with the likeliest tokens give a bound from below: temperature and
    truncation keep the order of tokens, so whatever is likelier than the chosen token could have been drawn too. A repetition
    penalty or a ban (of an early end, too) changes that order, and then the logprobs are not used."""
    distinct = len(set(output.token_ids))
    bits = _bits_from_logprobs(parameters, output)
    if bits is None:
        guess = distinct * DISTINCT_TOKEN_BITS * min(1.0, parameters.temperature) * (parameters.top_p or 1.0) ** 2
        return Choice(len(output.token_ids), distinct, logprobs_known=False, bits=guess)
    return Choice(len(output.token_ids), distinct, logprobs_known=True, bits=bits)


def _bits_from_logprobs(given: types_pb2.ResolvedParameters, output: types_pb2.Output) -> float | None:
    """None: they do not say."""
    if len(output.logprobs) != len(output.token_ids):
        return None
    banned = given.bad_token_ids or given.ignore_eos or given.min_new_tokens
    ordered = given.repetition_penalty in (0.0, 1.0) and not banned
    reshaped = given.temperature != 1 or given.top_k or given.top_p not in (0.0, 1.0) or given.min_p
    if output.logprob_kind == types_pb2.LOGPROB_KIND_PROCESSED or (ordered and not reshaped):
        return -sum(each.logprob for each in output.logprobs) / math.log(2)
    if ordered and all(each.top for each in output.logprobs):
        return sum(_bits_at_least(each, given.temperature) for each in output.logprobs)
    return None


def _bits_at_least(drawn: types_pb2.TokenLogprobs, temperature: float) -> float:
    """Of one token: the likelier ones, by the temperature, and itself."""
    likelier = (top.logprob - drawn.logprob for top in drawn.top if top.logprob > drawn.logprob)
    return math.log2(1.0 + math.fsum(math.exp(min(each / temperature, 500.0)) for each in likelier))


def _free(parameters: types_pb2.ResolvedParameters) -> bool:
    return parameters.temperature > 0 and parameters.top_k != 1 and not parameters.HasField("response_format")
