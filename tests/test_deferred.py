"""Deferred tensors: they answer as the moved tensor would, and are moved by whatever needs their contents."""

import copy
import pickle

import pytest
import torch
from torch import nn

from torchstage._deferred import Deferred
from torchstage._memory import is_in, state_of

HOST = torch.arange(12.0).reshape(4, 3)
CPU = torch.device("cpu")


@pytest.fixture
def tensor() -> Deferred:
    return Deferred(HOST.clone(), CPU)


def test_questions_about_it_and_its_own_device_do_not_move_it(tensor: Deferred) -> None:
    assert tensor.to(CPU) is tensor
    assert tensor.to("cpu", non_blocking=True) is tensor
    assert (tensor.shape, tensor.dtype, tensor.device, tensor.stride()) == ((4, 3), torch.float32, CPU, (3, 1))
    assert len(tensor) == 4
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    assert tensor.is_contiguous()
    assert tensor._moved is None


def test_it_is_moved_once(tensor: Deferred) -> None:
    assert tensor.moved() is tensor.moved()
    assert tensor.moved().data_ptr() == tensor.data_ptr() != tensor.host.data_ptr()


def test_operations_give_ordinary_tensors_with_its_contents(tensor: Deferred) -> None:
    for result in (tensor + 0, tensor.clone(), tensor.detach(), tensor.data, tensor.view(-1).view(4, 3)):
        assert type(result) is torch.Tensor
        assert torch.equal(result, HOST)
    assert torch.equal(torch.stack([tensor, tensor])[1], HOST)
    assert torch.equal(nn.functional.linear(tensor, torch.eye(3)), HOST)
    assert tensor.tolist() == HOST.tolist()
    assert (tensor.numpy() == HOST.numpy()).all()
    assert tensor[1, 2].item() == 5
    assert repr(tensor) == repr(HOST)
    assert torch.equal(torch.from_dlpack(tensor), HOST)


@pytest.mark.parametrize("grad", [True, False])
def test_writes_to_it_and_to_its_views_move_its_version(tensor: Deferred, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        before = state_of(tensor)
        assert is_in(tensor, before)
        assert tensor.add_(1) is tensor
        assert not is_in(tensor, before)
        before = state_of(tensor)
        tensor[:, 0] = 7
        assert not is_in(tensor, before)
        before = state_of(tensor)
        tensor.view(-1).mul_(2)
        assert not is_in(tensor, before)
    expected = HOST + 1
    expected[:, 0] = 7
    assert torch.equal(tensor, expected * 2)
    assert torch.equal(tensor.host, HOST)  # what was handed out is written, and not what it came from


def test_autograd_sees_a_leaf(tensor: Deferred) -> None:
    assert tensor.requires_grad_() is tensor
    (tensor * tensor).sum().backward()
    assert tensor.grad is not None
    assert torch.equal(tensor.grad, 2 * HOST)


def test_copies_and_pickles_are_ordinary_tensors(tensor: Deferred) -> None:
    for other in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert type(other) is torch.Tensor
        assert torch.equal(other, HOST)


def test_it_stands_for_a_tensor_of_another_device() -> None:
    tensor = Deferred(HOST, torch.device("meta"))
    assert tensor.device.type == "meta"
    assert tensor.to("meta") is tensor
    assert (tensor + 1).device.type == "meta"
