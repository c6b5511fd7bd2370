"""Graph to graph: capture a forward, judge its effects, plan what can run ahead, and lift it. No threads, no clocks."""

from torchstage.transforms._analysis import make_plan
from torchstage.transforms._binding import Binder, Inputs
from torchstage.transforms._capture import capture
from torchstage.transforms._captured import Capture
from torchstage.transforms._lift import Lifted, lift
from torchstage.transforms._mirror import UntraceableError
from torchstage.transforms._plan import NodePlan, Plan, Reason

__all__ = [
    "Binder",
    "Capture",
    "Inputs",
    "Lifted",
    "NodePlan",
    "Plan",
    "Reason",
    "UntraceableError",
    "capture",
    "lift",
    "make_plan",
]
