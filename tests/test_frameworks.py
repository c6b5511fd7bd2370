"""The examples of other people's loaders and trainers, run; and what their users may trip over.

Each package may be missing. What is compared is the training, plain and staged, from the same seed.
"""

import importlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchstage
from tests.support import assert_same
from torchstage import StagedDataLoader

Run = Callable[[bool], tuple[nn.Module, Any]]
STEPS = 32  # of 2,000 rows in batches of 128, twice


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Import an example by name, as it runs: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))

    def load(name: str, package: str) -> Any:
        pytest.importorskip(package, reason=f"{package} is not installed")
        return importlib.import_module(name)

    return load


def compare(run: Run) -> StagedDataLoader:
    """Run an example's comparison; its printed verdict is checked here by other means."""
    clicks: Any = importlib.import_module("clicks")
    plain, staged, loader = clicks.compare(run)
    assert_same(list(plain.state_dict().values()), list(staged.state_dict().values()))
    return loader


# Warnings of packages about themselves are not what is tested here; those of torchstage show in the statistics.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("name", "package", "steps", "lifted"),
    [
        ("lightning_trainer", "lightning", STEPS, "string_to_hash_bucket"),
        ("accelerate_prepare", "accelerate", STEPS, "string_to_hash_bucket"),
        ("torchdata_stateful", "torchdata", STEPS, "string_to_hash_bucket"),
        ("torchdata_nodes", "torchdata.nodes", STEPS, "string_to_hash_bucket"),
        ("webdataset_shards", "webdataset", STEPS, "string_to_hash_bucket"),
        ("tensordict_batches", "tensordict", 29, "hash_bucket"),  # its cache of classes is filled in the first step
        ("torchrec_kjt", "torchrec", 20, "remainder"),
        ("ray_data", "ray.data", STEPS, "hash_bucket"),
    ],
)
def test_an_example_trains_as_the_plain_run(
    name: str, package: str, steps: int, lifted: str, example: Callable[[str, str], Any]
) -> None:
    module = example(name, package)
    try:
        loader = compare(module.run)
    finally:
        if package == "ray.data":
            module.ray.shutdown()
    assert loader.stats.staged_steps >= steps
    assert set(loader.stats.fallbacks) <= {"the forward is recorded"}
    assert loader.plan is not None
    assert lifted in [node.name for node in loader.plan.lifted]


# ---------------------------------------------------------------- Accelerate


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.cat([torch.log1p(x.abs()), self.table((ids * 7) % 100)], 1))).squeeze(1)


def data(rows: int = 77) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.randn(rows, 2, generator=generator),
        torch.randint(0, 1000, (rows,), generator=generator),
        torch.rand(rows, generator=generator),
    )


@pytest.fixture
def accelerate() -> Iterator[types.ModuleType]:
    package = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def forget() -> None:
        package.state.AcceleratorState._reset_state(reset_partial_state=True)
        package.state.GradientState._reset_state()

    forget()
    yield package
    forget()


def test_accelerate_with_mixed_precision_is_staged_in_it(
    accelerate: types.ModuleType, example: Callable[[str, str], Any]
) -> None:
    """`prepare` sets a forward on the staged model, which enters autocast and calls the one that was there."""
    module = example("accelerate_prepare", "accelerate")
    loader = compare(lambda stage: module.run(stage, mixed_precision="bf16"))
    assert loader.stats.staged_steps >= STEPS - 10
    assert set(loader.stats.fallbacks) == {"autocast state"}


@pytest.mark.parametrize("order", ["all prepared first", "only the loader prepared"])
def test_accelerate_steps_its_optimizer_at_the_batches_of_the_plain_run(
    accelerate: types.ModuleType, order: str
) -> None:
    """The last batch of an epoch ends an accumulation: when the step on it runs, not when it is read."""

    def run(stage: bool) -> tuple[list[torch.Tensor], list[bool]]:
        torch.manual_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        model: Any = Scores()
        state = model.state_dict()
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
        loader: Any = DataLoader(data(), batch_size=16, shuffle=True)
        if order == "all prepared first":
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        else:
            loader = accelerator.prepare(loader)
        if stage:
            model, loader = torchstage.smart_stage(model, loader, capacity=3, num_threads=2)
            assert isinstance(loader, StagedDataLoader)
        if order != "all prepared first":
            model, optimizer = accelerator.prepare(model, optimizer)
        stepped = []
        for _ in range(3):
            for x, ids, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(x, ids), y))
                    optimizer.step()
                    optimizer.zero_grad()
                    stepped.append(accelerator.sync_gradients)
        assert not stage or loader.stats.staged_steps == 15
        return list(state.values()), stepped

    plain, when = run(False)
    staged, when_staged = run(True)
    assert when == [False, False, True, False, True] * 3
    assert when_staged == when
    assert_same(plain, staged)


def test_accelerates_prepared_loader_is_not_changed_and_ends_at_a_break(accelerate: types.ModuleType) -> None:
    prepared = accelerate.Accelerator(cpu=True).prepare(DataLoader(data(), batch_size=16))
    before = prepared.base_dataloader
    model, loader = torchstage.smart_stage(Scores(), prepared, capacity=3)
    assert prepared.base_dataloader is before
    assert len(loader) == len(prepared) == 5
    for x, ids, _ in loader:
        model(x, ids)
        break
    assert [len(batch[0]) for batch in loader] == [16, 16, 16, 16, 13]
    assert loader.stats.staged_steps == 1


def test_accelerates_hook_starts_no_epoch_before_its_sampler_is_set(accelerate: types.ModuleType) -> None:
    """A sampler that shuffles by the epoch's number gets it as the iteration begins, not when the work may start."""

    def orders(stage: bool) -> list[torch.Tensor]:
        rows = data()
        order: Any = DistributedSampler(rows, num_replicas=1, rank=0, seed=3)
        loader: Any = accelerate.Accelerator(cpu=True).prepare(DataLoader(rows, 16, sampler=order))
        if not stage:
            return [x for _ in range(3) for x, _, _ in loader]
        _, loader = torchstage.smart_stage(Scores(), loader, capacity=3)
        seen = []
        for _ in range(3):
            with torchstage.make_prefetch_hook(loader):
                seen += [x for x, _, _ in loader]
        return seen

    plain = orders(False)
    assert not torch.equal(plain[0], plain[5])
    assert_same(plain, orders(True))


def test_accelerates_loader_that_sends_batches_from_one_rank_is_refused(accelerate: types.ModuleType) -> None:
    config = accelerate.DataLoaderConfiguration(dispatch_batches=True)
    prepared = accelerate.Accelerator(cpu=True, dataloader_config=config).prepare(DataLoader(data(), batch_size=16))
    with pytest.raises(TypeError, match="dispatch_batches=False"):
        torchstage.smart_stage(Scores(), prepared)


# ---------------------------------------------------------------- Lightning


def lightning_module(method: str) -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Scores()
            self.epochs_seen: list[int] = []
            self.validated = 0

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.net(x, ids)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, ids, y = batch
            loss = nn.functional.mse_loss(self(x, ids), y)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, ids, y = batch
            self.validated += 1
            self.log("error", nn.functional.mse_loss(self(x, ids), y))

        def on_train_epoch_end(self) -> None:
            self.epochs_seen.append(self.current_epoch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Module()


def fitted(method: str, stage: bool, folder: Any, **options: Any) -> tuple[Any, Any, Any]:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    torch.manual_seed(0)
    module: Any = lightning_module(method)
    fit: Any = module
    loader: Any = DataLoader(data(), 16, generator=torch.Generator())
    if stage:
        fit, loader = torchstage.smart_stage(module, loader, method=method, capacity=3, num_threads=2)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options}
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=folder, **settings)
    trainer.fit(fit, loader, DataLoader(data(20), 10))
    return module, trainer, loader


@pytest.mark.parametrize("method", ["forward", "training_step"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"limit_train_batches": 3},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_a_lightning_trainer_trains_validates_and_logs_as_with_the_plain_module(
    method: str, options: dict[str, Any], tmp_path: Any
) -> None:
    plain, plain_trainer, _ = fitted(method, False, tmp_path, enable_checkpointing=False, **options)
    staged, trainer, loader = fitted(method, True, tmp_path, enable_checkpointing=False, **options)
    assert_same(list(plain.state_dict().values()), list(staged.state_dict().values()))
    for name in ("loss", "error"):
        assert torch.equal(trainer.callback_metrics[name], plain_trainer.callback_metrics[name])
    assert staged.epochs_seen == plain.epochs_seen == [0, 1, 2]
    assert staged.validated == plain.validated == 2 + 3 * 2
    steps = 3 * options.get("limit_train_batches", 5)
    if "precision" not in options:  # else it takes a few steps to learn the mode, and a few more to record in it
        assert loader.stats.staged_steps == steps if method == "forward" else loader.stats.staged_steps > 0
    assert set(loader.stats.fallbacks) <= {"raw batch", "nothing staged", "autocast state", "the forward is recorded"}


def test_a_lightning_checkpoint_of_a_staged_module_is_the_plain_ones(tmp_path: Any) -> None:
    plain, plain_trainer, _ = fitted("forward", False, tmp_path / "plain")
    staged, trainer, _ = fitted("forward", True, tmp_path / "staged")
    one, other = (
        torch.load(t.checkpoint_callback.best_model_path, weights_only=False) for t in (plain_trainer, trainer)
    )
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert_same(list(one["state_dict"].values()), list(other["state_dict"].values()))
    again = type(plain).load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert_same(list(staged.state_dict().values()), list(again.state_dict().values()))
