"""The recipes of the core in plain words."""

from deltacome_core.recipe import PRESETS

LABELS = {
    "hub": "Bits by spectrum, calibrated",
    "distilled": "Bits by spectrum, then trained on your calibration.jsonl; slow, best on a GPU",
    "come": "Delta-CoMe, 8 + 3 + 2 bit bands, calibrated",
    "datafree": "Bits by spectrum, no calibration data",
    "lowrank": "One band of 8 bits: plain low rank, for comparison",
    "bitdelta": "BitDelta, signs and one scale per matrix, not distilled",
    "bitdelta-row": "BitDelta with one scale per row, not distilled",
    "lossless": "Bit for bit: nothing is lost, and several times larger",
}


def label_recipe(name: object) -> str:
    """Return what a recipe does; its own name when nobody said."""
    return LABELS.get(str(name), str(name))


def list_recipes() -> dict[str, str]:
    """Return the label of every recipe that may be asked for, by name."""
    return {name: label_recipe(name) for name in PRESETS}
