"""A face for OpenAI gateways: `vllm.grpc.engine.VllmEngine` over our own Generation.

sampling    their request as ours: mapped, or refused by name
answers     our events as theirs
servicer    the RPCs
"""

from __future__ import annotations

from types import ModuleType

from serving.program import StartupError


def face() -> ModuleType:
    """`servicer`, which alone needs a package of its own. Raises StartupError where that is missing."""
    try:
        from sidecar.gateway import servicer
    except ImportError as error:
        raise StartupError(f"--vllm-face: {error}; pip install 'ostinato[gateway]'") from error
    return servicer
