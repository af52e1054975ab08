"""`python -m tests.gpu.doctored MODEL STATE FAULT`: what the proofs of a start say of overrides that compute otherwise.

MODEL has products of TurboMind's own kernels, such as a mixture of experts. FAULT is one of

places  in the second trial of own kernels the other products are computed by cuBLAS's choice, which depends on the batch;
        in the third, decodes cut their attention into parts: another order of the same sum, whatever else runs
pieces  prompts are cut into pieces of half the size

Prints one line of JSON: the best grade that the start allows and why, the trials' classes, and the kernels left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostinato.v1 import types_pb2

from service.engines.turbomind import PIECE_TOKENS, TurbomindOptions, exactness, host, probe
from service.engines.turbomind.engine import load
from service.engines.turbomind.overrides import Mode, Overrides
from tests.gpu import shapes
from tests.gpu.plan import Plan
from tests.gpu.stack import python

PLACES, PIECES = "places", "pieces"
COMPANY, ORDER = 1, 2
"""Trials with a fault."""
PARTS, RUNS = 8, 64
SHAPE, LAYERS = "qwen3-moe", 4
SECONDS = 150.0


def doctored(fault: str) -> type[Overrides]:
    class Doctored(Overrides):
        trial = -1

        def kernels(self, permitted: Mapping[tuple[int, ...], Sequence[int]]) -> None:
            super().kernels(permitted)
            self.trial += 1
            self.mode(Mode.STOCK if fault == PLACES and self.trial == COMPANY else Mode.SERVE)
            self.configure(host.turbomind_library(), PARTS if fault == PLACES and self.trial == ORDER else 1)

        def pieces(self, piece_tokens: int, step_tokens: int, context_tokens: int) -> None:
            super().pieces(PIECE_TOKENS // 2 if fault == PIECES else piece_tokens, step_tokens, context_tokens)

    return Doctored


def wrong(fault: str, told: Mapping[str, Any]) -> str:
    """What the proofs did not find; empty: they found the fault, and nothing else."""
    classes = told["classes"]
    others = {each for place, each in enumerate(classes) if place not in (COMPANY, ORDER)}
    if fault == PIECES:
        found = told["grade"] == "GRADE_BEST_EFFORT" and told["reason"].startswith("TurboMind computed a prompt of ")
    else:
        found = told["grade"] == "GRADE_EXACT" and len(told["excluded"]) == 2
        found = found and (classes[COMPANY], classes[ORDER], others) == (-1, 1, {0})
    return "" if found else f"{told['grade']}: {told['reason']}, classes {classes}"


async def check(plan: Plan) -> None:
    """Both faults, of a mixture of experts that is made for them."""
    making = await shapes.begin(SHAPE, plan.model, plan.state, LAYERS)
    try:
        model = await making.ready()
        for fault in (PLACES, PIECES):
            arguments = "-m", "tests.gpu.doctored", str(model), str(plan.state / "doctored"), fault
            process = await python(*arguments, stderr=asyncio.subprocess.DEVNULL)
            try:
                output, _ = await asyncio.wait_for(process.communicate(), SECONDS)
            finally:
                if process.returncode is None:
                    process.kill()
            told = json.loads(output.splitlines()[-1])
            if text := wrong(fault, told):
                plan.bad.append(f"sabotage: the fault {fault} is not found: {text}")
            plan.tell(f"sabotage fault {fault}: {told['grade']}, classes {told['classes']}, {len(told['excluded'])} left out")
    finally:
        await making.remove()


def main() -> None:
    model, state, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    proofs: list[probe.KernelProof] = []
    prove: Any = probe.prove_kernels

    def kept(*given: Any) -> probe.KernelProof:
        proofs.append(prove(*given))
        return proofs[-1]

    setattr(exactness, "Overrides", doctored(fault))  # noqa: B010  # the module's own name for it
    setattr(probe, "prove_kernels", kept)  # noqa: B010
    options = TurbomindOptions(model=model, state_dir=state / fault, runs=RUNS, cache_fraction=0.1, prefix_cache="off")
    grade, reason = load(options).ceiling
    classes, excluded = next(((proof.classes, proof.excluded) for proof in proofs), ((), ()))
    told = {"grade": types_pb2.Grade.Name(grade), "reason": reason, "classes": classes, "excluded": excluded}
    print("\n" + json.dumps(told), flush=True)
    os._exit(0)  # LMDeploy's threads do not always end


if __name__ == "__main__":
    main()
