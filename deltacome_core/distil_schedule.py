"""How much text distillation reads and how long it trains, by device and size of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

# Up to here matrices are held as float32 and no layer runs twice.
SMALL_PARAMS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What is read, and what a step looks at.

    steps: of Adam, whose rate is at most `rate`; own_tokens and general_tokens: read at most, of
    the user's text and of general text. Of a step, rows: at most, and max_tokens with padding, of
    the user's text; beside: rows of general text; max_places: of each part; is_joined: whether both
    run as one batch, which pads the shorter rows but starts half as many kernels.
    """

    steps: int
    rate: float
    own_tokens: int
    general_tokens: int
    rows: int
    max_tokens: int
    beside: int
    max_places: int
    is_joined: bool


# A CPU runs the fine-tune over all of it, and judges by a tenth, in seconds.
ON_CPU: Final = Schedule(
    steps=100,
    rate=3e-3,
    own_tokens=8192,
    general_tokens=2048,
    rows=3,
    max_tokens=1024,
    beside=1,
    max_places=256,
    is_joined=False,
)
# A few hundred answers are learnt by heart in so many steps: thousands are not.
SMALL_ON_GPU: Final = Schedule(
    steps=1000,
    rate=3e-3,
    own_tokens=262_144,
    general_tokens=16_384,
    rows=32,
    max_tokens=4096,
    beside=8,
    max_places=1024,
    is_joined=True,
)
# The fine-tune's last states of all that is read stay on the device: 1 GiB at a width of 4096.
LARGE_ON_GPU: Final = replace(SMALL_ON_GPU, steps=300, own_tokens=65_536)


# What gained had read its text 9 to 45 times by calculation, and not all that did gained; the one
# fine-tune that read its text 280 times moved away on other text (docs/benchmarks).
MOST_READS: Final = 50


def limit_steps(schedule: Schedule, lengths: Sequence[int]) -> Schedule:
    """Let no more steps be made than read the text MOST_READS times.

    Args:
        schedule: of `choose_schedule`.
        lengths: tokens of each row that is trained on.

    Returns:
        The schedule.
    """
    total = sum(lengths)
    a_step = min(schedule.rows * total / len(lengths), schedule.max_tokens, total)
    return replace(schedule, steps=min(schedule.steps, int(MOST_READS * total / a_step)))


def choose_schedule(n_params: int, device: torch.device) -> Schedule:
    """Choose by what a step costs.

    Args:
        n_params: of the fine-tune.
        device: where it is trained.

    Returns:
        The schedule.
    """
    if device.type == "cpu":
        return ON_CPU
    return SMALL_ON_GPU if n_params <= SMALL_PARAMS else LARGE_ON_GPU
