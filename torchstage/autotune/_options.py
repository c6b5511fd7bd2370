"""What can be chosen about a model, and the constants of section 1."""

import dataclasses
import enum


class AutotuneAlgorithm(enum.IntEnum):
    """How the model searches (section 10)."""

    DEFAULT = 0
    """`MAX_PARALLELISM`."""
    HILL_CLIMB = 1
    GRADIENT_DESCENT = 2
    MAX_PARALLELISM = 3
    STAGE_BASED = 4


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Choices that the reference makes by experiments or came to later. The defaults are those of its revision."""

    buffer_optimization: bool = False
    """Run the buffer pass (section 9) after each optimization, and let no search step buffer sizes."""

    downsize_floor: float = 0.75
    """The buffer pass keeps at least this share of a buffer (D19; later versions: 0.9)."""

    upsize_at_low: int = 0
    """The buffer pass enlarges a buffer that was seen full and with at most so many elements (D19; later: 2)."""

    min_gaps: int = 1
    """There is no target time, 0, until so many gaps were recorded (D14; later versions: 100)."""

    target_sigmas: float = 0.0
    """So many standard deviations are taken off the target time, down to 0 at the least (D14; later versions: 1)."""

    interleave_first_input_timing: bool = False
    """Let the first input of an interleave count in the timing of stages (D8; later versions do)."""

    carry_history: bool = False
    """Share the input history with snapshots, so that the prior of section 7.2 is used by searches (D12)."""
