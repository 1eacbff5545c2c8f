"""What one call of a network costs: counted on tensors without memory, as PyTorch would run it."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812  as everybody calls it
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from darkroom_export.networks import InputShape, NetworkSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Of a call: what it computes, what it moves, and what it holds besides its weights."""

    flop: int
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    moved_bytes: int
    """What all operations read and write if each is a kernel of its own, weights included."""
    peak_bytes: int
    """The most that lives at once of what the call makes; its weights and inputs do not count."""


def count_call(
    spec: NetworkSpec, shape: InputShape, device: torch.device, *, is_fused: bool = True
) -> Cost:
    """Count one call of a network, whose module is on `device` and in the precision it computes in.

    Args:
        is_fused: attention is one kernel, and what it makes of queries and keys is never stored.
    """
    inputs = [
        torch.zeros(spec.size(tensor, shape), dtype=tensor.dtype, device=device)
        for tensor in spec.inputs
    ]
    ledger = _Ledger()
    flop_counter = FlopCounterMode(display=False)
    with torch.no_grad(), _Attention(is_fused=is_fused), flop_counter, ledger:
        outputs = spec.module(*inputs)
    del outputs
    return Cost(flop_counter.get_total_flops(), ledger.moved_bytes, ledger.peak_bytes)


class _Attention(TorchFunctionMode):
    """Attention as one operation, or as three, whatever PyTorch has for the device."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self._attend = _attend_fused if is_fused else _attend_unfused

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    is_causal: bool = False,
    **__: Any,
) -> torch.Tensor:
    attended: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(  # noqa: SLF001
        query, key, value, attn_mask, compute_log_sumexp=False, is_causal=is_causal
    )[0]
    return attended


def _attend_unfused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, dim=-1) @ value


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what operations read, write and keep: by storages, so that a view costs nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs)))
        outputs = list(_tensors(made))
        known = {_storage(tensor) for tensor in inputs}
        new = [tensor for tensor in outputs if _storage(tensor) not in known]
        for tensor in new:
            self._keep(tensor.untyped_storage())
        # What makes nothing new and changes nothing is a view.
        if new or func._schema.is_mutable:  # noqa: SLF001
            self.moved_bytes += sum(map(_bytes, (*inputs, *outputs)))
        return made

    def _keep(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))
        weakref.finalize(storage, self._live.pop, key)


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001


def _bytes(tensor: torch.Tensor) -> int:
    """What of it is in memory: one that is expanded has more elements than that."""
    return min(tensor.numel() * tensor.element_size(), int(tensor.untyped_storage().nbytes()))
