"""The demo: a DLRM-style click model on UCI Adult, trained plain and staged, and what staging changed."""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchstage import ops
from torchstage._adult import NUMBERS, TEXTS, Adult, AdultBatch, Texts, adult_loader
from torchstage._smart_stage import smart_stage
from torchstage.loaders import StagedDataLoader

_AGES = (18.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 65.0)
_CROSSES = (("education", "occupation"), ("native-country", "occupation"), ("relationship", "marital-status"))


class ClickModel(nn.Module):
    """DLRM with raw input: text columns are hashed, ages bucketised, columns crossed, numbers normalised in forward.

    Args:
        buckets: hash buckets of each text column and cross.
        dim: embedding dimension.
    """

    low: torch.Tensor
    high: torch.Tensor
    ages: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, buckets: int = 10_000, dim: int = 16) -> None:
        super().__init__()
        self.buckets = buckets
        self.columns = nn.ModuleList([nn.Embedding(buckets, dim, sparse=True) for _ in TEXTS])
        self.crosses = nn.ModuleList([nn.Embedding(buckets, dim, sparse=True) for _ in _CROSSES])
        self.age = nn.Embedding(len(_AGES) + 1, dim)
        self.bottom = nn.Sequential(*_mlp(len(NUMBERS), 128, 64, dim))
        features = 2 + len(TEXTS) + len(_CROSSES)
        self.top = nn.Sequential(
            *_mlp(dim + features * (features - 1) // 2, 256, 128), nn.Dropout(0.1), nn.Linear(128, 1)
        )
        self.register_buffer("low", torch.tensor([17.0, 12285.0, 1.0, 0.0, 0.0, 1.0]))
        self.register_buffer("high", torch.tensor([90.0, 1490400.0, 16.0, 99999.0, 4356.0, 99.0]))
        self.register_buffer("ages", torch.tensor(_AGES))
        row, column = torch.triu_indices(features, features, 1)
        self.register_buffer("pairs", row * features + column)

    def forward(self, numbers: torch.Tensor, texts: Texts) -> torch.Tensor:
        """Return logits [rows] for ``numbers`` float32 [rows, 6] and one array of text [rows] per column."""
        ids = [ops.string_to_hash_bucket(column, self.buckets) for column in texts]
        by_name = dict(zip(TEXTS, ids, strict=True))
        crossed = [ops.hash_bucket(by_name[a] * self.buckets + by_name[b], self.buckets) for a, b in _CROSSES]
        ages = torch.bucketize(numbers[:, 0].contiguous(), self.ages)
        scaled = torch.log1p(((numbers - self.low) / (self.high - self.low)).clamp(0, 1) * 100)

        dense = self.bottom(scaled)
        rows = [table(i) for table, i in zip([*self.columns, *self.crosses], [*ids, *crossed], strict=True)]
        vectors = torch.stack([dense, self.age(ages), *rows], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        pairs = dots.index_select(1, self.pairs)
        logits: torch.Tensor = self.top(torch.cat([dense, pairs], dim=1))
        return logits.squeeze(1)


@dataclasses.dataclass
class Run:
    """One way of training the model, and what was seen of it."""

    name: str
    model: nn.Module
    loader: Iterable[AdultBatch]
    optimizer: torch.optim.Optimizer
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    waiting: list[float] = dataclasses.field(default_factory=list)
    computing: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)

    def epoch(self, bar: Any) -> None:
        """Train one epoch: the loop that a user writes, with two clocks."""
        criterion = nn.BCEWithLogitsLoss()
        begun = asked = time.perf_counter()
        steps = 0
        for (numbers, texts), label in self.loader:
            got = time.perf_counter()
            loss = criterion(self.model(numbers, texts), label)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())
            self.waiting.append(got - asked)
            asked = time.perf_counter()
            self.computing.append(asked - got)
            steps += 1
            bar.update()
        self.rates.append(steps / (time.perf_counter() - begun))


def run_demo(
    epochs: int = 6, batch_size: int = 1024, num_threads: int = 1, capacity: int = 4, rows: int | None = None
) -> str:
    """Train plain and staged, epoch by epoch in turn, and return the report.

    Args:
        epochs: epochs of each.
        batch_size: rows in a step.
        num_threads: as in `SmartStageOptions`.
        capacity: as in `SmartStageOptions`.
        rows: use only so many rows of the data; None for all.
    """
    data = Adult()
    if rows is not None:
        data.numbers, data.texts, data.label = data.numbers[:rows], data.texts[:rows], data.label[:rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that spin for one step's operations would hide what is compared
    try:
        plain, staged = _runs(data, batch_size, num_threads, capacity)
        with _progress(2 * epochs * len(adult_loader(data, batch_size))) as bar:
            for epoch in range(epochs):
                for run in (plain, staged) if epoch % 2 == 0 else (staged, plain):
                    bar.set_description(f"{run.name} epoch {epoch + 1}")
                    torch.manual_seed(epoch)  # the same shuffle and the same dropout for both
                    run.epoch(bar)
        return _report(plain, staged, data)
    finally:
        torch.set_num_threads(threads)


def example() -> tuple[nn.Module, Any]:
    """Return the demo's model and a loader, for ``python -m torchstage explain torchstage._demo:example``."""
    torch.manual_seed(0)
    return ClickModel(), adult_loader(Adult(), 1024)


def _runs(data: Adult, batch_size: int, num_threads: int, capacity: int) -> tuple[Run, Run]:
    torch.manual_seed(0)
    model = ClickModel()
    twin = copy.deepcopy(model)
    staged = smart_stage(twin, adult_loader(data, batch_size), num_threads=num_threads, capacity=capacity)
    return (
        Run("plain", model, adult_loader(data, batch_size), torch.optim.SGD(model.parameters(), lr=0.1)),
        Run("staged", staged.model, staged.loader, torch.optim.SGD(staged.model.parameters(), lr=0.1)),
    )


def _report(plain: Run, staged: Run, data: Adult) -> str:
    assert isinstance(staged.loader, StagedDataLoader)
    rows = [
        ("", "plain", "staged"),
        ("steps per second", *(f"{statistics.median(run.rates):.1f}" for run in (plain, staged))),
        ("  of which waiting, ms", *(f"{_mean(run.waiting) * 1e3:.2f}" for run in (plain, staged))),
        ("  of which computing, ms", *(f"{_mean(run.computing) * 1e3:.2f}" for run in (plain, staged))),
        ("loss of the last epoch", *(f"{_mean(_last(run)):.6f}" for run in (plain, staged))),
    ]
    pairs = [f / p for p, f in zip(plain.rates, staged.rates, strict=True)]
    ratio = f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f} over {len(pairs)} epochs)"
    lines = [f"UCI Adult, {len(data):,} rows, {len(plain.losses)} steps each, 1 intra-op thread", ""]
    lines += [f"{name:<26}{a:>12}{b:>12}" for name, a, b in rows]
    lines += [
        f"{'staged / plain':<26}{ratio}",
        f"{'losses bit-equal':<26}{_yes(_equal(plain.losses, staged.losses))}, all {len(plain.losses)} steps",
        f"{'outputs bit-equal':<26}{_yes(_equal(_outputs(plain, data), _outputs(staged, data)))}, eval mode, raw batch",
        f"{'parameters bit-equal':<26}{_yes(_equal(_state(plain), _state(staged)))}, and buffers, after the last step",
        "",
        str(staged.loader.plan),
        "",
        str(staged.loader.stats),
    ]
    return "\n".join(lines)


def _outputs(run: Run, data: Adult) -> list[torch.Tensor]:
    (numbers, texts), _ = data[range(min(4096, len(data)))]
    run.model.eval()
    with torch.no_grad():
        outputs = [run.model(numbers, texts)]
    run.model.train()
    return outputs


def _state(run: Run) -> list[torch.Tensor]:
    return list(run.model.state_dict().values())


def _last(run: Run) -> list[float]:
    steps = len(run.losses) // len(run.rates)
    return [loss.item() for loss in run.losses[-steps:]]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _mlp(*sizes: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers


def _progress(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, unit="step", leave=False)


class _NoBar:
    """Stands for the progress bar where tqdm (the ``demo`` extra) is not installed: says which epoch runs."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self) -> None:
        pass

    def set_description(self, text: str) -> None:
        print(text, flush=True)
