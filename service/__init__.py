"""The service: an engine behind gRPC, for one sidecar. It prepares prompts and runs them; it assigns no sequence numbers.

    __main__      `python -m service`: load the engine, test it, serve, drain
    config        settings from flags and environment
    chat          chats to text, by the model's template
    parse         tool calls and reasoning in an output's text
    prepare       items to token ids and resolved parameters, or every reason why not; bounds: what they are judged by
    stream        the Engine service: the Execute stream, and the runs
    fence         which sidecar may drive the engine, and what it may submit
    outbox        what waits to be written to the sidecar
    answer        the text of one answer as it grows, and where it ends
    description   who answers: model, limits, fingerprint, grade, capacity
    grade         the self-test; cases: its prompts; proofs: its results, kept for the next start
    observe       metrics and spans
    engines       llama, turbomind, scripted; `engines.base` is the protocol of an engine

A run's way: Prepare makes token ids and resolved parameters of an item. The sidecar numbers it and submits it in `stream`,
which hands it to the engine. The engine calls `answer.Answer.accept` for every token and reports events; `stream` writes them
back to the sidecar.

`engines` imports only `answer`. Nothing here imports the sidecar.
"""

import serving  # noqa: F401  # before any import of gRPC, which it tells to be silent
