"""An engine without a model: deterministic, instant, and as badly behaved as its script says.

    script       what it is told to be and to do, as strict JSON
    vocabulary   one token for each byte, an end token and a few control tokens
    tokens       which token comes next, from hashes
    engine       the runs, on the event loop, with no thread

For tests, simulations and benchmarks, and for trying the whole system on a machine that has no model.
"""

from service.engines.scripted.engine import ScriptedEngine
from service.engines.scripted.script import Rule, Script, parse

__all__ = ["Rule", "Script", "ScriptedEngine", "parse"]
