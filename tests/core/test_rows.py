"""The rows of embeddings and heads: as they are, or as coordinates in a basis."""

from dataclasses import replace

import pytest
import torch

from deltacome_core.errors import UserError
from deltacome_core.parts import describe
from deltacome_core.payload import check_packed, rows_from_payload, rows_to_payload
from deltacome_core.recipe import get_recipe
from deltacome_core.rows import basis_bytes, choose_rank, plain_bytes, vocabulary_bytes
from deltacome_core.vocabulary import VocabularyUse, pack_vocabulary

COME = get_recipe("come")
CPU = torch.device("cpu")
SMALL = replace(COME, vocabulary_bits=1.0, vocabulary_rank=16)


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost(rows, base, tuned):
    scale = 1.0 if rows.base_scale is None else rows.base_scale
    return base * scale + rows.dequantise() - tuned


def relative_error(rows, base, tuned):
    return float(torch.linalg.norm(lost(rows, base, tuned)) / torch.linalg.norm(tuned - base))


def draw_pair(rows=2000, cols=256):
    """A delta of falling spectrum, rows of very different size, and its backbone."""
    base = draw(rows, cols)
    sizes = torch.logspace(-3, 0, rows)[:, None]
    spectrum = torch.logspace(0, -5, cols)
    delta = sizes * ((draw(rows, cols, seed=3) * spectrum) @ draw(cols, cols, seed=4))
    return base, base + 0.01 * delta


def test_only_changed_rows_are_quantised():
    base = draw(300, 64)
    tuned = base.clone()
    tuned[[3, 7, 299]] += 0.1 * draw(3, 64, seed=4)
    rows = pack_vocabulary("embed", base, tuned, COME, device=CPU)
    assert rows.changed.nonzero().flatten().tolist() == [3, 7, 299]
    assert rows.factor.rows == 3
    assert rows.new_rows is None
    # 4 bits over the full range of a Gaussian group leave about 9 % of the norm.
    error = torch.linalg.norm(rows.dequantise() - (tuned - base)) / torch.linalg.norm(tuned - base)
    assert error < 0.12


def test_new_rows_are_exact_and_in_their_own_dtype():
    base, tuned = draw(50, 64).bfloat16(), draw(53, 64, seed=2).bfloat16()
    rows = pack_vocabulary("embed", base, tuned, COME, device=CPU)
    assert torch.equal(rows.new_rows, tuned[50:])
    assert rows.changed.all()


def test_untouched_rows_with_new_ones_cost_no_codes():
    base = draw(50, 64)
    rows = pack_vocabulary("embed", base, torch.cat([base, draw(2, 64)]), COME, device=CPU)
    assert rows.factor is None
    assert not rows.changed.any()


def test_a_budget_below_four_bits_makes_a_basis_within_it():
    base, tuned = draw_pair()
    rows = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    assert rows.basis.dtype == torch.bfloat16
    assert rows.basis.shape == (choose_rank(2000, 256, 2000, SMALL), 256)
    assert vocabulary_bytes(2000, 256, 2000, SMALL) <= base.numel() / 8
    assert relative_error(rows, base, tuned) < 0.5


def test_a_larger_budget_is_used_and_loses_less():
    base, tuned = draw_pair()
    errors, sizes = [], []
    for bits in (0.7, 1.4, 2.8):
        recipe = replace(SMALL, vocabulary_bits=bits)
        rows = pack_vocabulary("embed", base, tuned, recipe, device=CPU)
        errors.append(relative_error(rows, base, tuned))
        sizes.append(vocabulary_bytes(2000, 256, 2000, recipe))
        # One more step of the rank would be 128 bits a row.
        assert 0 <= bits * base.numel() / 8 - sizes[-1] < 128 * 2000 / 8 + 16 * 256 * 2 + 256
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_rows_that_fit_the_budget_stay_rows():
    base = draw(400, 128)
    tuned = base.clone()
    tuned[:20] += draw(20, 128, seed=2)
    rows = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    assert rows.basis is None
    assert plain_bytes(400, 128, 20, SMALL) <= base.numel() / 8


def test_a_basis_is_never_larger_than_the_rows():
    narrow = replace(SMALL, vocabulary_rank=64)
    assert choose_rank(500, 64, 500, narrow) is None
    assert basis_bytes(500, 64, 500, 64) >= plain_bytes(500, 64, 500, narrow)


def test_a_basis_beside_unchanged_and_new_rows():
    base, tuned = draw_pair()
    tuned[100:200] = base[100:200]
    grown = torch.cat([tuned, draw(3, 256, seed=9)])
    rows = pack_vocabulary("embed", base, grown, SMALL, device=CPU)
    assert not rows.dequantise()[100:200].any()
    assert torch.equal(rows.new_rows, grown[2000:])
    assert relative_error(rows, base, tuned) < 0.5


def test_a_basis_follows_what_is_read():
    """Directions that the head reads strongly, and rows of frequent tokens, lose less."""
    base, tuned = draw_pair()
    scales = torch.ones(256)
    scales[200:] = 30.0
    mixing = torch.linalg.qr(draw(256, 256, seed=5)).Q
    hessian = mixing.T @ torch.diag(scales) @ mixing
    counts = torch.zeros(2000)
    counts[:50] = 100.0
    plain = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    use = VocabularyUse(counts=counts, hessian=hessian)
    fitted = pack_vocabulary("embed", base, tuned, SMALL, device=CPU, use=use)

    def read_error(rows, these):
        missing = lost(rows, base, tuned)[these]
        return float(torch.einsum("ri,ij,rj->", missing, hessian, missing))

    everything = slice(None)
    assert read_error(fitted, everything) < 0.9 * read_error(plain, everything)
    only_counts = VocabularyUse(counts=counts, hessian=None)
    counted = pack_vocabulary("embed", base, tuned, SMALL, device=CPU, use=only_counts)
    assert read_error(counted, slice(50)) < read_error(plain, slice(50))


def test_the_product_with_the_basis_is_exact():
    base, tuned = draw_pair(rows=300)
    rows = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    wanted = rows.factor.dequantise().double() @ rows.basis.double()
    assert torch.allclose(
        rows.dequantise().double(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max()
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(rows.dequantise(), rows.dequantise())


@pytest.mark.parametrize("bits", [0.0, 9.0])
def test_bits_of_vocabularies_have_limits(bits):
    with pytest.raises(UserError, match="bits of vocabularies"):
        replace(COME, vocabulary_bits=bits)


def test_rows_that_all_decayed_cost_one_number():
    base, tuned = draw_pair()
    decayed = tuned - 0.05 * base
    rows = pack_vocabulary("embed", base, decayed, SMALL, device=CPU)
    assert abs(float(rows.base_scale) - 0.95) < 1e-4
    plain = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    found = [
        torch.linalg.norm(lost(rows, base, decayed)),
        torch.linalg.norm(lost(plain, base, tuned)),
    ]
    assert found[0] < 1.05 * found[1]


def test_rows_are_scaled_only_where_all_of_them_changed():
    base, tuned = draw_pair()
    tuned[7] = base[7]
    rows = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    assert rows.basis is not None
    assert rows.base_scale is None


@pytest.mark.parametrize("scale", [float("nan"), -0.5, 2.0**11])
def test_a_base_scale_no_writer_gives_is_refused(scale):
    base, tuned = draw_pair(rows=300)
    rows = pack_vocabulary("embed", base, tuned, SMALL, device=CPU)
    bad = replace(rows, base_scale=torch.tensor([scale]))
    entry = describe(bad, dtype="F32")
    stored = torch.frombuffer(bytearray(rows_to_payload(entry, bad)), dtype=torch.uint8)
    read = rows_from_payload(entry, stored, None)
    with pytest.raises(UserError, match="base scale"):
        check_packed(read, stored, entry.payload)
