"""Rows for ids that an embedding table does not have: looked up by hooks, beside a table that stays as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ether_diffusion.core.linear import given_input, with_input

_GIVEN = "_ether_given_ids"
"""Attribute of the ids that a table gets: those that were given to it. It lives as long as the call."""


class NewRows(nn.Module):
    """Embeddings of ids that a frozen table does not know, trained without a change to the table.

    Before the table's forward the new ids become 0, and after it the rows are put in their places: e(id) is the new row
    of a new id and the table's row of any other. So no other row gets a gradient, a moment of the optimiser or another
    value. Several may be on one table, each with ids of its own.

    Args:
        rows: (ids, features), where they start from; kept in fp32 whatever the table's dtype.

    Attributes:
        rows: (ids, features) fp32, the parameter.
        ids: what the rows belong to, in their order.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.ids: tuple[int, ...] = ()
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on the model's table of input embeddings; the ids are to be set before it is called.

        Raises:
            ValueError: the model has no such table, or one of another width.
        """
        tables = tables_of(model)
        if self.rows.shape[-1] != (width := tables[0].embedding_dim):
            raise ValueError(f"the rows have {self.rows.shape[-1]} features, the embeddings of the model {width}")
        for table in tables:
            self._handles += [
                table.register_forward_pre_hook(self._before, with_kwargs=True),
                table.register_forward_hook(self._after, with_kwargs=True),
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = given_input(args, kwargs)
        known = ids.masked_fill(torch.isin(ids, self._like(ids)), 0)
        setattr(known, _GIVEN, getattr(ids, _GIVEN, ids))
        return with_input(args, kwargs, known)

    def _after(self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids: Tensor = getattr(given_input(args, kwargs), _GIVEN)
        places = ids[..., None] == self._like(ids)
        rows = F.embedding(places.int().argmax(-1), self.rows.to(output.device, output.dtype))
        return torch.where(places.any(-1, keepdim=True), rows, output)

    def _like(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.ids, device=ids.device, dtype=ids.dtype)


def tables_of(model: nn.Module) -> list[nn.Embedding]:
    """The tables that a text encoder looks its input ids up in: one, or several modules that share one weight (T5).

    Raises:
        ValueError: it has none that is a plain embedding.
    """
    find = getattr(model, "get_input_embeddings", None)
    table = None if find is None else find()
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{type(model).__name__} has no table of input embeddings")
    return [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is table.weight]
