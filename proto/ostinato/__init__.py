"""Reproducible text generation: every request ordered, every answer recorded, compared and replayable.

    from ostinato import SyncClient

    with SyncClient("localhost:7001") as client:
        for result in client.generate(["Shanghai is"] * 3, seed=1, top_k=40).results:
            print(result.sequence, result.output.text)

The words, one for each thing:

    sequence      the number of one item: from 1, without gaps, in order of admission; never given twice
    epoch         one incarnation of a sidecar; it rises at every start
    stamp         the sidecar's tag on a batch: log, writer, epoch, first sequence, count
    seed          any uint64; every item has one, given or derived, and it is always returned
    fingerprint   all but the request that determines an answer: weights, engine, versions, device
    grade         how far equal requests get equal answers, earned in a self-test: EXACT > SERIAL > BEST_EFFORT
    journal       the append-only, hash-chained record; its entries have an index, from 1, without gaps
    receipt       proof of a completed item: its entry's header and hashes, to be checked offline
    verdict       what became of two runs of one input: MATCH, DIVERGED or INCOMPARABLE
    replay        running a part of the journal again, to compare
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ostinato.client import Client as Client
    from ostinato.errors import OstinatoError as OstinatoError
    from ostinato.pem import tls as tls
    from ostinato.sync import SyncClient as SyncClient

__version__ = "0.1.0"

__all__ = ["Client", "OstinatoError", "SyncClient", "__version__", "tls"]

_HOMES = {
    "Client": "ostinato.client",
    "OstinatoError": "ostinato.errors",
    "SyncClient": "ostinato.sync",
    "tls": "ostinato.pem",
}


def __getattr__(name: str) -> object:
    """Loads a client at its first use: who only wants the digests does not wait for gRPC."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
