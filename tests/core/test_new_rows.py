"""New rows of an embedding table against a dense table that has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ether_diffusion.core.new_rows import NewRows, tables_of

OLD, NEW, WIDTH = 10, 3, 6
IDS = torch.tensor([[0, 10, 4, 11, 10], [9, 12, 12, 3, 1]])


class Encoder(nn.Module):
    """A model with input embeddings, which it looks up through a second module with the same weight, as T5 does."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shared = nn.Embedding(OLD, WIDTH, _weight=torch.randn(OLD, WIDTH, generator=generator).to(dtype))
        self.inner = nn.Embedding(OLD, WIDTH)
        self.inner.weight = self.shared.weight
        self.other = nn.Embedding(OLD, WIDTH)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.inner(ids)
        return found


def start() -> Tensor:
    return torch.randn(NEW, WIDTH, generator=torch.Generator().manual_seed(1))


def attached(model: nn.Module, rows: Tensor, ids: tuple[int, ...]) -> NewRows:
    new = NewRows(rows)
    new.ids = ids
    new.attach(model)
    return new


def weight_for_loss() -> Tensor:
    return torch.randn(*IDS.shape, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_table_with_the_rows(dtype: torch.dtype) -> None:
    model = Encoder(dtype).requires_grad_(False)
    before = model.shared.weight.clone()
    new = attached(model, start(), (10, 11, 12))
    dense = torch.cat([before.float(), start()]).requires_grad_()

    output = model(IDS)
    expected = nn.functional.embedding(IDS, dense)
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))

    (output.float() * weight_for_loss()).sum().backward()
    (expected.to(dtype).float() * weight_for_loss()).sum().backward()
    assert new.rows.dtype == torch.float32
    assert new.rows.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(new.rows.grad, dense.grad[OLD:], rtol=2e-2 if dtype != torch.float32 else 1e-6, atol=0)
    assert model.shared.weight.grad is None
    assert torch.equal(model.shared.weight, before)


def test_several_share_a_table_and_leave_it_one_by_one() -> None:
    model = Encoder()
    dense = torch.cat([model.shared.weight, start()])
    first, second = attached(model, start()[:1], (10,)), attached(model, start()[1:], (11, 12))
    assert torch.equal(model(IDS), nn.functional.embedding(IDS, dense))
    first.detach()
    known = torch.where(IDS == 10, 0, IDS)
    assert torch.equal(model(known), nn.functional.embedding(known, dense))
    second.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    with pytest.raises(IndexError):
        model(IDS)


def test_rows_win_over_a_table_that_has_grown_over_their_ids() -> None:
    model = Encoder()
    attached(model, start(), (10, 11, 12))
    expected = model(IDS)
    model.inner.weight = nn.Parameter(torch.cat([model.shared.weight, torch.full((NEW, WIDTH), 9.0)]))
    assert torch.equal(model(IDS), expected)


def test_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="the rows have 5 features, the embeddings of the model 6"):
        NewRows(torch.zeros(1, 5)).attach(Encoder())
    with pytest.raises(ValueError, match="Linear has no table of input embeddings"):
        tables_of(nn.Linear(2, 2))
