import pytest

from kernels import tuning
from kernels.plan import place_tokens
from kernels.tuning import choose_shape, load_table


def test_tokens_of_a_slot_stand_together():
    places = place_tokens([3, -1, 0, 3, 0, 3])
    assert places.slots.tolist() == [0, 0, 3, 3, 3, -1]
    assert places.tokens.tolist() == [2, 4, 0, 3, 5, -1]
    # A pair of each slot, and the third token alone.
    assert places.counts.tolist() == [2, 2, 2, 2, 1, 1]
    assert places.numbers.tolist() == [0, 1, 0, 1, 0, 0]


def test_tokens_stand_together_in_powers_of_two():
    places = place_tokens([7] * 11 + [8] * 4)
    assert places.counts.tolist() == [4] * 8 + [2, 2, 1] + [4] * 4
    assert places.numbers.tolist() == [0, 1, 2, 3] * 2 + [0, 1, 0] + [0, 1, 2, 3]


def test_a_batch_of_the_backbone_takes_no_place():
    assert place_tokens([-1, -1]).slots.tolist() == [-1, -1]


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("tokens", [1, 8, 500])
@pytest.mark.parametrize("steps", [1, 128, 5000])
def test_every_launch_has_a_shape(arch, tokens, steps):
    for stage in ("shrink", "expand"):
        shape = choose_shape(stage, tokens=tokens, steps=steps, rows=4096, arch=arch)
        assert shape.warps in {1, 2, 4, 8, 16}
        assert shape.blocks in {1, 2, 4}


def test_the_next_larger_measured_launch_decides():
    table = [choice for choice in load_table(90) if choice.stage == "expand"]
    assert table, "kernels/tuning/sm_90.json"
    for choice in table:
        sizes = {name: getattr(choice, name) for name in ("tokens", "steps", "rows")}
        assert choose_shape("expand", **sizes, arch=90) == choice.shape
    assert tuning.FOLDER.joinpath("sm_90.json").exists()


def test_sites_of_one_width_are_told_apart_by_their_rows(monkeypatch):
    sizes = ((1, 128, 64), (1, 128, 640), (8, 128, 640))
    table = tuple(
        tuning.Choice(
            stage="shrink",
            tokens=tokens,
            steps=steps,
            rows=rows,
            shape=tuning.Shape(blocks=1, along_steps=1, along_rows=1, ahead=number),
        )
        for number, (tokens, steps, rows) in enumerate(sizes)
    )
    monkeypatch.setattr(tuning, "load_table", lambda _: table)
    for wanted, number in (((1, 64, 64), 0), ((1, 128, 65), 1), ((1, 500, 999), 1), ((9, 1, 1), 2)):
        tokens, steps, rows = wanted
        shape = choose_shape("shrink", tokens=tokens, steps=steps, rows=rows, arch=-1)
        assert shape.ahead == number
