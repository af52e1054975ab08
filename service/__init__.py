"""The service: an engine behind gRPC, for one sidecar. It prepares, runs, and knows what it is worth; it gives no numbers.

    __main__      `python -m service`: the wiring
    config        settings from flags and environment
    opening       from settings to a service that answers: load, test, describe
    servicer      RPCs to what does the work

    prepare       items in, token ids and resolved parameters out, or every reason why not
    prompts         text, ids and chats to token ids
    parameters      sampling parameters: judged, merged, resolved
    limits          how much a request may ask for
    lexicon         what has to be known of a whole vocabulary

    stream        the Execute stream
    fence           which sidecar may drive the engine
    submissions     what a stream may submit
    outbox          what waits to be written
    runs          between the engine and its users: ids, deadlines, ends
    answer        one answer as it grows: where it ends, for every engine
    stops           stop strings in a growing text

    description   who answers: model, limits, fingerprint, grade, capacity
    grade           the grade that is held; it only falls
    selftest        how it is earned
    probes            what the self-test asks
    proof           what it found, kept for the next start
    metrics       what is counted and timed

    engines       llama, turbomind, scripted; `engines.base` says what an engine is

A run's way: Prepare makes token ids and resolved parameters of an item; the sidecar numbers it and submits it in `stream`;
`runs` hands it to the engine, which calls `answer.accept` for every token and reports events; those go through `runs` and the
stream's `outbox` back to the sidecar.

Arrows point down: `engines` knows only `answer`; nothing here knows the sidecar.
"""

import serving  # noqa: F401  # before any import of gRPC, which it tells to be silent
