import pytest

from kernels import tuning
from kernels.plan import group_tokens
from kernels.tuning import choose_shape, load_table


def test_tokens_of_a_slot_stand_together():
    groups = group_tokens([3, -1, 0, 3, 0, 3], group_size=2)
    assert groups.slots.tolist() == [0, 3, 3, -1, -1, -1]
    assert groups.counts.tolist() == [2, 2, 1, 0, 0, 0]
    assert groups.tokens.tolist() == [[2, 4], [0, 3], [5, -1], [-1, -1], [-1, -1], [-1, -1]]


def test_a_batch_of_the_backbone_has_no_group():
    assert group_tokens([-1, -1], group_size=4).slots.tolist() == [-1, -1]


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("groups", [1, 8, 500])
@pytest.mark.parametrize("steps", [1, 128, 5000])
def test_every_launch_has_a_shape(arch, groups, steps):
    for stage in ("shrink", "expand"):
        shape = choose_shape(stage, groups=groups, steps=steps, arch=arch)
        assert shape.warps in {1, 2, 4, 8, 16}
        assert shape.blocks in {1, 2, 4}


def test_the_next_larger_measured_launch_decides():
    table = [choice for choice in load_table(90) if choice.stage == "expand"]
    assert table, "kernels/tuning/sm_90.json"
    for choice in table:
        found = choose_shape("expand", groups=choice.groups, steps=choice.steps, arch=90)
        assert found == choice.shape
    assert tuning.FOLDER.joinpath("sm_90.json").exists()
