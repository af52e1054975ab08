"""What LMDeploy is called with, recorded by a stand-in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service.engines.base import EngineUnusable
from service.engines.turbomind import PIECES_TOKENS, STEP_CONTEXT_TOKENS, TurbomindOptions
from service.engines.turbomind import native as native_module
from service.engines.turbomind.model import Model
from service.engines.turbomind.native import Account, Load, Native, Progress, import_lmdeploy
from service.engines.turbomind.probe import first_run
from service.engines.turbomind.request import Request
from tests.service.turbomind_kit import MODEL

Ring = Callable[[], None]
REQUEST = Request(8, 0, 40, 0.9, 0.0, 0.7, 1.1, 2**64 - 1, (2,), (2, 5), (7,), 3, True)


class Instance:
    """TurboMind's ModelRequest: answers at once with token ids that count up, and ends at the length."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def set_grammar(self, grammar: object) -> None:
        self.calls.append(("grammar", grammar))

    def cancel(self) -> None:
        self.calls.append("cancel")

    def forward(self, inputs: Any, images: None, session: Any, config: Any, stream: bool, metrics: bool, change: Ring) -> Any:
        self.calls.append(("forward", inputs, images, vars(session), vars(config), stream, metrics))
        prompt = inputs["input_ids"]
        ids = np.array([*prompt, *range(100, 100 + config.max_new_tokens)], np.int32)
        states = [SimpleNamespace(status=7, seq_len=len(ids)), SimpleNamespace(status=0, seq_len=len(prompt) + 1)]
        outputs = {
            "output_ids": ids,
            "logprob_nums": np.array([2, 1], np.int32),
            "logprob_indexes": np.array([[9, 8, 0], [7, 0, 0]], np.int32),
            "logprob_vals": np.array([[-0.1, -3.0, 0.0], [0.0, 0.0, 0.0]], np.float32),
        }

        def consume() -> Any:
            state = states.pop() if states else None
            if states:
                change()
            return state

        change()
        return (
            outputs,
            SimpleNamespace(consume=consume),
            SimpleNamespace(enqueue_time=1_500_000, scheduled_time=0, cached_tokens=0),
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of LMDeploy; LMDeploy and torch are stand-ins."""
    made: list[Any] = []
    tm = SimpleNamespace(
        TensorMap=dict,
        from_dlpack=lambda tensor: tensor,
        SessionParam=lambda id, step: SimpleNamespace(id=id, step=step),  # noqa: A006  # pybind's name
        GenerationConfig=SimpleNamespace,
        EngineConfig=SimpleNamespace,
    )
    comm = SimpleNamespace(
        create_request=lambda: Instance(made),
        get_schedule_metrics=lambda rank: SimpleNamespace(
            scheduler_tick=3, cache_usage=0.05, active_seqs=2, waiting_seqs=1, prefix_cache_hit_rate=0.0
        ),
    )

    def from_pretrained(path: str, engine_config: Any) -> Any:
        made.append((path, engine_config, vars(tm.EngineConfig())))
        if path.endswith("broken"):
            raise AssertionError("mismatched quant method")
        return SimpleNamespace(
            engine_config=SimpleNamespace(dtype="float16"), _vocab_size=300, model_comm=comm, close=lambda: None
        )

    turbomind = ModuleType("lmdeploy.turbomind")
    vars(turbomind).update(_tm=tm, is_available=lambda: True, TurboMind=SimpleNamespace(from_pretrained=from_pretrained))
    package = ModuleType("lmdeploy")
    vars(package).update(TurbomindEngineConfig=lambda **given: given, turbomind=turbomind)
    torch = SimpleNamespace(
        tensor=lambda ids, dtype: list(ids), int32="int32", from_dlpack=lambda array: SimpleNamespace(numpy=lambda: array)
    )
    monkeypatch.setitem(sys.modules, "lmdeploy", package)
    monkeypatch.setitem(sys.modules, "lmdeploy.turbomind", turbomind)
    monkeypatch.setattr(
        native_module, "module", {"torch": torch, "lmdeploy": package, "lmdeploy.turbomind": turbomind}.__getitem__
    )
    return made


def test_the_engine_is_set_up_as_the_options_say(calls: list[Any]) -> None:
    """Blocks of decodes are never published, every limit is named, and a step has room for new prompts, one in pieces and a
    deferred one."""
    native = Native(TurbomindOptions(context_tokens=16_384, runs=64, kv_bits=8, dtype="float16"), MODEL)

    assert (native.dtype, native.vocabulary_size) == ("float16", 300)
    assert calls == [
        (
            "/models/tiny",
            {
                "dtype": "float16",
                "model_format": None,
                "tp": 1,
                "communicator": "nccl",
                "session_len": 16_384,
                "max_batch_size": 64,
                "cache_max_entry_count": 0.8,
                "cache_block_seq_len": 64,
                "enable_prefix_caching": False,
                "cache_prompt": "auto",
                "cache_generation": "none",
                "quant_policy": 8,
                "max_prefill_token_num": PIECES_TOKENS,
                "enable_metrics": True,
            },
            {"max_context_token_num": STEP_CONTEXT_TOKENS + 2 * 16_384, "tune_layer_num": 1},
        )
    ]


def test_a_run_is_handed_over_with_all_its_parameters(calls: list[Any]) -> None:
    """Stop and forbidden tokens are passed as words of one token; unset values keep TurboMind's defaults."""
    native = Native(TurbomindOptions(), MODEL)
    rung: list[int] = []
    handle = native.start(17, (4, 5, 6), REQUEST, "grammar", lambda: rung.append(1))

    assert calls[1:] == [
        ("grammar", "grammar"),
        (
            "forward",
            {"input_ids": [4, 5, 6]},
            None,
            {"id": 17, "step": 0},
            {
                "max_new_tokens": 8, "min_new_tokens": 0, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "temperature": 0.7,
                "repetition_penalty": 1.1, "random_seed": 2**64 - 1, "output_logprobs": 3, "eos_ids": [2],
                "stop_ids": [[2, 5], [1, 2]], "bad_ids": [[7], [1]],
            },
            True,
            True,
        ),
    ]  # fmt: skip
    assert ([handle.poll(), handle.poll(), handle.poll()], rung) == ([Progress(0, 4), Progress(7, 11), None], [1, 1])
    assert handle.ids(3, 6) == [100, 101, 102]
    assert [each.tolist() for each in handle.logprobs(0)] == [[9, 8], np.array([-0.1, -3.0], np.float32).tolist()]
    assert (handle.scheduled, handle.account, native.load()) == (False, Account(1.5, 0.0, 0), Load(3, 0.05, 2, 1, 0.0))


def test_what_turbomind_says_against_a_model_is_passed_on(calls: list[Any]) -> None:
    """TurboMind's assertions about a model become EngineUnusable."""
    broken = Model(Path("/models/broken"), 4096, 300, 2, 2, 2, 16, "none", 0, 1, frozenset(), "")

    with pytest.raises(EngineUnusable, match="cannot load /models/broken: AssertionError: mismatched quant method"):
        Native(TurbomindOptions(), broken)


def test_the_first_run_shows_what_a_block_is_of_the_cache(calls: list[Any]) -> None:
    """The first run fills four blocks and a part of a fifth, so the share of one block can be computed."""
    share = first_run(Native(TurbomindOptions(), MODEL), 4096)
    _, inputs, *_, config, stream, _ = next(call for call in calls if call[0] == "forward")

    assert share == pytest.approx(0.05 / 5)
    assert (len(inputs["input_ids"]), config["max_new_tokens"], stream) == (4 * 64 + 8, 16, True)
    assert max(inputs["input_ids"]) < 300


@pytest.mark.parametrize("context", [2, 3, 64, 100, 300])
def test_the_first_run_fits_every_context(context: int, calls: list[Any]) -> None:
    """The first run fits the smallest contexts."""
    first_run(Native(TurbomindOptions(context_tokens=context, runs=1), MODEL), context)
    _, inputs, *_, config, _, _ = next(call for call in calls if call[0] == "forward")

    assert 1 <= len(inputs["input_ids"]) <= context - config["max_new_tokens"] < context


def test_importing_it_leaves_our_log_alone(calls: list[Any]) -> None:
    """Importing LMDeploy leaves other log handlers as they were, and removes its own."""
    handler, root, own = logging.StreamHandler(), logging.getLogger(), logging.getLogger("lmdeploy")
    root.addHandler(handler)
    own.addHandler(logging.NullHandler())
    own.propagate = False
    try:
        import_lmdeploy()
    finally:
        root.removeHandler(handler)

    assert (handler.level, own.handlers, own.propagate, own.level) == (logging.NOTSET, [], True, logging.WARNING)
