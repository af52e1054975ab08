"""How many blocks can be promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.turbomind.memory import PAGE, block_bytes, blocks, needed

MIB = 1 << 20


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "bits", "expected"),
    [(32, 8, 128, 16, 8 * MIB), (30, 3, 64, 16, 1_474_560), (80, 8, 128, 16, 20 * MIB), (32, 8, 128, 8, 4 * MIB + 131_072)],
)
def test_a_block_has_keys_and_values_of_every_layer(
    layers: int, kv_heads: int, head_dim: int, bits: int, expected: int
) -> None:
    """Of 64 tokens; those of an 8B model are 8 MiB."""
    assert block_bytes(layers=layers, kv_heads=kv_heads, head_dim=head_dim, block_tokens=64, kv_bits=bits) == expected


def test_whole_pages_of_an_8b_models_blocks() -> None:
    """Four to a page, one page lost to alignment, and one block set aside for each run."""
    region = 100 * PAGE

    assert blocks(share=8 * MIB / region, size=8 * MIB, runs=16) == 99 * 4 - 16


def test_blocks_that_fill_a_slab_badly_take_a_larger_slab() -> None:
    """20 MiB fit 25 times into 512 MiB, which are 16 pages; of 100 pages six slabs can be made."""
    region = 100 * PAGE

    assert blocks(share=20 * MIB / region, size=20 * MIB, runs=10) == 6 * 25 - 10


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, 0.9])
def test_there_is_always_one_block(share: float) -> None:
    """A share that was not seen, or makes no sense, promises next to nothing."""
    assert blocks(share=share, size=8 * MIB, runs=256) == 1


@given(size=st.integers(1, 1 << 28), count=st.integers(2, 20_000), runs=st.integers(1, 1024))
def test_never_more_is_promised_than_the_region_holds(size: int, count: int, runs: int) -> None:
    """With what is set aside."""
    found = blocks(share=1 / count, size=size, runs=runs)

    assert found == 1 or found + runs <= count


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (64, 1), (65, 2), (4096, 64)])
def test_a_run_needs_whole_blocks(tokens: int, expected: int) -> None:
    """As the sidecar counts them."""
    assert needed(tokens, 64) == expected
