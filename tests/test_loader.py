"""`StagedDataLoader` and `smart_stage` as a user meets them."""

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torchstage
from tests.support import Clicks, Scale, assert_same, assert_same_training, click_data, click_loader, numbers, train
from torchstage import SmartStageOptions, StagedDataLoader, make_prefetch_hook, smart_stage
from torchstage.errors import FallbackWarning, OptionError


class Rows(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(numbers(5))


class Old:
    """An iterable of the old kind, with ``__getitem__`` alone."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return numbers(5)[index]


@pytest.mark.parametrize("loader", [numbers(5), tuple(numbers(5)), Rows(), Old(), DataLoader(Rows(), batch_size=None)])
def test_any_iterable_of_batches_is_taken(loader: Any) -> None:
    staged, ours = smart_stage(Scale(), loader)
    for _ in range(2):
        assert [int(x[0]) for x in ours if staged(x) is not None] == [0, 1, 2, 3, 4]
    assert ours.stats.staged_steps == 10


def test_the_result_is_a_named_pair() -> None:
    pair = smart_stage(Scale(), numbers(2))
    assert pair == (pair.model, pair.loader)
    assert isinstance(pair.loader, StagedDataLoader)
    assert isinstance(pair.model, torchstage.StagedModel)


def test_len_is_the_loaders_where_it_has_one() -> None:
    assert len(StagedDataLoader(click_loader())) == 7
    with pytest.raises(TypeError, match=r"len\(\)"):
        len(StagedDataLoader(iter(numbers(2))))


def test_other_attributes_are_the_loaders() -> None:
    theirs = click_loader()
    ours = StagedDataLoader(theirs)
    assert ours.dataset is theirs.dataset
    assert ours.batch_size == 32
    with pytest.raises(AttributeError, match="nonsense"):
        ours.nonsense  # noqa: B018


def test_an_attribute_that_the_loader_has_is_set_on_the_loader() -> None:
    """A loader of the user's that shuffles by its own ``epoch`` must see the loop's."""

    class Shuffled:
        epoch = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch))
            return iter([numbers(8)[i] for i in order])

    def passes(loader: Any) -> list[torch.Tensor]:
        taken = []
        for loader.epoch in range(3):
            taken += list(loader)
        return taken

    assert_same(passes(Shuffled()), passes(StagedDataLoader(Shuffled())))
    ours: Any = StagedDataLoader(click_loader())
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        ours.batch_size = 3
    ours.note = "mine"
    assert not hasattr(ours._shared.loader, "note")


def test_a_copy_and_a_pickle_are_of_the_loader_also_while_it_runs() -> None:
    staged, ours = smart_stage(Scale(), DataLoader(TensorDataset(torch.arange(6.0)), 2))
    x = next(iter(ours))[0]
    for theirs in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(theirs) is DataLoader
        assert_same([batch[0] for batch in theirs], [batch[0] for batch in ours])
    assert torch.equal(staged(x), Scale()(x))
    ours.close()


def test_a_loader_without_a_length_is_true() -> None:
    assert StagedDataLoader(iter(numbers(2)))
    assert not StagedDataLoader([])


def test_it_works_without_a_model_and_with_one_directly() -> None:
    assert [int(x[0]) for x in StagedDataLoader(numbers(4), capacity=2)] == [0, 1, 2, 3]
    loader = StagedDataLoader(numbers(4), Scale())
    assert loader.staged_model is not None
    outputs = [loader.staged_model(x).detach() for x in loader]
    assert_same(outputs, [Scale()(x).detach() for x in numbers(4)])
    assert loader.stats.staged_steps == 4


def test_options_can_be_given_as_a_whole_and_one_by_one() -> None:
    loader = smart_stage(Scale(), [], SmartStageOptions(capacity=3, name="mine"), num_threads=2).loader
    assert (loader.options.capacity, loader.options.num_threads, loader.options.name) == (3, 2, "mine")


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_batches_keep_their_types_and_contents() -> None:
    given: list[Any] = [
        {"a": torch.ones(2), "b": [torch.zeros(1), "text", None]},
        Pair(torch.ones(1), torch.zeros(1)),
        (["a", "b"], 3, 2.5, b"x"),
        torch.ones(()),
    ]
    for theirs, ours in zip(given, StagedDataLoader(given), strict=True):
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)


def test_an_empty_loader_gives_no_batch() -> None:
    staged, loader = smart_stage(Scale(), [])
    assert list(loader) == []
    assert loader.stats.batches == 0
    assert loader.plan is None
    assert torch.equal(staged(torch.ones(2)), Scale()(torch.ones(2)))


def test_a_mapping_binds_by_name_and_other_keys_are_ignored() -> None:
    def batches() -> list[dict[str, torch.Tensor]]:
        dense, ids, label = click_data(64).tensors
        return [{"id": label, "ids": ids, "dense": dense, "label": label}] * 3

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(ids=batch["ids"], dense=batch["dense"]), batch["label"]

    loader = assert_same_training(Clicks(), batches, call=call)
    assert loader.stats.staged_steps == 6


def test_nested_features_spread_over_forward() -> None:
    def batches() -> list[Any]:
        dense, ids, label = click_data(64).tensors
        return [((dense, ids), label)] * 3

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (dense, ids), label = batch
        return model(dense, ids), label

    assert assert_same_training(Clicks(), batches, call=call).stats.staged_steps == 6


def test_inputs_says_how_to_call_forward() -> None:
    def batches() -> list[Any]:
        dense, ids, label = click_data(64).tensors
        return [(label, {"d": dense, "i": ids})] * 3

    def call(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch[1]["d"], ids=batch[1]["i"]), batch[0]

    loader = assert_same_training(
        Clicks(), batches, call=call, inputs=lambda batch: ((), {"ids": batch[1]["i"], "dense": batch[1]["d"]})
    )
    assert loader.stats.staged_steps == 6


def test_an_already_captured_graph_is_used_in_its_mode() -> None:
    model = Clicks().eval()
    graph = torch.fx.symbolic_trace(model)
    staged, loader = smart_stage(model, DataLoader(click_data(), 32), graph=graph)
    outputs = [staged(dense, ids) for dense, ids, _ in loader]
    assert_same(outputs, [model(dense, ids) for dense, ids, _ in DataLoader(click_data(), 32)])
    assert loader.stats.staged_steps == 7
    with pytest.raises(OptionError, match=r"graph must be captured from the model itself\. Its parameter 'tables"):
        smart_stage(Clicks(), [], graph=graph)


def test_a_graph_that_was_changed_is_what_runs() -> None:
    """The graph is used, not merely accepted: one that computes something else gives something else."""
    model = Scale()
    graph = torch.fx.symbolic_trace(model)
    for node in graph.graph.nodes:
        if node.target is __import__("operator").add:
            node.args = (node.args[0], 2)
    graph.recompile()
    staged, loader = smart_stage(model, numbers(2), graph=graph)
    assert [int(staged(x)[0]) for x in loader] == [2, 4]


# ---------------------------------------------------------------- pools


@pytest.mark.parametrize(("inter", "intra"), [(1, 1), (3, 1), (2, 2)])
def test_branches_run_side_by_side_in_a_pool_and_stay_bit_equal(inter: int, intra: int) -> None:
    pool = torchstage.add_stage_thread_pool(inter, intra, "")
    options: dict[str, Any] = {"use_stage_subgraph_thread_pool": True, "stage_subgraph_thread_pool_id": pool}
    loader = assert_same_training(Clicks(), click_loader, num_threads=2, capacity=2, **options)
    assert loader.stats.staged_steps == 14


def test_two_branches_are_in_the_pool_at_the_same_time() -> None:
    """The two branches wait for each other: one after the other they would never end."""
    both = threading.Barrier(2, timeout=10)

    @torchstage.ops.pure_op
    def meet(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread().name.startswith("torchstage-pool-pair"):
            both.wait()
        return x + 1

    class Two(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (meet(x * 2) + meet(x * 3)) * self.weight

    pool = torchstage.add_stage_thread_pool(2, 1, "pair")
    staged, loader = smart_stage(
        Two(), numbers(4), use_stage_subgraph_thread_pool=True, stage_subgraph_thread_pool_id=pool
    )
    for i, x in enumerate(loader):
        assert int(staged(x)[0]) == 5 * i + 2
    assert loader.stats.staged_steps == 4


def test_an_error_in_a_branch_names_its_node() -> None:
    class Bad(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.exp() + x.view(3)) * self.weight + x.sin().sum() + x.view(3).cos()

    pool = torchstage.add_stage_thread_pool(2, 1, "")
    batches = [torch.ones(3), torch.ones(4)]
    _, loader = smart_stage(Bad(), batches, use_stage_subgraph_thread_pool=True, stage_subgraph_thread_pool_id=pool)
    with pytest.raises(RuntimeError, match="shape") as caught:
        list(loader)
    assert "node `view" in "".join(caught.value.__notes__)


def test_an_unknown_pool_is_an_error_when_the_loader_is_made() -> None:
    with pytest.raises(OptionError, match=r"stage_subgraph_thread_pool_id must be .*Found: 77\."):
        smart_stage(Scale(), [], use_stage_subgraph_thread_pool=True, stage_subgraph_thread_pool_id=77)


def test_intra_op_threads_of_the_step_are_those_of_the_stage() -> None:
    torch.set_num_threads(2)
    seen: set[int] = set()

    @torchstage.ops.pure_op
    def look(x: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return x + 1

    class Looks(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return look(x) * self.weight

    _, loader = smart_stage(Looks(), numbers(3))
    torch.set_num_threads(1)
    thread = threading.Thread(target=lambda: torch.set_num_threads(2))  # makes 2 the default of new threads
    thread.start()
    thread.join()
    list(loader)
    assert seen == {torch.get_num_threads()}


# ---------------------------------------------------------------- clients, start, hook


def test_each_client_gets_every_epoch_once_however_late_it_comes() -> None:
    loader = StagedDataLoader(numbers(10), num_clients=2, capacity=2)
    first = [[int(x[0]) for x in loader] for _ in range(3)]  # one client alone runs through three epochs
    late: list[list[int]] = []
    thread = threading.Thread(target=lambda: late.extend([[int(x[0]) for x in loader] for _ in range(3)]))
    thread.start()
    thread.join(10)
    assert first == [list(range(10))] * 3
    assert late == [[], [], []]


def test_clients_that_are_new_threads_in_each_epoch_share_it() -> None:
    loader = StagedDataLoader(numbers(40), num_clients=2, capacity=2)
    for _ in range(3):
        seen: list[int] = []
        threads = [threading.Thread(target=lambda: seen.extend(int(x[0]) for x in loader)) for _ in range(2)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(seen) == list(range(40))


def test_clients_train_replicas_on_staged_batches() -> None:
    model = Scale()
    staged, loader = smart_stage(model, numbers(30), num_clients=3, num_threads=2, capacity=3)
    outputs: dict[int, float] = {}

    def client() -> None:
        for x in loader:
            outputs[int(x[0])] = staged(x)[0].item()

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert outputs == {i: 2.0 * i + 1 for i in range(30)}
    assert loader.stats.staged_steps == 30


def test_two_iterations_of_one_thread_are_independent() -> None:
    loader = StagedDataLoader(numbers(6), capacity=2)
    pairs = [(int(a[0]), int(b[0])) for a, b in zip(loader, loader, strict=True)]
    assert pairs == [(i, i) for i in range(6)]


def test_a_newer_iteration_over_a_one_shot_loader_takes_over() -> None:
    loader = StagedDataLoader(iter(numbers(6)), capacity=2)
    old = iter(loader)
    assert int(next(old)[0]) == 0
    assert [int(x[0]) for x in loader] == [1, 2, 3, 4, 5]
    with pytest.raises(torchstage.errors.TorchstageError, match="newer iteration over the same one-shot loader"):
        next(old)


def staging_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("torchstage-")]


def test_the_prefetch_hook_starts_before_the_loop_and_stops_after_it() -> None:
    read = threading.Event()

    def batches() -> Iterator[torch.Tensor]:
        for i, x in enumerate(numbers(6)):
            if i == 1:
                read.set()
            yield x

    staged, loader = smart_stage(Scale(), batches())
    with make_prefetch_hook():
        assert read.wait(10)
        assert staging_threads()
        for x in loader:
            assert int(staged(x)[0]) == 1
            break
    assert not staging_threads()
    assert [int(x[0]) for x in loader] == [1, 2, 3, 4, 5]


def test_the_hook_stops_the_work_when_the_loop_raises() -> None:
    _, loader = smart_stage(Scale(), numbers(50), num_threads=3)
    with pytest.raises(ZeroDivisionError), make_prefetch_hook(loader):
        iterator = iter(loader)
        next(iterator)
        raise ZeroDivisionError
    assert not staging_threads()


def test_a_started_loader_hands_out_the_same_batches() -> None:
    plain = copy.deepcopy(model := Clicks())
    torch.manual_seed(0)
    expected = train(plain, click_loader(), epochs=1)
    torch.manual_seed(0)
    staged, loader = smart_stage(model, click_loader())
    with make_prefetch_hook(loader):
        assert_same(expected, train(staged, loader, epochs=1))


def test_the_loader_is_a_context_manager() -> None:
    with StagedDataLoader(numbers(50), num_threads=2) as loader:
        iterator = iter(loader)
        next(iterator)
        assert staging_threads()
    assert not staging_threads()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "loader", "message"),
    [
        (42, [], r"model must be a torch\.nn\.Module\. Found: int\. The order is smart_stage\(model, loader\)"),
        ([], Scale(), r"model must be a torch\.nn\.Module\. Found: list"),
        (Scale(), 42, r"loader must be an iterable of batches, such as a DataLoader.*Found: int"),
        (
            Scale(),
            StagedDataLoader([]),
            r"loader is a StagedDataLoader already\. Pass the loader that it was made from",
        ),
    ],
)
def test_what_cannot_be_staged_is_a_type_error(model: Any, loader: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        smart_stage(model, loader)


def test_an_unknown_option_is_an_error_that_lists_them() -> None:
    with pytest.raises(OptionError, match=r"unknown option 'num_thread'\. The options are: capacity, num_threads"):
        smart_stage(Scale(), [], num_thread=2)


def test_a_batch_that_does_not_bind_is_an_error_at_the_first_batch() -> None:
    _, loader = smart_stage(Clicks(), numbers(3))
    with pytest.raises(torchstage.errors.BindingError, match=r"forward: +Clicks\.forward\(dense: torch\.Tensor, ids"):
        next(iter(loader))


def test_a_later_batch_that_does_not_bind_is_an_error_at_its_position() -> None:
    _, loader = smart_stage(Clicks(), [*click_loader(), (torch.ones(2, 2),)])
    seen = 0
    with pytest.raises(
        torchstage.errors.BindingError, match="requires 2 positional arguments, the batch has 1"
    ) as caught:
        for _ in loader:
            seen += 1
    assert seen == 7
    assert "batch 7" in "".join(caught.value.__notes__)


def test_a_mark_that_cannot_be_staged_is_an_error_at_the_first_batch() -> None:
    class Marked(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torchstage.staged(x * self.weight)

    _, loader = smart_stage(Marked(), numbers(3))
    with pytest.raises(torchstage.errors.MarkError, match="cannot be staged"):
        next(iter(loader))


def test_marks_train_bit_equal() -> None:
    class Marked(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            early = torchstage.staged(x.exp())
            return (early.sin() + torchstage.mark_target_node(x.cos())) * self.weight

    for smart in (True, False):
        loader = assert_same_training(
            Marked(), lambda: numbers(6), call=lambda model, x: (model(x), x), do_smart_stage=smart, num_threads=2
        )
        assert loader.plan is not None
        assert loader.plan.cut == (("sin", "cos") if smart else ("exp",))
        assert loader.stats.staged_steps == 12


def test_moving_a_batch_is_a_fallback_and_not_an_error() -> None:
    model = Scale()
    staged, loader = smart_stage(model, numbers(4))
    with pytest.warns(FallbackWarning, match="raw batch"):
        for x in loader:
            assert torch.equal(staged(x.clone()), model(x))
