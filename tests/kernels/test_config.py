import pytest

from deltacome_core.layout import TILE_CODES
from kernels.cases import BITS
from kernels.compile_matrix import KERNELS, TOKENS
from kernels.config import DOT_MINIMUM, choose_blocks


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("op", KERNELS)
def test_blocks_stay_within_a_packed_tile(op, bits):
    for n_tokens in TOKENS[op]:
        blocks = choose_blocks(op, bits=bits, n_tokens=n_tokens)
        assert TILE_CODES % blocks.reduction == 0
        if op == "merge":
            assert TILE_CODES % blocks.columns == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("op", KERNELS)
def test_blocks_of_a_dot_are_large_enough(op, bits):
    for n_tokens in (2, 16, 1000):
        blocks = choose_blocks(op, bits=bits, n_tokens=n_tokens)
        if blocks.tokens > 1:
            assert min(blocks.tokens, blocks.rows, blocks.reduction) >= DOT_MINIMUM
        if op == "merge":
            assert min(blocks.rows, blocks.columns, blocks.reduction) >= DOT_MINIMUM
