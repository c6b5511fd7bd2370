"""The five benchmark models: made-up and real rows, and that a staged training run of each has the plain run's bits."""

import collections
import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchstage
from benchmarks.models import MODELS, Batch, Columns, Recipe, Rows, dssm
from benchmarks.models import _amazon as amazon
from benchmarks.models import _criteo as criteo
from benchmarks.models._rows import Draw, decimal, hexadecimal, joined
from benchmarks.models.dien import AttentionGRU
from benchmarks.models.dlrm import DLRM
from torchstage import ops

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

SAMPLES = pathlib.Path(__file__).parents[2] / "shared" / "data"
BATCH = 24
LAST = 7
"""Rows of a shorter last batch."""

every_model = pytest.mark.parametrize("name", MODELS)


# --- staged and plain ------------------------------------------------------------------------------------------------


def parts(gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return what a gradient consists of, so that a sparse one is compared entry by entry and not after a sum."""
    if gradient.is_sparse:
        return [gradient._indices().clone(), gradient._values().clone()]
    return [gradient.clone()]


def train(recipe: Recipe, model: nn.Module, unwrapped: nn.Module, loader: Iterable[Batch]) -> list[torch.Tensor]:
    """Train as a user would; return outputs, losses and gradients of every step, and the state after the last."""
    optimizer = recipe.optimizer(unwrapped.parameters())
    seen: list[torch.Tensor] = []
    for batch in loader:
        output = model(batch[0])
        loss = recipe.loss(output, batch)
        optimizer.zero_grad()
        loss.backward()
        seen += [output.detach().clone(), loss.detach()]
        for parameter in unwrapped.parameters():
            assert parameter.grad is not None
            seen += parts(parameter.grad)
        optimizer.step()
    return [*seen, *[value.clone() for value in unwrapped.state_dict().values()]]


def assert_same_training(recipe: Recipe, rows: Rows, **options: Any) -> torchstage.StagedDataLoader:
    torch.manual_seed(5)
    plain = recipe.build()
    expected = train(recipe, plain, plain, rows.loader())
    torch.manual_seed(5)
    model = recipe.build()
    staged, loader = torchstage.smart_stage(model, rows.loader(), **options)
    seen = train(recipe, staged, model, loader)
    assert len(seen) == len(expected)
    for position, (a, b) in enumerate(zip(seen, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {position} of {len(expected)} differs"
    assert loader.stats.staged_steps == loader.stats.batches == len(rows)
    assert not loader.stats.fallbacks
    return loader


def repeats_itself(recipe: Recipe, rows: Rows) -> bool:
    """Whether two plain runs have the same bits: cuDNN's recurrent layers, for one, may add in another order each time."""
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        model = recipe.build()
        runs.append(train(recipe, model, model, rows.loader()))
    return all(map(torch.equal, *runs))


@pytest.mark.parametrize("on_cpu", [None, True, False])
@every_model
def test_a_staged_run_on_an_accelerator_has_the_bits_of_the_plain_one(
    name: str, on_cpu: bool | None, device: torch.device
) -> None:
    made = MODELS[name]

    recipe = dataclasses.replace(made, build=lambda: made.build().to(device))
    rows = recipe.rows(2 * BATCH + LAST, seed=1, epochs=1, batch_size=BATCH)
    if device.type == "cuda" and not repeats_itself(recipe, rows):
        pytest.skip(f"{name} does not repeat its own numbers on this GPU, staged or not")
    loader = assert_same_training(recipe, rows, stage_subgraph_on_cpu=on_cpu, bypass=False, num_threads=2, capacity=2)
    assert loader.plan is not None
    assert "string_to_hash_bucket" in {n.target for n in loader.plan.lifted if n.name in loader.plan.on_host}
    assert f"  on {device}, in the stage's stream: " in str(loader.plan)


@every_model
def test_a_staged_run_has_the_bits_of_the_plain_one(name: str) -> None:
    recipe = MODELS[name]
    rows = recipe.rows(2 * BATCH + LAST, seed=1, epochs=2, batch_size=BATCH)
    loader = assert_same_training(recipe, rows, lookups="exact", num_threads=2, capacity=2)
    assert loader.plan is not None
    lifted = {node.target for node in loader.plan.lifted}
    assert "string_to_hash_bucket" in lifted
    assert sum(table.used for table in loader.stats.tables.values()) > 0


@every_model
def test_real_rows_train_alike(name: str) -> None:
    if not SAMPLES.is_dir():
        pytest.skip(f"no sample rows at {SAMPLES}: they may be read there, and not be copied")
    assert_same_training(MODELS[name], REAL[name](), capacity=2)


@pytest.mark.parametrize("interaction", ["cat", "dot"])
def test_both_interactions_of_dlrm_train_alike(interaction: Any) -> None:
    recipe = Recipe("DLRM", lambda: DLRM(interaction), criteo.rows, BATCH, {})
    assert_same_training(recipe, criteo.rows(2 * BATCH, seed=2, batch_size=BATCH), lookups="main")


# --- the models ------------------------------------------------------------------------------------------------------


@every_model
def test_every_parameter_learns(name: str) -> None:
    recipe = MODELS[name]
    model = recipe.build()
    batch = recipe.rows(BATCH, seed=3)[0]
    output = model(batch[0])
    assert output.shape == (BATCH,)
    assert bool(((output > 0) & (output < 1)).all())
    recipe.loss(output, batch).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(torch.isfinite(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad).all())


@pytest.mark.parametrize("name", ["DIN", "DIEN"])
def test_padding_does_not_count(name: str) -> None:
    """Row 0 of the item table stands in every padded place; a row without it in its history must not see it change."""
    model: Any = MODELS[name].build().eval()
    rows = MODELS[name].rows(8, seed=4)
    assert bool((ops.string_to_hash_bucket(_entries(rows.columns["history_items"]), amazon.ITEMS) != 0).all())
    before = model(rows.columns)
    with torch.no_grad():
        model.histories.items.weight[0] += 1.0
        model.histories.categories.weight[0] += 1.0
    seen = ops.string_to_hash_bucket(_entries(rows.columns["history_categories"]), amazon.CATEGORIES)
    assert bool((seen != 0).all())
    assert torch.equal(model(rows.columns), before)


def _entries(lists: list[str]) -> list[str]:
    return "|".join(lists).split("|")


def test_a_history_of_more_than_a_hundred_loses_its_oldest() -> None:
    histories = amazon.Histories()
    texts = [str(i) for i in range(105)]
    ids, mask = histories.padded(["|".join(texts), "7"], amazon.ITEMS)
    assert ids.shape == mask.shape == (2, 100)
    assert torch.equal(ids[0], ops.string_to_hash_bucket(texts[5:], amazon.ITEMS))
    assert mask.sum(1).tolist() == [100, 1]


def test_an_entry_without_attention_leaves_the_state() -> None:
    gru = AttentionGRU(4)
    entries, weights = torch.randn(3, 5, 4), torch.rand(3, 5)
    weights[:, 3:] = 0
    assert torch.equal(gru(entries, weights), gru(entries[:, :3], weights[:, :3]))
    assert not torch.equal(gru(entries, weights), gru(entries[:, :2], weights[:, :2]))


def test_the_published_ratios() -> None:
    ratios = {(name, kind): figures.ratio for name in MODELS for kind, figures in MODELS[name].published.items()}
    expected = {
        ("DLRM", "cpu"): 1.05,
        ("DLRM", "cuda"): 2.05,
        ("DeepFM", "cuda"): 1.25,
        ("DSSM", "cuda"): 1.10,
        ("DIN", "cuda"): 1.20,
        ("DIEN", "cuda"): 1.005,
    }
    assert ratios == pytest.approx(expected, abs=0.005)


# --- the rows --------------------------------------------------------------------------------------------------------


@every_model
def test_a_seed_makes_the_same_rows_again_and_another_one_makes_others(name: str) -> None:
    rows = MODELS[name].rows
    first, again, other = (_texts_of(rows(50, seed)) for seed in (1, 1, 2))
    assert first == again
    assert all(first[column] != other[column] for column in first if len(set(first[column])) > 4)


def _texts_of(rows: Rows) -> dict[str, list[str]]:
    return {name: column for name, column in rows.columns.items() if isinstance(column, list)}


@every_model
def test_columns_are_skewed_as_logs_are(name: str) -> None:
    for column, texts in _texts_of(MODELS[name].rows(2000, 0)).items():
        counts = collections.Counter(text for row in texts for text in row.split("|"))
        total = counts.total() - counts.pop("", 0)
        # log-uniform ranks: the first of n has a share of log 2 / log(n + 1), 1/22 for the most values there are
        assert counts.most_common(1)[0][1] > total / 40, column


@every_model
def test_all_columns_have_the_rows_that_were_asked_for(name: str) -> None:
    rows = MODELS[name].rows(17, 0)
    assert {len(column) for column in rows.columns.values()} == {len(rows.labels)} == {17}


def test_a_column_has_the_published_number_of_values() -> None:
    texts = _texts_of(criteo.rows(20_000, seed=0))
    for name, distinct in zip(criteo.TEXTS, criteo.DISTINCT, strict=True):
        seen = set(texts[name]) - {""}
        assert len(seen) <= distinct
        assert distinct > 100 or len(seen) == distinct, name
        assert all(len(text) == 8 and int(text, 16) >= 0 for text in seen)
        assert len(seen) > min(distinct, 20_000) / 20, name
    numbers = criteo.rows(20_000, seed=0).columns
    for name, low, high in zip(criteo.NUMBERS, criteo.LOW, criteo.HIGH, strict=True):
        known = numbers[name][~numbers[name].isnan()]
        assert low <= known.min() <= known.max() <= high
        assert 0.08 < 1 - len(known) / 20_000 < 0.12


def test_texts_of_different_ranks_differ() -> None:
    ranks = np.arange(50_000)
    assert len(set(decimal(ranks, 7))) == len(ranks)
    assert len(set(hexadecimal(ranks, 3))) == len(ranks)
    assert hexadecimal(ranks[:9], 3) != hexadecimal(ranks[:9], 4)


def test_lists_are_joined_by_their_lengths() -> None:
    assert joined(["a", "b", "c", "d"], np.array([1, 3])) == ["a", "b|c|d"]
    assert joined(["a", "b"], np.array([2])) == ["a|b"]


def test_both_histories_of_a_row_are_equally_long() -> None:
    columns = amazon.rows(300, seed=6).columns
    lengths = [[len(row.split("|")) for row in columns[f"history_{name}"]] for name in ("items", "categories")]
    assert lengths[0] == lengths[1]
    assert min(lengths[0]) == 1
    assert 90 < max(lengths[0]) <= amazon.LONGEST


def test_ranks_cover_their_range() -> None:
    ranks = Draw(100_000, 0).ranks(5)
    counts = np.bincount(ranks, minlength=5)
    assert len(counts) == 5
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_rows_are_read_in_batches_and_passed_over_again() -> None:
    rows = Rows({"text": ["a", "b", "c"]}, torch.tensor([0.0, 1.0, 2.0]), batch_size=2, epochs=2)
    assert [(columns["text"], labels.tolist()) for columns, labels in rows.loader()] == [
        (["a", "b"], [0.0, 1.0]),
        (["c"], [2.0]),
    ] * 2


# --- the samples -----------------------------------------------------------------------------------------------------


def _read(path: str) -> list[dict[str, str]]:
    with (SAMPLES / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _floats(texts: Iterable[str]) -> torch.Tensor:
    return torch.tensor([float(text) if text else float("nan") for text in texts])


def _criteo_sample() -> Rows:
    lines = _read("deepctr_torch/criteo_sample.txt") + _read("torch_rechub/criteo_sample.csv")
    columns: Columns = {name: _floats(line[name] for line in lines) for name in criteo.NUMBERS}
    columns |= {name: [line[name] for line in lines] for name in criteo.TEXTS}
    return Rows(columns, _floats(line["label"] for line in lines), 64)


def _taobao_sample() -> Rows:
    """The rows have no tag lists: the click sequence stands for both."""
    lines = _read("fuxictr/tiny_csv_train_sample.csv")
    sources = {"user_id": "userid"} | dict.fromkeys(dssm.USER_LISTS, "click_sequence")
    columns: Columns = {
        name: [line[sources.get(name, name)].replace("^", "|") for line in lines]
        for name in [*dssm.USER, *dssm.ITEM, *dssm.USER_LISTS]
    }
    columns["price"] = _floats(line["price"] for line in lines)
    return Rows(columns, _floats(line["clk"] for line in lines), 32)


def _amazon_sample() -> Rows:
    """Of each user all purchases, each with those before it: the first one has an empty history."""
    lines = sorted(_read("torch_rechub/amazon_electronics_sample.csv"), key=lambda line: float(line["time"]))
    columns: dict[str, list[str]] = {
        name: [] for name in ("user_id", "item_id", "category", "history_items", "history_categories")
    }
    past: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for line in lines:
        bought = past[line["user_id"]]
        row = (line["user_id"], line["item_id"], line["cate_id"], *["|".join(e[i] for e in bought) for i in (0, 1)])
        for column, text in zip(columns.values(), row, strict=True):
            column.append(text)
        bought.append((line["item_id"], line["cate_id"]))
    assert "" in columns["history_items"]
    return Rows(dict(columns), torch.tensor([float(i % 2) for i in range(len(lines))]), 32)


REAL: dict[str, Callable[[], Rows]] = {
    "DLRM": _criteo_sample,
    "DeepFM": _criteo_sample,
    "DSSM": _taobao_sample,
    "DIN": _amazon_sample,
    "DIEN": _amazon_sample,
}
