"""What a call of a network will cost, found without computing anything.

The network is built on the meta device, where tensors have shapes and no content, and called once
with inputs of the right shapes. A dispatch mode sees every operation: it adds up floating-point
operations (a multiply-add is two) and follows how many bytes of results are alive, which on a real
device is the memory beyond weights and inputs. Attention is one operation, as the kernels do it:
no N x N matrix is counted as memory.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Footprint(NamedTuple):
    """flops of a call, and the most bytes that its results held at once."""

    flops: float
    peak_bytes: float

    def __add__(self, other: "Footprint") -> "Footprint":  # pyright: ignore[reportIncompatibleMethodOverride]
        """One call after the other."""
        return Footprint(self.flops + other.flops, max(self.peak_bytes, other.peak_bytes))

    def times(self, calls: float) -> "Footprint":
        return Footprint(self.flops * calls, self.peak_bytes)


@torch.no_grad()
def footprint(call: Callable[[], Any]) -> Footprint:
    """Of a call whose tensors are all on the meta device."""
    watch = _Watch()
    with watch, _OneAttention(watch), torch.device("meta"):
        call()
    return Footprint(watch.flops, watch.peak)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0.0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor, given)
        return out

    def _see(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in given or key in self._known:  # a view, or changed in place
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _OneAttention(TorchFunctionMode):
    """Stands for the attention kernel, which on the meta device would be taken apart."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.watch.flops += 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return q.new_empty((*q.shape[:-1], v.shape[-1]))
