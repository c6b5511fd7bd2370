"""TorchRec's models and modules as they run on the CPU, on `KeyedJaggedTensor`s of UCI Adult's columns."""

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.corpus.adult import numbers_and_codes
from tests.corpus.entry import Entry, floats

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports use what torch is about to drop
    logging.disable(logging.WARNING)
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
    from torchrec.datasets.utils import Batch
    from torchrec.models import deepfm, dlrm
    from torchrec.models.experimental.transformerdlrm import DLRM_Transformer
    from torchrec.modules import crossnet, embedding_tower, mc_modules, mlp
    from torchrec.modules.activation import SwishLayerNorm
    from torchrec.modules.deepfm import DeepFM, FactorizationMachine
    from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
    from torchrec.modules.regroup import KTRegroupAsDict
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

    logging.disable(logging.NOTSET)

_ROWS, _WIDTH = 50, 8
_KEYS = ("user", "item", "genre")


def _ragged(codes: torch.Tensor, *, weighted: bool = False) -> KeyedJaggedTensor:
    """Three keys of up to three ids a row; a row's codes say how many."""
    lengths = torch.stack([codes[:, key] % (2 + key) for key in range(len(_KEYS))])
    parts = [codes[row, : int(lengths[key, row])] for key in range(len(_KEYS)) for row in range(len(codes))]
    values = torch.cat(parts)
    weights = (values % 7).float() / 7 if weighted else None
    return KeyedJaggedTensor(list(_KEYS), values, lengths=lengths.flatten().to(torch.int32), weights=weights)


def _jagged(sizes: tuple[int, ...], *, weighted: bool = False) -> list[KeyedJaggedTensor]:
    return [_ragged(codes, weighted=weighted) for _, codes in numbers_and_codes(sizes, _ROWS)]


def _both(sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, KeyedJaggedTensor]]:
    return [(numbers, _ragged(codes)) for numbers, codes in numbers_and_codes(sizes, _ROWS)]


def _labelled(sizes: tuple[int, ...]) -> list[Any]:
    return [Batch(numbers, features, (numbers[:, 0] > 0).int()) for numbers, features in _both(sizes)]


def _bags(pooling: Any = PoolingType.SUM, *, weighted: bool = False) -> Any:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{key}", embedding_dim=_WIDTH, num_embeddings=_ROWS, feature_names=[key], pooling=pooling
        )
        for key in _KEYS
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted)


def _sequences() -> Any:
    tables = [
        EmbeddingConfig(name=f"t_{key}", embedding_dim=_WIDTH, num_embeddings=_ROWS, feature_names=[key])
        for key in _KEYS
    ]
    return EmbeddingCollection(tables=tables)


class Pooled(nn.Module):
    """A collection of bags under a linear layer, as users put it together."""

    def __init__(self, bags: nn.Module | None = None) -> None:
        super().__init__()
        self.bags = bags or _bags()
        self.out = nn.Linear(len(_KEYS) * _WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.out(self.bags(features).values())


class Sequences(nn.Module):
    """A collection of sequences, each padded and pooled."""

    def __init__(self, tables: nn.Module | None = None) -> None:
        super().__init__()
        self.tables = tables or _sequences()
        self.out = nn.Linear(_WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        out = self.tables(features)
        jagged: dict[str, JaggedTensor] = out[0] if isinstance(out, tuple) else out
        return self.out(sum(part.to_padded_dense(3).sum(1) for part in jagged.values()))


class Regrouped(nn.Module):
    """Two collections, regrouped by key."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = _bags(), _bags(PoolingType.MEAN)
        self.out = nn.Linear(2 * _WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        first, second = KeyedTensor.regroup([self.one(features), self.two(features)], [["user", "item"], ["genre"]])
        return self.out(first) + second.sum(1, keepdim=True)


class RegroupedAsDict(nn.Module):
    """The same by a module that remembers the permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = _bags()
        self.regroup = KTRegroupAsDict([["user"], ["item", "genre"]], ["one", "two"])
        self.out = nn.Linear(_WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        groups = self.regroup([self.bags(features)])
        return self.out(groups["one"]) + groups["two"].sum(1, keepdim=True)


class Permuted(nn.Module):
    """Work on the keyed tensor before the tables: a split, a permutation, a key taken out, ids folded."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = _bags()
        self.user = nn.EmbeddingBag(_ROWS, _WIDTH, mode="sum", include_last_offset=True)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        user = features["user"]
        swapped = features.permute([2, 0, 1])
        folded = KeyedJaggedTensor(swapped.keys(), swapped.values() % 30, lengths=swapped.lengths())
        return self.bags(folded).values().sum(1, keepdim=True) + self.user(user.values(), user.offsets())


def _positions() -> nn.Module:
    processors = PositionWeightedModuleCollection(dict.fromkeys(_KEYS, 4))
    return Pooled(FeatureProcessedEmbeddingBagCollection(_bags(weighted=True), processors))


def _managed() -> nn.Module:
    policy = functools.partial(mc_modules.DistanceLFU_EvictionPolicy)
    tables = _sequences()
    modules = {
        config.name: mc_modules.MCHManagedCollisionModule(
            zch_size=_ROWS,
            device=torch.device("cpu"),
            eviction_policy=policy(),
            eviction_interval=2,
            input_hash_size=1000,
        )
        for config in tables.embedding_configs()
    }
    collection = mc_modules.ManagedCollisionCollection(modules, tables.embedding_configs())
    return Sequences(ManagedCollisionEmbeddingCollection(tables, collection))


class Tower(nn.Module):
    """An embedding tower with its own interaction."""

    class Interaction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(len(_KEYS) * _WIDTH, 4)

        def forward(self, embeddings: KeyedTensor) -> torch.Tensor:
            return self.lin(embeddings.values())

    def __init__(self) -> None:
        super().__init__()
        self.towers = embedding_tower.EmbeddingTowerCollection(
            [embedding_tower.EmbeddingTower(_bags(), self.Interaction())]
        )

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.towers(features)


def _entry(name: str, make: Callable[[], Any], batches: Any, *, whole: bool = False, cause: str = "") -> Entry:
    return Entry(name, make, batches, package="torchrec", whole=whole, cause=cause)


def _over(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: nn.Sequential(make(), nn.Linear(6, 1))


_ARCHITECTURE = {"dense_in_features": 6, "dense_arch_layer_sizes": [8, _WIDTH], "over_arch_layer_sizes": [8, 1]}

ENTRIES = [
    _entry("DLRM", lambda: dlrm.DLRM(_bags(), **_ARCHITECTURE), _both, cause="KeyedJaggedTensor"),
    _entry(
        "DLRM_DCN",
        lambda: dlrm.DLRM_DCN(_bags(), **_ARCHITECTURE, dcn_num_layers=2, dcn_low_rank_dim=4),
        _both,
        cause="KeyedJaggedTensor",
    ),
    _entry(
        "DLRM_Projection",
        lambda: dlrm.DLRM_Projection(
            _bags(),
            **_ARCHITECTURE,
            interaction_branch1_layer_sizes=[2 * _WIDTH],
            interaction_branch2_layer_sizes=[2 * _WIDTH],
        ),
        _both,
        cause="KeyedJaggedTensor",
    ),
    _entry(
        "DLRM_Transformer",
        lambda: DLRM_Transformer(_bags(), **_ARCHITECTURE, nhead=2, ntransformer_layers=1),
        _both,
        cause="KeyedJaggedTensor",
    ),
    _entry(
        "DLRMTrain",
        lambda: dlrm.DLRMTrain(dlrm.DLRM(_bags(), **_ARCHITECTURE)),
        _labelled,
        whole=True,
        cause="a dataclass with a KeyedJaggedTensor",
    ),
    _entry(
        "SimpleDeepFMNN",
        lambda: deepfm.SimpleDeepFMNN(6, _bags(), hidden_layer_size=8, deep_fm_dimension=4),
        _both,
        cause="KeyedJaggedTensor",
    ),
    _entry("EmbeddingBagCollection", Pooled, _jagged, whole=True, cause="KeyedTensor"),
    _entry(
        "EmbeddingBagCollection (mean)",
        lambda: Pooled(_bags(PoolingType.MEAN)),
        _jagged,
        whole=True,
        cause="KeyedTensor",
    ),
    _entry(
        "EmbeddingBagCollection (weighted)",
        lambda: Pooled(_bags(weighted=True)),
        functools.partial(_jagged, weighted=True),
        whole=True,
        cause="weights in the KeyedJaggedTensor",
    ),
    _entry("EmbeddingCollection", Sequences, _jagged, whole=True, cause="JaggedTensor"),
    _entry("KeyedTensor.regroup", Regrouped, _jagged, whole=True, cause="regroup"),
    _entry("KTRegroupAsDict", RegroupedAsDict, _jagged, whole=True, cause="a module that remembers"),
    _entry("KeyedJaggedTensor.permute", Permuted, _jagged, whole=True, cause="a KeyedJaggedTensor made in forward"),
    _entry("PositionWeightedModuleCollection", _positions, _jagged, whole=True, cause="feature processors"),
    _entry("ManagedCollisionEmbeddingCollection", _managed, _jagged, whole=True, cause="an id map in buffers"),
    _entry("EmbeddingTowerCollection", Tower, _jagged, whole=True, cause="towers"),
    _entry("CrossNet", _over(lambda: crossnet.CrossNet(6, 2)), floats(6)),
    _entry("LowRankCrossNet", _over(lambda: crossnet.LowRankCrossNet(6, 2, 2)), floats(6)),
    _entry("VectorCrossNet", _over(lambda: crossnet.VectorCrossNet(6, 2)), floats(6)),
    _entry("LowRankMixtureCrossNet", _over(lambda: crossnet.LowRankMixtureCrossNet(6, 2, 2, 2)), floats(6)),
    _entry("MLP", lambda: mlp.MLP(6, [8, 1]), floats(6)),
    _entry("SwishLayerNorm", _over(lambda: SwishLayerNorm(6)), floats(6)),
    _entry(
        "FactorizationMachine", lambda: _Embeddings(FactorizationMachine()), floats(2, 6), cause="a list of embeddings"
    ),
    _entry("DeepFM", lambda: _Embeddings(DeepFM(nn.Linear(12, 4))), floats(2, 6), cause="a list of embeddings"),
]


class _Embeddings(nn.Module):
    """Gives a module the list of embeddings that it wants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.lin = module, nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x.clamp(-2, 2))
        return self.module([x[:, 0], x[:, 1]])
