"""The simulated accelerator itself: its numbers are the CPU's, and it catches what programs for accelerators get wrong."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from tests import simulated

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

Make = Callable[..., torch.optim.Optimizer]


@pytest.fixture
def sim(simulated_device: torch.device) -> Any:
    """Its module, as ``torch.cuda`` is for GPUs."""
    return torch.get_device_module(simulated_device)


def is_unwritten(tensor: torch.Tensor) -> bool:
    return bool((tensor.cpu().contiguous().view(torch.uint8) == 0xCD).all())


# --- its numbers -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4, sparse=sparse)
        self.bags = nn.EmbeddingBag(50, 4, mode="sum", sparse=sparse)
        self.rest = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.SiLU(), nn.Dropout(0.3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rest(torch.cat([self.table(ids[:, 0]), self.bags(ids[:, 1:])], dim=1)).sum(1)


def train(device: torch.device | str, sparse: bool, make: Make, accumulate: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = Model(sparse).to(device)
    tables = make(p for name, p in model.named_parameters() if not name.startswith("rest"))
    rest = torch.optim.Adam(model.rest.parameters(), foreach=False)
    seen = []
    for step in range(6):
        ids = torch.randint(0, 50, (16, 4)).to(device)
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), (ids[:, 0] > 20).float())
        if not accumulate or step % 2 == 0:
            model.zero_grad()
        loss.backward()
        tables.step()
        rest.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        seen += [loss.detach().cpu(), *(gradient.to("cpu", copy=True).to_dense() for gradient in gradients)]
    return [*seen, *(value.cpu() for value in model.state_dict().values())]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("sparse", "make"),
    [
        (False, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
        (False, lambda parameters: torch.optim.Adam(parameters)),
        (True, lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
        (True, lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)),
        (True, lambda parameters: torch.optim.SparseAdam(list(parameters))),
    ],
)
def test_training_has_the_bits_of_the_cpu(
    simulated_device: torch.device, sparse: bool, make: Make, accumulate: bool
) -> None:
    here, there = (train(device, sparse, make, accumulate) for device in ("cpu", simulated_device))
    assert len(here) == len(there) > 60
    assert all(map(torch.equal, here, there))


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM])
def test_recurrent_layers_are_those_of_the_cpu_but_for_rounding(simulated_device: torch.device, make: Any) -> None:
    torch.manual_seed(0)
    here, x = make(4, 5, num_layers=2), torch.randn(3, 2, 4)
    there = copy.deepcopy(here).to(simulated_device)
    torch.testing.assert_close(there(x.to(simulated_device))[0].cpu(), here(x)[0])
    here(x)[0].square().sum().backward()
    there(x.to(simulated_device))[0].square().sum().backward()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad)


def test_kernels_see_the_strides_that_they_would_see_on_the_cpu(simulated_device: torch.device) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        here = torch.randn(257, 33)
        there = here.to(simulated_device)
        assert torch.equal(here[:, ::2].sum(1), there[:, ::2].sum(1).cpu())  # differs after a copy that packs the rows
        assert torch.equal(here.t()[::3].sum(), there.t()[::3].sum().cpu())


def test_what_is_written_through_a_view_is_written(simulated_device: torch.device) -> None:
    x = torch.arange(6.0, device=simulated_device)
    x.unfold(0, 2, 2)[0].zero_()
    x.view(2, 3).t()[2].mul_(10)
    torch.view_as_real(torch.view_as_complex(x.view(3, 2))).select(1, 1)[1] = 7
    assert x.tolist() == [0, 0, 20, 7, 4, 50]
    out = torch.empty(0, device=simulated_device)
    torch.add(x, 1, out=out)  # grows
    assert out.tolist() == [1, 1, 21, 8, 5, 51]
    torch._foreach_add_([x, out], 1)
    assert (x[0].item(), out[0].item()) == (1, 2)
    assert x.add_(1) is x
    with pytest.raises(RuntimeError, match="single memory location"):
        x[1:].add_(x[:-1])


def test_conjugates_keep_their_sign(simulated_device: torch.device) -> None:
    x = torch.complex(torch.ones(2), torch.arange(2.0))
    assert torch.equal(x.to(simulated_device).conj().cpu(), x.conj())
    assert torch.equal(x.conj().to(simulated_device).cpu(), x.conj())


def test_sparse_tensors_come_and_go(simulated_device: torch.device) -> None:
    here = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), torch.arange(6.0).view(3, 2), (3, 2))
    there = here.to(simulated_device)
    assert there.device == there._values().device == simulated_device
    assert [t.direction for t in simulated.transfers()] == ["in", "in"]
    assert torch.equal(there.coalesce().cpu().values(), here.coalesce().values())
    assert torch.equal((there + there).to_dense().cpu(), (here + here).to_dense())
    there._values().mul_(2)
    assert torch.equal(there.to_dense().cpu(), 2 * here.to_dense())


def test_backward_has_a_thread_of_its_own(simulated_device: torch.device) -> None:
    x = torch.ones(2, device=simulated_device, requires_grad=True)
    seen: list[int] = []
    x.register_hook(lambda gradient: seen.append(threading.get_ident()))
    (x * 2).sum().backward()
    assert seen[0] != threading.get_ident()


def test_autocast_is_its_own(simulated_device: torch.device) -> None:
    linear, x = nn.Linear(4, 4).to(simulated_device), torch.randn(2, 4, device=simulated_device)
    with torch.autocast("sim", dtype=torch.bfloat16):
        low = linear(x)
    assert low.dtype == torch.bfloat16
    low.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x), torch.addmm(linear.bias, x, linear.weight.t()))
        assert linear(x).dtype == torch.float32


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda there: there + torch.ones(3),
        lambda there: there.add_(torch.ones(3)),
        lambda there: torch.ones(3) + there.sum(),
        lambda there: torch.cat([there, torch.ones(3)]),
        lambda there: there.index_select(0, torch.tensor([1])),
        lambda there: there.index_add_(0, torch.tensor([1], device=there.device), torch.ones(1)),
        lambda there: nn.functional.embedding(torch.tensor([1]), there[:, None]),
        lambda there: nn.functional.linear(torch.ones(2, 3), there[None]),
        lambda there: there[None].add_(torch.eye(1, 3).to_sparse()),
    ],
)
def test_tensors_of_host_and_device_do_not_mix(simulated_device: torch.device, mix: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(3, device=simulated_device))


def test_numbers_and_row_numbers_may_be_on_the_host(simulated_device: torch.device) -> None:
    there = torch.arange(3.0, device=simulated_device)
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]


def test_memory_that_nobody_wrote_is_seen_to_be(simulated_device: torch.device) -> None:
    assert is_unwritten(torch.empty(1000, device=simulated_device))
    assert is_unwritten(torch.empty_strided((3, 4), (1, 3), device=simulated_device))


# --- streams ---------------------------------------------------------------------------------------------------------


def event(sim: Any, stream: Any) -> Any:
    made = sim.Event()
    made.record(stream)
    return made


def asked_twice(sim: Any, stream: Any) -> None:
    made = event(sim, stream)
    assert [made.query(), made.query()] == [False, True]


def copy_there(sim: Any, stream: Any) -> None:
    with sim.stream(stream):
        torch.empty(1, device="sim").fill_(0)


@pytest.mark.parametrize(
    "wait",
    [
        lambda sim, stream: stream.synchronize(),
        lambda sim, stream: sim.synchronize(),
        lambda sim, stream: event(sim, stream).synchronize(),
        lambda sim, stream: event(sim, stream).wait(),
        lambda sim, stream: stream.record_event().synchronize(),
        lambda sim, stream: sim.current_stream().wait_event(event(sim, stream)),
        lambda sim, stream: sim.current_stream().wait_stream(stream),
        lambda sim, stream: sim.Stream().wait_stream(stream),
        asked_twice,
        copy_there,  # a kernel in the same stream comes after the copy
    ],
)
def test_a_copy_is_made_when_it_is_waited_for(
    sim: Any, simulated_device: torch.device, wait: Callable[[Any, Any], Any]
) -> None:
    stream, too_soon = sim.Stream(), sim.Event()
    too_soon.record(stream)
    with sim.stream(stream):
        assert sim.current_stream() == stream
        there = torch.arange(100.0).to(simulated_device, non_blocking=True)
    assert sim.current_stream() == sim.default_stream()
    too_soon.synchronize()
    sim.Stream().synchronize()
    sim.current_stream().synchronize()
    assert is_unwritten(there)
    assert not stream.query()
    wait(sim, stream)
    assert torch.equal(there.cpu(), torch.arange(100.0))
    assert stream.query()


def test_the_default_stream_and_copies_that_block_are_not_lazy(sim: Any, simulated_device: torch.device) -> None:
    assert torch.ones(2).to(simulated_device, non_blocking=True).tolist() == [1, 1]
    with sim.stream(sim.Stream()):
        there = torch.ones(2).to(simulated_device)
    assert there.tolist() == [1, 1]


def test_a_number_that_is_read_waits_for_its_stream(sim: Any, simulated_device: torch.device) -> None:
    with sim.stream(sim.Stream()):
        assert torch.ones(1).to(simulated_device, non_blocking=True).item() == 1


def test_memory_that_is_written_before_the_copy_is_made_is_sent_as_it_is_then(
    sim: Any, simulated_device: torch.device
) -> None:
    staging, stream = torch.ones(4).pin_memory(), sim.Stream()
    with sim.stream(stream):
        there = torch.empty(4, device=simulated_device)
        there.copy_(staging, non_blocking=True)
        converted = torch.empty(4, dtype=torch.int64, device=simulated_device)
        converted.copy_(staging, non_blocking=True)  # on the host, and at once
    staging.fill_(2)
    assert is_unwritten(converted)
    stream.synchronize()
    assert there.tolist() == [2, 2, 2, 2]
    assert converted.tolist() == [1, 1, 1, 1]


def test_the_memory_of_a_queued_copy_lives_until_it_is_made(sim: Any, simulated_device: torch.device) -> None:
    stream = sim.Stream()
    with sim.stream(stream):
        parts = [torch.full((1000,), float(i)).to(simulated_device, non_blocking=True)[10:20] for i in range(50)]
    stream.synchronize()
    assert [part.tolist() for part in parts] == [[float(i)] * 10 for i in range(50)]


def test_a_stream_is_current_in_its_own_thread(sim: Any, simulated_device: torch.device) -> None:
    seen: list[Any] = []
    with sim.stream(sim.Stream()):
        thread = threading.Thread(target=lambda: seen.append(sim.current_stream()))
        thread.start()
        thread.join()
    assert seen == [sim.default_stream()]


def test_transfers_are_counted_by_thread_and_what_kernels_do_is_not(sim: Any, simulated_device: torch.device) -> None:
    def work() -> None:
        own.append(simulated.this_thread())
        there = torch.ones(8).to(simulated_device)
        (there @ there + there).unique().cpu()
        there.sum().item()

    own: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    stream = sim.Stream()
    with sim.stream(stream):
        torch.ones(2).to(simulated_device, non_blocking=True).record_stream(stream)
    found = simulated.transfers()
    assert [t[:3] for t in found[:4]] == [
        ("in", 32, own[0]),
        ("wait", 0, own[0]),
        ("out", 4, own[0]),
        ("item", 4, own[0]),
    ]
    assert found[4:] == [("in", 8, simulated.this_thread(), stream.stream_id)]
    assert own[0] != simulated.this_thread()
    assert simulated.transfers() == []


def test_memory_can_be_pinned(simulated_device: torch.device) -> None:
    plain, pinned = torch.ones(3), torch.empty(3, pin_memory=True)
    assert [plain.is_pinned(), plain.pin_memory().is_pinned(), pinned.is_pinned()] == [False, True, True]
    assert pinned[1:].is_pinned()
    assert torch.equal(plain.pin_memory(), plain)


# --- with the rest of torch ------------------------------------------------------------------------------------------


def test_modules_are_copied_moved_and_saved(simulated_device: torch.device) -> None:
    plain = Model(sparse=False).eval()
    moved = copy.deepcopy(plain).to(simulated_device)
    ids = torch.randint(0, 50, (4, 4))
    assert {p.device for p in moved.parameters()} == {simulated_device}
    assert torch.equal(copy.deepcopy(moved)(ids.to(simulated_device)).cpu(), plain(ids))
    assert not torch.equal(moved.table.weight, moved.table.weight + 1)
    with torch.no_grad():
        moved.table.weight.add_(1)
    plain.load_state_dict(moved.state_dict())
    assert torch.equal(moved.cpu()(ids), plain(ids))
    moved.to(simulated_device).load_state_dict(Model(sparse=False).state_dict())
    assert not torch.equal(moved.table.weight.cpu(), plain.table.weight)


def test_fx_traces_a_module_there(simulated_device: torch.device) -> None:
    model = Model(sparse=False).eval().to(simulated_device)
    ids = torch.randint(0, 50, (4, 4), device=simulated_device)
    assert torch.equal(fx.symbolic_trace(model)(ids), model(ids))


def test_fake_tensors_are_there_too(simulated_device: torch.device) -> None:
    linear = nn.Linear(3, 2).to(simulated_device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = torch.ones(4, 3, device=simulated_device)
        results = [made, linear(made), mode.from_tensor(linear.weight.detach()) * 2]
    assert all(type(result).__name__ == "FakeTensor" for result in results)
    assert [result.device for result in results] == [simulated_device] * 3
    assert simulated.transfers()[2:] == []  # but for the parameters


def test_random_numbers_are_those_of_the_host(simulated_device: torch.device) -> None:
    torch.manual_seed(1)
    with torch.random.fork_rng(devices=[0], device_type="sim"):
        first = torch.rand(3, device=simulated_device)
    again = torch.rand(3)
    assert torch.equal(first.cpu(), again)
    generator = torch.Generator(simulated_device).manual_seed(1)
    assert torch.equal(torch.rand(3, device=simulated_device, generator=generator).cpu(), again)


def test_tensors_of_inference_stay_so(simulated_device: torch.device) -> None:
    with torch.inference_mode():
        x = torch.ones(3).to(simulated_device) * 2
        x[1:].zero_()
    assert x.is_inference()
    assert x.tolist() == [2, 0, 0]
