"""Reproducible text generation: every request is sequenced and recorded, and every output can be compared and replayed.

    from ostinato import SyncClient

    with SyncClient("localhost:7001") as client:
        for result in client.generate(["Shanghai is"] * 3, seed=1, top_k=40).results:
            print(result.sequence, result.output.text)

Terms:

    sequence      the number of an item: from 1, without gaps, in the order of admission; never assigned twice
    epoch         one run of a sidecar process; it increases at every start
    stamp         what the sidecar assigns to a batch: log, writer, epoch, first sequence, count
    seed          any uint64. Every item has one, given or derived, and it is always returned
    fingerprint   everything but the request that determines an output: weights, engine, versions, device
    grade         how reliably equal requests get equal outputs, as a self-test showed: EXACT > SERIAL > BEST_EFFORT
    journal       the append-only, hash-chained record. Its entries have an index, from 1, without gaps
    receipt       the proof of a completed item: the header of its entry and its hashes. It can be verified offline
    verdict       the result of comparing two runs of one input: MATCH, DIVERGED or INCOMPARABLE
    replay        to run recorded items again and compare
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ostinato.client import Client as Client
    from ostinato.client import tls as tls
    from ostinato.errors import OstinatoError as OstinatoError
    from ostinato.sync import SyncClient as SyncClient

__version__ = "0.1.0"

__all__ = ["Client", "OstinatoError", "SyncClient", "__version__", "tls"]

_MODULES = {
    "Client": "ostinato.client",
    "OstinatoError": "ostinato.errors",
    "SyncClient": "ostinato.sync",
    "tls": "ostinato.client",
}


def __getattr__(name: str) -> object:
    """Imports the public names at their first use, so that `import ostinato` does not load gRPC."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def install_hint(extra: str) -> str:
    """What to type to install an extra. No package index has this package."""
    return f"pip install '.[{extra}]' in a checkout, or 'ostinato-{__version__}-py3-none-any.whl[{extra}]'"
