"""Features of torch that a training script uses around its model: each trains staged as it does plain, bit for bit.

The mode, autocast and default device that a step runs in, saving and copying have tests with the laws and the traps; here is
what wraps the model or the step.
"""

import contextlib
import copy
import io
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader

import torchstage
from tests.support import Clicks, Scale, assert_same, click_data, click_loader, numbers
from torchstage import StagedDataLoader, smart_stage
from torchstage._mode import Ambient
from torchstage.errors import FallbackWarning

Train = Callable[[Any, Any], list[torch.Tensor]]


def steps(
    model: Any, loader: Any, epochs: int = 2, context: Callable[[], Any] | None = None, call: Any = None
) -> list[torch.Tensor]:
    """Train with Adam; return outputs, gradients and the state at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen: list[torch.Tensor] = []
    call = model if call is None else call  # a compiled module has no truth value
    for _ in range(epochs):
        for dense, ids, label in loader:
            with contextlib.nullcontext() if context is None else context():
                output = call(dense, ids)
            loss = nn.functional.mse_loss(output.float(), label)
            optimizer.zero_grad()
            loss.backward()
            seen += [output.detach().clone()]
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
    return [*seen, *(value.clone() for value in model.state_dict().values())]


def assert_same_steps(
    train: Train,
    make: Callable[[], nn.Module] = Clicks,
    *,
    staged_steps: int | None = 14,
    prepare: Callable[[Any], None] | None = None,
) -> StagedDataLoader:
    """Train plain and staged from one seed with ``train(model, loader)``; all that it returns must be equal."""
    torch.manual_seed(0)
    plain = make()
    twin = copy.deepcopy(plain)
    for model in (plain, twin):
        if prepare is not None:
            prepare(model)
    torch.manual_seed(1)
    expected = train(plain, click_loader())
    torch.manual_seed(1)
    staged, loader = smart_stage(twin, click_loader(), num_threads=2, capacity=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_same(expected, train(staged, loader))
    assert staged_steps is None or loader.stats.staged_steps == staged_steps
    return loader


# ---------------------------------------------------------------- torch.compile

BACKENDS = ["eager", "aot_eager", "inductor"]


def needs_compiler(backend: str) -> None:
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler for inductor")


@pytest.fixture
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Dense(nn.Module):
    """Nothing that a compiler has to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(6, 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table((ids[:, 0] * 7) % 50)
        return self.out(self.drop(torch.cat([torch.log1p(dense.abs()), rows], dim=1))).squeeze(1)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at it
@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    ("make", "way"),
    [(Dense, "torch.compile"), (Dense, "module.compile"), (Dense, "forward"), (Clicks, "torch.compile")],
)
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_staged_model_trains_as_the_compiled_plain_one(
    make: Callable[[], nn.Module], way: str, backend: str
) -> None:
    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        if way == "torch.compile":
            return steps(model, loader, call=torch.compile(model, backend=backend))
        if way == "module.compile":
            model.compile(backend=backend)
        else:
            model.forward = torch.compile(model.forward, backend=backend)
        return steps(model, loader)

    assert_same_steps(train, make)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_what_is_compiled_of_a_staged_model_is_what_is_left_in_the_step() -> None:
    operations: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        operations.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    staged, loader = smart_stage(Dense(), click_loader(), capacity=3)
    compiled = torch.compile(staged, backend=backend)
    for dense, ids, _ in loader:
        compiled(dense, ids)
    assert loader.stats.staged_steps == 7
    assert any("linear" in name for name in operations)
    assert not any("log1p" in name or "remainder" in name for name in operations)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_submodule_of_a_staged_model_trains_as_in_the_plain_one(backend: str) -> None:
    """What is compiled stays as it is: compile the part of the model that is left in the step."""
    needs_compiler(backend)

    def compile_out(model: Any) -> None:
        model.out.compile(backend=backend)

    assert_same_steps(steps, prepare=compile_out, staged_steps=None)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_autocast_around_the_step(dtype: torch.dtype, cache: bool) -> None:
    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        return steps(model, loader, epochs=4, context=lambda: torch.autocast("cpu", dtype=dtype, cache_enabled=cache))

    loader = assert_same_steps(train, staged_steps=None)
    assert loader.stats.staged_steps > 0
    assert set(loader.stats.fallbacks) == {"autocast state"}


def test_a_worker_leaves_the_training_threads_cache_of_casts_alone() -> None:
    """A weight that is used twice in a forward is cast once, and its gradients are added in the narrow dtype."""
    layer, x = nn.Linear(64, 64), torch.randn(512, 64)
    ambient = torch.autocast("cpu", dtype=torch.bfloat16)

    def gradient(between: Callable[[], None]) -> torch.Tensor:
        layer.zero_grad()
        with ambient:
            first = layer(x)
            between()
            second = layer(x * 0.37)
        (first.float().square().sum() + second.float().exp().sum()).backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    def stage() -> None:
        settings = Ambient.now()

        def work() -> None:
            with settings.entered():
                assert torch.is_autocast_enabled("cpu")
                assert (x @ x.t()).dtype is torch.bfloat16

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    plain = gradient(lambda: None)
    assert torch.equal(gradient(stage), plain)
    assert not torch.equal(gradient(torch.clear_autocast_cache), plain)  # it would have been noticed


def test_precision_set_in_torchs_other_way_is_followed() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch knows one way only")

    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return steps(model, loader)
        finally:
            torch.backends.cuda.matmul.fp32_precision = "none"

    before = Ambient.now()
    assert_same_steps(train)
    assert Ambient.now() == before
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert before.differs(Ambient.now()) is not None
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("bad_step", [None, 5])
def test_a_grad_scaler_scales_and_skips_as_in_the_plain_run(bad_step: int | None) -> None:
    """A step whose gradients overflow is skipped by the scaler: no row of a table was written then."""

    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        seen: list[torch.Tensor] = []
        for epoch in range(2):
            for number, (dense, ids, label) in enumerate(loader):
                output = model(dense, ids)
                loss = nn.functional.mse_loss(output, label)
                if 7 * epoch + number == bad_step:
                    loss = loss * float("inf")
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                seen += [output.detach().clone(), torch.tensor(scaler.get_scale())]
        return [*seen, *(value.clone() for value in model.state_dict().values())]

    assert_same_steps(train)


# ---------------------------------------------------------------- checkpointing


class Checkpointed(nn.Module):
    """Checkpoints its own middle, with dropout in it, as large models do."""

    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.middle = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8))
        self.out = nn.Linear(8, 1)
        self.use_reentrant = use_reentrant

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table((ids[:, 0] * 7) % 50)
        joined = torch.cat([torch.log1p(dense.abs()), rows], dim=1)
        return self.out(checkpoint(self.middle, joined, use_reentrant=self.use_reentrant)).squeeze(1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_inside_the_model(use_reentrant: bool) -> None:
    loader = assert_same_steps(steps, lambda: Checkpointed(use_reentrant), staged_steps=None)
    assert loader.stats.staged_steps > 0


class Sequence(Checkpointed):
    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table((ids[:, 0] * 7) % 50)
        joined = torch.cat([torch.log1p(dense.abs()), rows], dim=1)
        return self.out(checkpoint_sequential(self.middle, 2, joined, use_reentrant=False)).squeeze(1)


def test_checkpoint_sequential_inside_the_model() -> None:
    assert_same_steps(steps, Sequence, staged_steps=None)


def test_activation_checkpointing_around_the_whole_model() -> None:
    """The forward runs twice on the same batch: with and without a graph."""

    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        return steps(model, loader, call=lambda *batch: checkpoint(model, *batch, use_reentrant=False))

    assert_same_steps(train, Checkpointed, staged_steps=None)


def test_a_model_that_counts_its_batches_is_checkpointed_as_the_plain_one() -> None:
    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        return steps(model, loader, call=lambda *batch: checkpoint(model, *batch, use_reentrant=False))

    assert_same_steps(train, staged_steps=None)


# ---------------------------------------------------------------- copies in the middle of training


def a_few(model: Any, loader: Any, change: Callable[[Any], Any], at: int = 3) -> list[torch.Tensor]:
    """Train two epochs, and do something to the model in the middle of the first."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen: list[torch.Tensor] = []
    for epoch in range(2):
        for number, (dense, ids, label) in enumerate(loader):
            if epoch == 0 and number == at:
                seen += change(model) or []
            output = model(dense, ids)
            optimizer.zero_grad()
            nn.functional.mse_loss(output.float(), label).backward()
            seen += [output.detach().clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
            optimizer.step()
    return [*seen, *(value.clone() for value in model.state_dict().values())]


def evaluated(model: nn.Module) -> list[torch.Tensor]:
    """Return what a copy gives for the first rows in eval mode."""
    dense, ids, _ = click_data()[:10]
    with torch.no_grad():
        return [model.eval()(dense, ids)]


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def restored(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Clicks()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), saved, restored],
    ids=["deepcopy", "copy", "pickle", "torch.save", "state_dict"],
)
def test_a_copy_in_the_middle_is_of_the_plain_model_and_disturbs_nothing(duplicate: Callable[[Any], Any]) -> None:
    def change(model: Any) -> list[torch.Tensor]:
        other = duplicate(model)
        if duplicate is copy.copy:  # shares its modules, so its mode too
            return list(other.parameters())[:1]
        assert not isinstance(other, torchstage.StagedModel)
        return evaluated(other)

    loader = assert_same_steps(lambda model, loader: a_few(model, loader, change), staged_steps=None)
    assert loader.stats.staged_steps >= 13


def test_an_exponential_average_of_a_staged_model_is_that_of_the_plain_one() -> None:
    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            for dense, ids, label in loader:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(dense, ids), label).backward()
                optimizer.step()
                average.update_parameters(model)
        return [*[v.clone() for v in average.state_dict().values()], *evaluated(average.module)]

    assert_same_steps(train)


# ---------------------------------------------------------------- changes in the middle of training


def double_and_back(model: Any) -> None:
    model.double()
    model.float()


def load(model: Any) -> None:
    torch.manual_seed(5)
    model.load_state_dict(Clicks().state_dict())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "to a dtype": lambda model: model.to(torch.float32) and None,
    "to a device": lambda model: model.to("cpu") and None,
    "to channels last": lambda model: model.to(memory_format=torch.preserve_format) and None,
    "double and back": double_and_back,
    "frozen layer": lambda model: model.out.requires_grad_(False) and None,
    "frozen table": lambda model: model.tables[1].requires_grad_(False) and None,
    "all frozen and unfrozen": lambda model: model.requires_grad_(False).requires_grad_(True) and None,
    "eval and train": lambda model: model.eval().train() and None,
    "one table in eval mode": lambda model: model.drop.eval() and None,
    "other state": load,
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.out) and None,
    "share_memory": lambda model: model.share_memory() and None,
    "zero_grad": lambda model: model.zero_grad(set_to_none=False),
    "apply": lambda model: model.apply(lambda module: None) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_staged_model_in_the_middle_is_done_as_in_the_plain_run(change: str) -> None:
    assert_same_steps(lambda model, loader: a_few(model, loader, CHANGES[change]), staged_steps=None)


# ---------------------------------------------------------------- hooks

WHERE: dict[str, Callable[[Any], nn.Module]] = {
    "the model": lambda model: model,
    "a table": lambda model: model.tables[1],
    "a layer": lambda model: model.out,
    "dropout": lambda model: model.drop,
    "batch norm": lambda model: model.norm,
}


def doubling(told: list[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any = None) -> Any:
        told.append("x2")
        if output is None:
            return tuple(arg if arg.is_floating_point() else arg // 2 for arg in args)
        return output * 2

    return hook


HOOKS: dict[str, Callable[[nn.Module, list[str]], Any]] = {
    "forward_pre": lambda m, told: m.register_forward_pre_hook(lambda *_: told.append("pre")),
    "forward": lambda m, told: m.register_forward_hook(lambda *_: told.append("forward")),
    "forward that doubles": lambda m, told: m.register_forward_hook(doubling(told)),
    "forward_pre that doubles": lambda m, told: m.register_forward_pre_hook(doubling(told)),
    "forward with kwargs": lambda m, told: m.register_forward_hook(lambda *_: told.append("kw"), with_kwargs=True),
    "forward always called": lambda m, told: m.register_forward_hook(lambda *_: told.append("a"), always_call=True),
    "full_backward_pre": lambda m, told: m.register_full_backward_pre_hook(lambda *_: told.append("backward pre")),
    "full_backward": lambda m, told: m.register_full_backward_hook(lambda *_: told.append("backward")),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    ("where", "when"),
    [*[(where, when) for where in WHERE for when in ("before staging", "in the middle")], ("a table", "after staging")],
)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_as_often_as_in_the_plain_model(hook: str, where: str, when: str) -> None:
    told: list[list[str]] = []

    def prepare(model: Any) -> None:
        told.append([])
        if when == "before staging":
            HOOKS[hook](WHERE[where](model), told[-1])

    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        mine = told[1 if isinstance(model, torchstage.StagedModel) else 0]

        def register(at: str) -> None:
            if when == at:
                HOOKS[hook](WHERE[where](model), mine)

        register("after staging")
        return a_few(model, loader, lambda model: register("in the middle"))

    assert_same_steps(train, prepare=prepare, staged_steps=None)
    assert told[0] == told[1]
    assert len(told[0]) >= 11


@pytest.mark.parametrize("kind", ["tensor", "post accumulate"])
def test_hooks_on_parameters_run_as_often_as_in_the_plain_model(kind: str) -> None:
    told: list[list[str]] = []

    def prepare(model: Any) -> None:
        calls: list[str] = []
        told.append(calls)
        for name, parameter in model.named_parameters():
            if kind == "tensor":
                parameter.register_hook(lambda _, name=name: calls.append(name))
            else:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))

    assert_same_steps(steps, prepare=prepare)
    assert sorted(told[0]) == sorted(told[1])
    assert len(told[0]) == 14 * 7


# ---------------------------------------------------------------- wrappers


def test_a_forward_set_on_the_staged_model_calls_the_staged_one_and_is_not_set_on_the_users() -> None:
    calls = []
    model = Scale()
    staged: Any
    staged, loader = smart_stage(model, numbers(6))
    inner = staged.forward

    def outer(x: torch.Tensor) -> Any:
        calls.append(1)
        return inner(x) * 3

    staged.forward = outer
    staged.eval()
    for number, x in enumerate(loader):
        assert staged(x)[0].item() == 3 * (2.0 * number + 1)
    assert staged(torch.ones(2))[0].item() == 9.0  # a raw batch: the plain forward is not the wrapper
    assert loader.stats.staged_steps == 6
    assert len(calls) == 7
    assert model(torch.ones(2))[0].item() == 3.0
    assert "forward" not in vars(model)
    assert type(copy.deepcopy(staged)) is Scale
    staged.forward = inner  # put back, as Lightning does
    assert staged(torch.ones(2))[0].item() == 3.0
    with pytest.raises(AttributeError):
        del staged.forward
    staged.forward = outer
    del staged.forward
    assert staged(torch.ones(2))[0].item() == 3.0


def test_data_parallel_and_sequential_around_a_staged_model() -> None:
    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        return steps(model, loader, call=nn.DataParallel(model))

    assert_same_steps(train, staged_steps=14)


def test_gradients_accumulate_and_a_closure_is_called_as_in_the_plain_run() -> None:
    """LBFGS calls the closure several times on one batch."""

    def train(model: Any, loader: Any) -> list[torch.Tensor]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        seen: list[torch.Tensor] = []
        for dense, ids, label in loader:

            def closure(dense: Any = dense, ids: Any = ids, label: Any = label) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(dense, ids), label)
                loss.backward()
                seen.append(loss.detach().clone())
                return loss

            optimizer.step(closure)
        return [*seen, *(value.clone() for value in model.state_dict().values())]

    loader = assert_same_steps(train, staged_steps=None)
    assert loader.stats.staged_steps > 7


# ---------------------------------------------------------------- several clients


def test_clients_that_train_replicas_are_each_as_a_plain_run_on_their_batches() -> None:
    """Two threads, each with a replica of its own, on the batches of one loader that they share."""
    batches = [tuple(batch) for batch in DataLoader(click_data(), 16)]
    model = Checkpointed()
    replicas = [copy.deepcopy(model).eval() for _ in range(2)]
    main, loader = smart_stage(model.eval(), batches, num_clients=2, num_threads=2, capacity=3)
    taken: list[list[int]] = [[], []]
    seen: list[list[torch.Tensor]] = [[], []]

    def step(net: Any, optimizer: Any, batch: Any) -> list[torch.Tensor]:
        dense, ids, label = batch
        frozen = main(dense, ids).detach()  # the staged one, shared by all clients
        output = net(dense, ids)
        optimizer.zero_grad()
        nn.functional.mse_loss(output + frozen, label).backward()
        optimizer.step()
        return [output.detach().clone(), frozen.clone()]

    def client(number: int) -> None:
        optimizer = torch.optim.SGD(replicas[number].parameters(), lr=0.1)
        for batch in loader:
            taken[number].append(next(i for i, known in enumerate(batches) if torch.equal(known[0], batch[0])))
            seen[number] += step(replicas[number], optimizer, batch)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(taken[0] + taken[1]) == list(range(len(batches)))
    main = torchstage.unwrap(main)
    for number in range(2):
        twin = copy.deepcopy(model).eval()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        expected = [tensor for i in taken[number] for tensor in step(twin, optimizer, batches[i])]
        assert_same(expected, seen[number])
        assert_same(list(twin.parameters()), list(replicas[number].parameters()))
    assert loader.stats.staged_steps + sum(loader.stats.fallbacks.values()) >= len(batches)
