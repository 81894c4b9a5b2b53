"""Copies between a model and its chunks: any dtype, any strides, every element in its row-major place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zml import errors
from zml.errors import ZmlError
from zml.layout import Layout
from zml.worker.binding import Binding, pieces


class Odd(torch.nn.Module):
    """Parameters as users have them: channels_last, transposed, strided, half, double, scalar, empty, tied."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(7)

        def values(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        self.conv = torch.nn.Parameter(values(6, 3, 5, 5).to(memory_format=torch.channels_last))
        self.transposed = torch.nn.Parameter(values(7, 9).t())
        self.strided = torch.nn.Parameter(values(20)[::2])
        self.f16 = torch.nn.Parameter(values(4, 4).half())
        self.bf16 = torch.nn.Parameter(values(33).bfloat16())
        self.f64 = torch.nn.Parameter(values(5).double())
        self.scalar = torch.nn.Parameter(values())
        self.empty = torch.nn.Parameter(values(0, 3))
        self.ice = torch.nn.Parameter(values(3, 2), requires_grad=False)
        self.tied = self.f16


def bound(chunk_elements: int) -> tuple[Odd, Layout, Binding]:
    model = Odd()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layout = Layout.of(model, optimizer, chunk_elements)
    return model, layout, Binding(layout, model)


def flat(layout: Layout, tensors: list[Tensor]) -> list[Tensor]:
    """The slabs, made the slow way."""
    slabs = []
    for group in layout.groups:
        own = [t for t, p in zip(tensors, layout.parameters, strict=True) if p.group == group.index]
        slabs.append(torch.cat([torch.empty(0), *(t.detach().float().contiguous().view(-1) for t in own)]))
    return slabs


CHUNKS = [1, 7, 16, 100, 65_536]


@pytest.mark.parametrize("size", CHUNKS)
def test_chunks_read_the_parameters_in_row_major_order(size: int) -> None:
    _, layout, binding = bound(size)
    slabs = flat(layout, list(binding.parameters))
    for group in layout.groups:
        for place, index in enumerate(group.chunks):
            values = torch.full((layout.chunks[index].size,), 9.0)
            binding.read(index, values)
            assert torch.equal(values, slabs[group.index][place * size :][: len(values)])


@pytest.mark.parametrize("size", CHUNKS)
def test_what_is_written_is_what_is_read(size: int) -> None:
    model, layout, binding = bound(size)
    strides = [parameter.stride() for parameter in model.parameters()]
    written = {}
    for chunk in layout.chunks:
        # Few bits, so that half precision holds them.
        written[chunk.index] = torch.arange(chunk.index * 3, chunk.index * 3 + chunk.size) % 251 / 8
        binding.write(chunk.index, written[chunk.index])
    for chunk in layout.chunks:
        values = torch.empty(chunk.size)
        binding.read(chunk.index, values)
        assert torch.equal(values, written[chunk.index])
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert all(parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("size", CHUNKS)
def test_what_a_chunk_lacks_is_subtracted_on_its_way_into_any_parameter(size: int) -> None:
    (_, layout, binding), (_, _, other) = bound(size), bound(size)
    random = torch.Generator().manual_seed(1)
    for chunk in layout.chunks:
        values, less = (torch.randn(chunk.size, generator=random) for _ in range(2))
        binding.write(chunk.index, values, less)
        other.write(chunk.index, values - less)
    for one, two in zip(binding.parameters, other.parameters, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", CHUNKS)
def test_gradients_go_where_their_parameters_lie(size: int) -> None:
    model, layout, binding = bound(size)
    loss = sum(((p.double() + 1) ** 2).sum() for p in model.parameters() if p.requires_grad)
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss)
    model.bf16.grad = None
    into = {chunk.index: torch.full((chunk.size,), 9.0) for chunk in layout.chunks}
    present = [binding.gather(index, into) for index in range(len(layout.parameters))]
    assert [p.name for p, here in zip(layout.parameters, present, strict=True) if not here] == [
        "bf16",
        "ice",
    ]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in binding.parameters]
    slabs = flat(layout, gradients)
    for group in layout.groups:
        whole = torch.cat([torch.empty(0), *(into[index] for index in group.chunks)])
        assert torch.equal(whole, slabs[group.index])


def test_a_model_that_was_moved_is_still_the_one_that_is_written() -> None:
    model, layout, binding = bound(65_536)
    model.double()
    binding.write(0, torch.ones(layout.chunks[0].size))
    assert model.conv.dtype == torch.float64
    assert torch.equal(model.conv, torch.ones_like(model.conv))


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = torch.nn.Embedding(5, 2)
    layout = Layout.of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    binding = Binding(layout, model)
    model.sparse = True
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ZmlError, match="weight") as caught:
        binding.gather(0, {0: torch.zeros(10)})
    assert caught.value.code == errors.TENSOR


def test_a_layout_of_another_model_is_refused() -> None:
    _, layout, _ = bound(16)
    with pytest.raises(ValueError):
        Binding(layout, torch.nn.Linear(2, 2))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_pieces_are_the_elements_asked_for(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    back = [order.index(axis) for axis in range(len(shape))]
    tensor = torch.arange(torch.Size(shape).numel()).view([shape[axis] for axis in order]).permute(back)
    assert list(tensor.shape) == shape
    start = data.draw(st.integers(0, tensor.numel()))
    size = data.draw(st.integers(0, tensor.numel() - start))
    found = torch.full((size,), -1)
    for part, at in pieces(tensor, start, size):
        assert (found[at : at + part.numel()] == -1).all()
        found[at : at + part.numel()].view(part.shape).copy_(part)
    assert torch.equal(found, tensor.reshape(-1)[start : start + size])
