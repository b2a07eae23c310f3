"""Codes in operand order: where a lane finds its words, and how they become signed bytes."""

import triton
import triton.language as tl


@triton.jit
def locate_pair(codes_ptr, high_ptr, block, pair, n_steps, lane, BITS: tl.constexpr):
    """Pointers [threads] to the words of a pair of steps of one block of 16 rows.

    Args:
        codes_ptr: int32 words in operand order (kernels/fragments.py).
        high_ptr: int32 words of the third bit; unread at other widths.
        block: int32 [threads], the row block.
        pair: int32 [threads], number of the pair of steps.
        n_steps: Steps of a row of blocks.
        lane: int32 [threads], 0..31.
        BITS: 1, 2, 3, 4 or 8.

    Returns:
        One pointer, of three bits two: the low plane's words and those of the third bit.
    """
    n_pairs = (n_steps + 1) // 2
    if BITS == 1:
        places = (codes_ptr + (block * n_pairs + pair) * 32 + lane,)
    elif BITS == 2:  # noqa: PLR2004 the interpreter cannot shift by a named tl.constexpr
        places = (codes_ptr + (block * n_steps + 2 * pair) * 32 + lane,)
    elif BITS == 3:  # noqa: PLR2004 same
        low_ptr = codes_ptr + (block * n_steps + 2 * pair) * 32 + lane
        places = (low_ptr, high_ptr + (block * n_pairs + pair) * 32 + lane)
    else:
        low_ptr = codes_ptr + (block * n_steps + 2 * pair) * (16 * BITS) + 2 * lane
        places = (low_ptr.to(tl.pointer_type(tl.int64)),)
    return places


@triton.constexpr_function
def elements_of_pair(bits):
    """Elements between the words of a pair and those of the next one, each as it is pointed to."""
    return {1: (32,), 2: (64,), 3: (64, 32), 4: (64,), 8: (128,)}[bits]


@triton.jit
def move_places(places, PAIRS: tl.constexpr, BITS: tl.constexpr):
    """`places` of `locate_pair` moved on by PAIRS pairs."""
    moved = ()
    for i in tl.static_range(len(places)):
        moved += (places[i] + PAIRS * elements_of_pair(BITS)[i],)
    return moved


@triton.constexpr_function
def cache_of(past_l1):
    """The cache modifier of codes."""
    return ".cg" if past_l1 else ""


@triton.constexpr_function
def policy_of(past_l1):
    """The eviction policy of codes, which the loads of a loop build anew in every round."""
    return "" if past_l1 else "evict_first"


@triton.jit
def load_words(at, mask, PAST_L1: tl.constexpr) -> tl.tensor:
    """Codes, which are read once: they should not push activations out of the caches."""
    return tl.load(
        at,
        mask=mask,
        other=0,
        cache_modifier=cache_of(PAST_L1),
        eviction_policy=policy_of(PAST_L1),
    )


@triton.jit
def load_pair(places, left, PAIR: tl.constexpr, BITS: tl.constexpr, PAST_L1: tl.constexpr):
    """Words of two steps of one block of 16 rows, one int32 [threads] each.

    Args:
        places: Of `locate_pair`.
        left: int32 [threads], steps from there to the end of the row.
        PAIR: Which of the pairs that follow.
        BITS: 1, 2, 3, 4 or 8.
        PAST_L1: Load past the first cache, not to be evicted first from both.

    Returns:
        1, 2, 3, 4 or 8 words; those of a step that does not exist are 0.
    """
    # Offsets known to the compiler are part of the load; the pointers are all that is computed.
    at = move_places(places, PAIR, BITS)
    first = left > 2 * PAIR
    second = left > 2 * PAIR + 1
    words = ()
    if BITS == 1:
        words += (load_words(at[0], first, PAST_L1),)
    elif BITS <= 3:  # noqa: PLR2004 same
        words += (load_words(at[0], first, PAST_L1), load_words(at[0] + 32, second, PAST_L1))
        if BITS == 3:  # noqa: PLR2004 same
            words += (load_words(at[1], first, PAST_L1),)
    else:
        for part in tl.static_range(BITS // 2):
            mask = second if part >= BITS // 4 else first
            wide = load_words(at[0] + 32 * part, mask, PAST_L1)
            words += (wide.to(tl.int32), (wide >> 32).to(tl.int32))
    return words


@triton.jit
def locate_blocks(
    codes_ptr,
    high_ptr,
    first_block,
    n_blocks,
    n_steps,
    first_pair,
    lane,
    BITS: tl.constexpr,
    R: tl.constexpr,
):
    """`locate_pair` of R row blocks; blocks beyond the last are the last one."""
    places = ()
    for r in tl.static_range(R):
        block = tl.minimum(first_block + r, n_blocks - 1)
        places += (locate_pair(codes_ptr, high_ptr, block, first_pair, n_steps, lane, BITS),)
    return places


@triton.jit
def move_blocks(places, PAIRS: tl.constexpr, BITS: tl.constexpr):
    """`places` of `locate_blocks` moved on by PAIRS pairs."""
    moved = ()
    for r in tl.static_range(len(places)):
        moved += (move_places(places[r], PAIRS, BITS),)
    return moved


@triton.jit
def load_blocks(places, left, PAIR: tl.constexpr, BITS: tl.constexpr, PAST_L1: tl.constexpr):
    """Words of one pair of all row blocks, a tuple of `load_pair` for each.

    Args:
        places: Of `locate_blocks`.
        left: Of `load_pair`.
        PAIR: Same.
        BITS: Same.
        PAST_L1: Same.
    """
    words = ()
    for r in tl.static_range(len(places)):
        words += (load_pair(places[r], left, PAIR, BITS, PAST_L1),)
    return words


@triton.jit
def load_ahead(places, left, BITS: tl.constexpr, U: tl.constexpr, PAST_L1: tl.constexpr):
    """Words of U pairs of all row blocks, those of a pair together.

    Args:
        places: Of `locate_blocks`.
        left: Of `load_pair`.
        BITS: Same.
        U: Pairs of steps.
        PAST_L1: Of `load_pair`.

    Returns:
        U times as many tuples of `load_pair` as there are blocks.
    """
    words = ()
    for i in tl.static_range(U):
        words += load_blocks(places, left, i, BITS, PAST_L1)
    return words


@triton.jit
def replace_blocks(ahead, later, PAIR: tl.constexpr, BITS: tl.constexpr):  # noqa: ARG001
    """`ahead` with the words of the PAIR-th pair replaced by `later`, of `load_blocks`.

    BITS tells apart what Triton 3.6 names alike: six tuples of three words and eighteen of one.
    """
    first: tl.constexpr = PAIR * len(later)
    return ahead[:first] + later + ahead[first + len(later) :]


@triton.jit
def unpack_step(words, marker, STEP: tl.constexpr, BITS: tl.constexpr):
    """Codes of one step of a pair: four int32 [threads] of four signed bytes each.

    A code c of b bits is kept as c - 2^(b - 1) in b bits, with a one below it in the byte: that is
    2^(7 - b) times the odd number 2 c - (2^b - 1), whose zero point is 0. Eight bits leave no room
    for the one; their byte is c - 128.

    Args:
        words: Of `load_pair`.
        marker: int32, the bit below each code, of `directory.mark_codes`.
        STEP: 0 or 1.
        BITS: 1, 2, 3, 4 or 8.

    Returns:
        The operand `a` of `multiply_step`.
    """
    codes = ()
    # Masks whose highest bit is set are written as the negative numbers they are in 32 bits.
    for i in tl.static_range(4):
        if BITS == 8:  # noqa: PLR2004 same
            codes += (words[4 * STEP + i],)
        elif BITS == 4:  # noqa: PLR2004 same
            code = (words[2 * STEP + i // 2] << (4 - 4 * (i % 2))) & -0x0F0F0F10
            codes += (code | marker,)
        elif BITS == 1:
            codes += (((words[0] << (7 - 4 * STEP - i)) & -0x7F7F7F80) | marker,)
        elif BITS == 2:  # noqa: PLR2004 same
            codes += (((words[STEP] << (6 - 2 * i)) & -0x3F3F3F40) | marker,)
        else:
            if i == 3:  # noqa: PLR2004 same
                low = (words[STEP] >> 1) & 0x60606060
            else:
                low = (words[STEP] << (5 - 2 * i)) & 0x60606060
            high = (words[2] << (7 - 4 * STEP - i)) & -0x7F7F7F80
            codes += ((low ^ marker) | high,)
    return codes
