"""Replicas: the Python side is copied, with what it shares; tensors are the model's; changes are named."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchstage.transforms._replica import Replica


class Settings:
    def __init__(self) -> None:
        self.rate = 0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.again = self.layer
        self.hidden = {"inner": [nn.Sequential(nn.Linear(2, 1))]}
        self.names = ["a"]
        self.same_names = self.names
        self.settings = Settings()
        self.steps = 0
        self.counts = np.zeros(3)
        self.generator = torch.Generator().manual_seed(1)
        self.call = self.count_up

    def count_up(self) -> int:
        self.steps += 1
        return self.steps


def test_python_state_is_copied_and_tensors_are_shared() -> None:
    model = Model()
    replica = Replica(model)
    root: Any = replica.root
    assert type(root) is Model
    assert root.layer is not model.layer
    assert root.layer is root.again
    assert root.layer.weight is model.layer.weight
    assert root.names is root.same_names
    assert root.names is not model.names
    root.call()
    root.generator.manual_seed(2)
    assert model.steps == 0
    assert root.steps == 1
    assert model.generator.initial_seed() == 1
    assert list(replica.outside) == ["hidden@1", "hidden@1.0"]
    assert replica.outside["hidden@1"] is model.hidden["inner"][0]
    assert replica.outside_roots() == [root.hidden["inner"][0]]
    assert replica.of(model.layer) is root.layer


def test_tensors_are_replaced_once_each() -> None:
    model = Model()
    replica = Replica(model, lambda t: t.detach().clone())
    root: Any = replica.root
    assert root.layer.weight is not model.layer.weight
    assert root.layer.weight is replica.of(model.layer.weight)
    assert root.hidden["inner"][0][0].weight is replica.of(model.hidden["inner"][0][0].weight)
    assert len(replica.tensors()) == 4


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: None, None),
        (lambda m: setattr(m, "names", ["a"]), None),  # an equal list in its place
        (lambda m: setattr(m, "steps", 1), "self.steps"),
        (lambda m: m.names.append("b"), "self.names"),
        (lambda m: setattr(m.settings, "rate", 0.1), "self.settings.rate"),
        (lambda m: setattr(m.layer, "extra", None), "self.layer.extra"),
        (lambda m: delattr(m, "steps"), "self.steps"),
        (lambda m: m.counts.__setitem__(0, 1), "a NumPy array of the model"),
        (lambda m: setattr(m.hidden["inner"][0][0], "bias", None), "self.hidden@1.0._parameters"),
    ],
)
def test_changes_are_named_and_do_not_reach_the_model(change: Any, name: str | None) -> None:
    model = Model()
    replica = Replica(model)
    replica.begin()
    change(replica.root)
    assert replica.changed() == name
    assert Replica(model).changed() is None
    assert model.names == ["a"]
    assert model.counts[0] == 0
