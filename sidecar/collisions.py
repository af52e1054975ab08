"""How an answer was sampled, and collisions: unseeded items with equal inputs and equal outputs.

A collision shows that seeds have no effect. Equal outputs show it only if two independent answers would hardly be equal. The
probability of that is 2^-b, with b the bits of choice of the answer: the negative logarithm of its probability.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import msgspec

from ostinato.digest import by_content, output_digest, unseeded_input_digest
from ostinato.v1 import sequencer_pb2, types_pb2
from ostinato.v1.sequencer_pb2 import COLLISION_FOUND, COLLISION_NONE, COLLISION_UNSPECIFIED

TOKENS_MIN = 16
"""Shorter answers are not compared: they may be equal by chance."""
CHOICE_BITS_MIN = 32.0
"""Answers with fewer bits of choice are not compared. Of two independent answers one equals the other with a probability of at
most 2^-32: with 100,000 answers a day, each compared with 64 others, that is at most one false alarm in 670 days."""
DISTINCT_TOKEN_BITS = 1.25
"""Bits of each distinct token if no logprobs are known, times the temperature (at most 1) and the square of top_p. A repeated
token counts as 0 bits, so that a loop does not look like choice. This is an estimate from measurements of a small model
(docs/determinism.md); a model that is certain of its answer may have fewer."""


@by_content(types_pb2.ResolvedParameters)
def sampling_label(given: types_pb2.ResolvedParameters) -> str:
    """The sampling parameters that are not at their defaults and may matter to a divergence, or `defaults`.

    Numbers have at most six digits and a response format only its kind, so that similar items have the same label.
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


class Choice(msgspec.Struct, frozen=True):
    """The choice that an answer took."""

    tokens: int
    distinct_tokens: int
    logprobs_known: bool
    """Whether `bits` are computed from logprobs. If not, they are estimated from the distinct tokens."""
    bits: float
    """An independent answer is equal with probability 2^-bits."""


class Collisions:
    """The outputs of the `inputs_max` newest distinct inputs, at most `outputs_max` of each. An input is one of a group of
    tenants: no other group's outputs are compared with it.

    An item counts only if its seed was derived, if it is sampled freely (temperature above 0, top_k not 1, no response format),
    and if its answer has at least TOKENS_MIN tokens and CHOICE_BITS_MIN bits of choice. Two seeds that the engine maps to the
    same one must give the same answer, and do not collide.
    """

    def __init__(self, inputs_max: int = 4096, outputs_max: int = 64) -> None:
        self._inputs: OrderedDict[tuple[str, bytes], dict[bytes, int]] = OrderedDict()
        self._inputs_max = inputs_max
        self._outputs_max = outputs_max

    def check(
        self, group: str, given: sequencer_pb2.AdmittedPayload, output: types_pb2.Output
    ) -> sequencer_pb2.Collision.ValueType:
        """Whether an equal input of the group with another seed had this output. UNSPECIFIED if there is nothing to compare
        with, or if an equal output would show nothing."""
        parameters = given.parameters
        free = parameters.temperature > 0 and parameters.top_k != 1 and not parameters.HasField("response_format")
        if not (given.seed_derived and free) or len(output.token_ids) < TOKENS_MIN:
            return COLLISION_UNSPECIFIED
        if choice_of(parameters, output).bits < CHOICE_BITS_MIN:
            return COLLISION_UNSPECIFIED
        name, digest = (group, unseeded_input_digest(given.token_ids, parameters)), output_digest(output)
        seeds = self._inputs.setdefault(name, {})
        self._inputs.move_to_end(name)
        known = bool(seeds)
        collides = digest in seeds and seeds[digest] != output.engine_seed
        if len(seeds) < self._outputs_max:
            seeds.setdefault(digest, output.engine_seed)
        if len(self._inputs) > self._inputs_max:
            self._inputs.popitem(last=False)
        if not known:
            return COLLISION_UNSPECIFIED
        return COLLISION_FOUND if collides else COLLISION_NONE


def choice_of(parameters: types_pb2.ResolvedParameters, output: types_pb2.Output) -> Choice:
    """The bits of choice of an answer.

    PROCESSED logprobs are of the distribution that was sampled from, so their sum is the logarithm of the answer's probability.
    The same holds for RAW logprobs if no parameter changes the distribution. If one does, RAW logprobs with the likeliest
    tokens give a lower bound: temperature and truncation keep the order of tokens, so every token that is likelier than the
    sampled one could have been sampled too. A repetition penalty or a ban (an early end is banned too) changes that order;
    then logprobs are not used.
    """
    tokens, distinct = len(output.token_ids), len(set(output.token_ids))
    bits = _bits_from_logprobs(parameters, output)
    if bits is not None:
        return Choice(tokens, distinct, logprobs_known=True, bits=bits)
    estimate = distinct * DISTINCT_TOKEN_BITS * min(1.0, parameters.temperature) * (parameters.top_p or 1.0) ** 2
    return Choice(tokens, distinct, logprobs_known=False, bits=estimate)


def _bits_from_logprobs(given: types_pb2.ResolvedParameters, output: types_pb2.Output) -> float | None:
    """None if they cannot be used."""
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


def _bits_at_least(sampled: types_pb2.TokenLogprobs, temperature: float) -> float:
    """A lower bound for one token, from the tokens that are likelier."""
    likelier = (top.logprob - sampled.logprob for top in sampled.top if top.logprob > sampled.logprob)
    return math.log2(1.0 + math.fsum(math.exp(min(each / temperature, 500.0)) for each in likelier))
