"""The kinds of effects that a node of a graph can have."""

import dataclasses
import enum


class Kind(enum.Enum):
    """What a node does."""

    PURE = "computes its value and nothing else"
    FREE = "costs nothing: a view, an item or a piece of metadata"
    RANDOM = "draws random numbers"
    WRITES = "writes in place"
    UPDATES = "updates the module's own state"
    SETTING = "switches a setting of the calling thread"
    BOUNDARY = "is a `staged` mark"
    TARGET = "is a `mark_target_node` mark"
    UNKNOWN = "is not known to be pure"


@dataclasses.dataclass(frozen=True)
class Effect:
    """A node's effect.

    Attributes:
        kind: what it does.
        detail: finishes the sentence where the kind alone does not explain it.
        in_place: of `Kind.WRITES`: it writes into its first argument, returns that, and does nothing else.
    """

    kind: Kind
    detail: str = ""
    in_place: bool = False
