"""Modules in unusual places: made in forward, outside the module tree, shared, tied, wrapped, scripted."""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.corpus.entry import Entry, floats, floats_and_ids, ids


class MadeInForward(nn.Module):
    """Makes helper modules without parameters in every forward: pooling, activation, loss."""

    def __init__(self, activation: str = "ReLU") -> None:
        super().__init__()
        self.activation = activation
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = nn.LayerNorm(4, elementwise_affine=False)(x)
        pooled = nn.AvgPool1d(2)(normal.unsqueeze(1)).squeeze(1)
        return getattr(nn, self.activation)()(self.lin(torch.cat([pooled, pooled], dim=1)))


class Pooling(nn.Module):
    """A helper module of one's own, made anew where it is needed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        total = (values * mask.unsqueeze(-1)).sum(1)
        return total if self.mode == "sum" else total / mask.sum(1, keepdim=True).clamp(min=1)


class OwnMadeInForward(nn.Module):
    """Makes a module of its own class in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4, padding_idx=0)
        self.out = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, mask = self.table(ids), (ids != 0).float()
        return self.out(torch.cat([Pooling(mode)(rows, mask) for mode in ("sum", "mean")], dim=1))


class PlainDict(nn.Module):
    """Tables in a plain dictionary: they hang on the model, but not in its module tree, so they are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = {name: nn.Embedding(10, 4) for name in ("user", "item")}
        self.out = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        columns = zip(self.tables.values(), ids.unbind(1), strict=True)
        return self.out(torch.cat([table(column % 10) for table, column in columns], dim=1))


class PlainList(nn.Module):
    """Layers in a plain list that are also registered one by one with `add_module`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = []
        for i in range(2):
            layer = nn.Linear(4, 4)
            self.add_module(f"layer{i}", layer)
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(-1, 1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Namespace(nn.Module):
    """A module held by a plain object that hangs on the model."""

    class Config:
        def __init__(self) -> None:
            self.activation = nn.LeakyReLU(0.2)
            self.factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.config.activation(self.lin(x * self.config.factor))


class Partial(nn.Module):
    """Functions with fixed arguments, lambdas and bound methods in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [functools.partial(torch.clamp, min=-1, max=1), lambda x: x**2, torch.Tensor.sqrt]
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return self.lin(x)


class TiedWeights(nn.Module):
    """An output layer that shares its weight with the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.out = nn.Linear(4, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids % 12).mean(1))


class SharedTable(nn.Module):
    """One table under two names, looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(12, 4, sparse=True)
        self.item = self.user
        self.out = nn.Linear(8, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.user(ids[:, 0] % 12), self.item(ids[:, 1] % 12)], dim=1))


class WeightNorm(nn.Module):
    """A layer with a parametrized weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = parametrizations.weight_norm(nn.Linear(3, 4))
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spectral(torch.relu(self.lin(torch.log1p(x.abs()))))


class ParametrizedTable(nn.Module):
    """A table with a parametrized weight: what is looked up is computed from the parameter."""

    class Bounded(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return torch.tanh(weight)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        parametrize.register_parametrization(self.table, "weight", self.Bounded())
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids % 10).sum(1))


class Hooks(nn.Module):
    """Hooks that change what a layer takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.lin.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.lin.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.abs())


class Part(nn.Module):
    """What is compiled below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(x.abs()) if x.dim() > 1 else x


class Scripted(nn.Module):
    """A TorchScript submodule between ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript itself, which old models still hold
            self.part = torch.jit.script(Part())
        self.lin = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.part(x * 2))


class Lazy(nn.Module):
    """Layers that learn their sizes from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x.abs() + 1)))


class Nested(nn.Module):
    """Blocks in a ModuleDict of ModuleLists, called by name, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]) for name in "ab"})
        self.tables = nn.ModuleDict({str(i): nn.Embedding(10, 4) for i in range(2)})

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(dense)
        for name, table in self.tables.items():
            x = x + table(ids[:, int(name)] % 10)
        out = {}
        for name, tower in self.towers.items():
            y = x
            for layer in tower:
                y = y + F.relu(layer(y))
            out[name] = y.sum(1)
        return out


class SequentialSubclass(nn.Sequential):
    """A Sequential with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.abs().sqrt()
        for i, layer in enumerate(self):
            x = layer(x) if i else layer(x) + x
        return x


class OtherMethod(nn.Module):
    """A submodule used through a method that is not forward."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def encode(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids.abs() % 10).mean(1)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.out = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.encoder.encode(ids))


ENTRIES = [
    Entry("MadeInForward", MadeInForward, floats(4), cause="torch's modules made in forward"),
    Entry("OwnMadeInForward", OwnMadeInForward, ids(20, 4), cause="own modules made in forward"),
    Entry("PlainDict", PlainDict, ids(50, 2), cause="modules in a plain dict"),
    Entry("PlainList", PlainList, floats(4), cause="modules in a plain list"),
    Entry("Namespace", Namespace, floats(3), cause="a module on a plain object"),
    Entry("Partial", Partial, floats(3), cause="functions in a list"),
    Entry("TiedWeights", TiedWeights, ids(50, 3), cause="weight tying"),
    Entry("SharedTable", SharedTable, ids(50, 2), cause="one table under two names"),
    Entry("WeightNorm", WeightNorm, floats(3), cause="parametrizations"),
    Entry("ParametrizedTable", ParametrizedTable, ids(50, 3), cause="a parametrized table"),
    Entry("Hooks", Hooks, floats(3), cause="hooks on a submodule"),
    Entry("Scripted", Scripted, floats(3), cause="a TorchScript submodule"),
    Entry("Lazy", Lazy, floats(3), cause="lazy modules"),
    Entry("Nested", Nested, floats_and_ids(4, 50, 2), cause="modules by name"),
    Entry("SequentialSubclass", SequentialSubclass, floats(3), cause="a Sequential with its own forward"),
    Entry("OtherMethod", OtherMethod, ids(50, 3), cause="a submodule's other method"),
]
