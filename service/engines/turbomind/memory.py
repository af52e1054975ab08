"""How many blocks the KV cache holds. Pure.

TurboMind does not say. It says which part of its region is in use, so the part of one block is measured while one run has a
known number of them; the rest is how its allocator cuts a region up: into pages, slabs of a power of two of them, and blocks.
"""

from __future__ import annotations

PAGE = 32 << 20
SLAB_MAX = 1 << 30
FULL_ENOUGH = 0.95
"""Slabs are doubled until blocks fill this much of them."""


def block_bytes(*, layers: int, kv_heads: int, head_dim: int, block_tokens: int, kv_bits: int) -> int:
    """Of keys and values of one block on one GPU; quantised, each head of a token has a scale and a zero point of 16 bits."""
    heads = 2 * layers * kv_heads * block_tokens
    return heads * head_dim * kv_bits // 8 + (heads * 4 if kv_bits < 16 else 0)


def blocks(*, share: float, size: int, runs: int) -> int:
    """How many blocks can be promised, where one of `size` bytes is `share` of the region. At least 1.

    A run may take one more than it needs, for a token too many that is under way when it ends: that is set aside.
    """
    if not 0 < share <= 1:
        return 1
    region = int(size / share)
    slab = max(PAGE, 1 << (size - 1).bit_length())
    while slab // size * size < FULL_ENOUGH * slab and slab < SLAB_MAX:
        slab *= 2
    pages = max(0, region - PAGE) // PAGE  # the region's beginning is moved to a page's
    return max(1, pages // (slab // PAGE) * (slab // size) - runs)


def needed(tokens: int, block_tokens: int) -> int:
    """Blocks for a prompt and the longest answer together."""
    return -(-tokens // block_tokens)
