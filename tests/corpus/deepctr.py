"""Every model of deepctr-torch, on real rows of UCI Adult: numbers, hashed text and a sequence column."""

import functools
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import nn

from tests.corpus.adult import numbers_and_codes
from tests.corpus.entry import Entry


def _without_version_check() -> None:
    """Make the package importable without its ``__init__``, which asks the network for a newer version on a thread."""
    spec = importlib.util.find_spec("deepctr_torch")
    if spec is None:
        raise ImportError("deepctr-torch is not installed")
    if "deepctr_torch" not in sys.modules:
        package = types.ModuleType("deepctr_torch")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["deepctr_torch"] = package


_without_version_check()

from deepctr_torch import inputs, models  # noqa: E402

_DENSE, _SPARSE, _LENGTH = 4, 6, 5
_VOCABULARY = 60


def _columns(*, sequence: bool = True) -> list[Any]:
    """Return columns of each kind. A sequence takes the codes of a row's text columns, shifted past the padding."""
    sparse = [inputs.SparseFeat(f"C{i}", _VOCABULARY, embedding_dim=4) for i in range(_SPARSE)]
    dense = [inputs.DenseFeat(f"I{i}", 1) for i in range(_DENSE)]
    feature = inputs.SparseFeat("genres", _VOCABULARY, embedding_dim=4)
    many = [inputs.VarLenSparseFeat(feature, _LENGTH, "mean")] if sequence else []
    return [*sparse, *many, *dense]


def _rows(sizes: tuple[int, ...], *, sequence: bool = True) -> list[torch.Tensor]:
    """The one float matrix that the models take: ids, the padded sequence and numbers side by side."""
    batches = []
    for numbers, codes in numbers_and_codes(sizes, _VOCABULARY - 1):
        length = 1 + codes[:, :1] % _LENGTH
        padded = (codes[:, 1 : 1 + _LENGTH] + 1) * (torch.arange(_LENGTH) < length)
        parts = [codes[:, :_SPARSE], *([padded] if sequence else []), numbers[:, :_DENSE]]
        batches.append(torch.cat([part.float() for part in parts], dim=1))
    return batches


def _history(*, negatives: bool = False) -> list[Any]:
    """Columns of the two models of interest over time: a candidate item, the user's past items, and their number."""
    names = ["hist_item", "neg_hist_item"] if negatives else ["hist_item"]
    items = [inputs.SparseFeat("user", _VOCABULARY, 4), inputs.SparseFeat("item", _VOCABULARY, 4)]
    past = [
        inputs.VarLenSparseFeat(
            inputs.SparseFeat(name, _VOCABULARY, 4, embedding_name="item"), _LENGTH, length_name="seq_length"
        )
        for name in names
    ]
    return [*items, inputs.DenseFeat("score", 1), *past]


def _history_rows(sizes: tuple[int, ...], *, negatives: bool = False) -> list[torch.Tensor]:
    """Matrices in the order of `_history`'s columns: user, item, number, past items, their length, negatives."""
    batches = []
    for numbers, codes in numbers_and_codes(sizes, _VOCABULARY - 1):
        length = 1 + codes[:, :1] % _LENGTH
        past = (codes[:, 1 : 1 + _LENGTH] + 1) * (torch.arange(_LENGTH) < length)
        parts = [codes[:, :2], numbers[:, :1], past, length, *([past.flip(1)] if negatives else [])]
        batches.append(torch.cat([part.float() for part in parts], dim=1))
    return batches


def _two_sided(kind: Any, /, **options: Any) -> nn.Module:
    sequence = options.pop("sequence", True)
    dense = options.pop("dense", True)
    wide = _columns(sequence=sequence)
    deep = wide if dense else [column for column in wide if not isinstance(column, inputs.DenseFeat)]
    return kind(wide, deep, **options)


def _one_sided(kind: Any, /, **options: Any) -> nn.Module:
    return kind(_columns(), **options)


def _over_time(kind: Any, /, *, negatives: bool = False, **options: Any) -> nn.Module:
    return kind(_history(negatives=negatives), ["item"], **options)


def _entry(kind: Any, build: Any, /, note: str = "", *, negatives: bool = False, **options: Any) -> Entry:
    if build is _over_time:
        rows = functools.partial(_history_rows, negatives=negatives)
        options |= {"negatives": negatives}
    else:
        rows = functools.partial(_rows, sequence=options.get("sequence", True))
    name = kind.__name__ + (f" ({note})" if note else "")
    return Entry(name, functools.partial(build, kind, **options), rows, package="deepctr-torch")


_SMALL: dict[str, Any] = {"dnn_hidden_units": (8, 8)}
_TASKS: dict[str, Any] = {"tower_dnn_hidden_units": (8,), "dnn_dropout": 0.1}

ENTRIES = [
    _entry(models.WDL, _two_sided, **_SMALL),
    _entry(models.DeepFM, _two_sided, **_SMALL),
    _entry(models.DeepFM, _two_sided, "dropout and batch norm", dnn_dropout=0.2, dnn_use_bn=True, **_SMALL),
    _entry(models.xDeepFM, _two_sided, cin_layer_size=(8, 8), **_SMALL),
    _entry(models.AFM, _two_sided, afm_dropout=0.1, sequence=False, dense=False),
    _entry(models.AFN, _two_sided, ltl_hidden_size=8, afn_dnn_hidden_units=(8, 8), sequence=False),
    _entry(models.AutoInt, _two_sided, sequence=False, **_SMALL),
    _entry(models.CCPM, _two_sided, dnn_hidden_units=(8,), sequence=False, dense=False),
    _entry(models.DCN, _two_sided, **_SMALL),
    _entry(models.DCN, _two_sided, "matrix", cross_parameterization="matrix", **_SMALL),
    _entry(models.DCNMix, _two_sided, low_rank=4, num_experts=2, **_SMALL),
    _entry(models.DIFM, _two_sided, sequence=False, **_SMALL),
    _entry(models.IFM, _two_sided, sequence=False, **_SMALL),
    _entry(models.FiBiNET, _two_sided, sequence=False, **_SMALL),
    _entry(models.FiBiNET, _two_sided, "each", bilinear_type="each", sequence=False, **_SMALL),
    _entry(models.NFM, _two_sided, bi_dropout=0.1, **_SMALL),
    _entry(models.ONN, _two_sided, sequence=False, **_SMALL),
    _entry(models.MLR, _one_sided),
    _entry(models.PNN, _one_sided, **_SMALL),
    _entry(models.PNN, _one_sided, "outer product", use_outter=True, **_SMALL),
    _entry(models.SharedBottom, _one_sided, bottom_dnn_hidden_units=(8, 8), **_TASKS),
    _entry(models.ESMM, _one_sided, **_TASKS),
    _entry(models.MMOE, _one_sided, expert_dnn_hidden_units=(8,), gate_dnn_hidden_units=(8,), **_TASKS),
    _entry(models.PLE, _one_sided, expert_dnn_hidden_units=(8,), gate_dnn_hidden_units=(8,), **_TASKS),
    _entry(models.DIN, _over_time, att_hidden_size=(8,), **_SMALL),
    _entry(models.DIEN, _over_time, att_hidden_units=(8,), **_SMALL),
    _entry(models.DIEN, _over_time, "AIGRU", gru_type="AIGRU", att_hidden_units=(8,), **_SMALL),
    _entry(models.DIEN, _over_time, "AGRU", gru_type="AGRU", att_hidden_units=(8,), **_SMALL),
    _entry(
        models.DIEN,
        _over_time,
        "AUGRU, negatives",
        gru_type="AUGRU",
        use_negsampling=True,
        negatives=True,
        att_hidden_units=(8,),
        **_SMALL,
    ),
]
