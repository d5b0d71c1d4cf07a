"""A transformer that is larger than the memory it runs in: its blocks come one at a time.

The blocks' weights stay elsewhere, in main memory or in the file. Before a block runs its weights
are put in place, and the next block's are on their way, in a thread and, on a GPU, on a stream of
its own; after it has run they are dropped. So two blocks are in memory at once, whatever their
number. The price is that every block is moved once for every call of the model: nothing where a
block computes longer than it travels, which is what large clips do.

The network does not know; hooks on its blocks do all of it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.loader import key_maps
from aiprod_core.loader.checkpoint import Checkpoint, assign

Fetch = Callable[[int], dict[str, Tensor]]


class BlockStream:
    """Runs `blocks` from what `fetch(index)` brings, until `close`.

    `moved_bytes` counts what was brought, `peak_bytes` the most that was in place or on its way.
    """

    def __init__(self, blocks: Sequence[nn.Module], fetch: Fetch, device: torch.device) -> None:
        self.blocks = list(blocks)
        self.fetch = fetch
        self.device = device
        self.moved_bytes = self.peak_bytes = 0
        self._sizes = [0] * len(self.blocks)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[int, Future[tuple[dict[str, Tensor], torch.cuda.Event | None]]] | None
        self._coming = None
        self._home: dict[int, dict[str, Tensor]] = {}
        self._hooks = []
        for index, block in enumerate(self.blocks):
            arrive, leave = partial(self._arrive, index), partial(self._leave, index)
            self._hooks.append(block.register_forward_pre_hook(arrive))
            self._hooks.append(block.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Takes the hooks off; the blocks are again where they were."""
        for hook in self._hooks:
            hook.remove()
        self._worker.shutdown(cancel_futures=True)
        self._coming = None

    def _arrive(self, index: int, block: nn.Module, inputs: Any) -> None:
        if self._coming is None or self._coming[0] != index:
            self._start(index)
        assert self._coming is not None
        (_, coming), self._coming = self._coming, None
        tensors, arrived = coming.result()
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            for tensor in tensors.values():
                tensor.record_stream(stream)  # not to be reused before this block has run
        self._home[index] = {name: block.get_parameter(name).data for name in tensors}
        self._sizes[index] = sum(tensor.nbytes for tensor in tensors.values())
        self.moved_bytes += self._sizes[index]
        for name, tensor in tensors.items():
            assign(block, name, tensor)
        following = (index + 1) % len(self.blocks)
        self._start(following)
        self.peak_bytes = max(self.peak_bytes, self._sizes[index] + self._sizes[following])

    def _leave(self, index: int, block: nn.Module, inputs: Any, outputs: Any) -> None:
        for name, tensor in self._home.pop(index, {}).items():
            assign(block, name, tensor)

    def _start(self, index: int) -> None:
        self._coming = (index, self._worker.submit(self._bring, index))

    def _bring(self, index: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        if self._copies is None:
            return self.fetch(index), None
        with torch.cuda.stream(self._copies):
            tensors = self.fetch(index)
            arrived = torch.cuda.Event()
            arrived.record(self._copies)
        return tensors, arrived


def stream_from_file(
    transformer: nn.Module, checkpoint: Checkpoint, device: torch.device | str = "cpu"
) -> BlockStream:
    """For a transformer whose blocks `load_transformer(leaves_blocks=True)` has left in the file.

    Raises InputError where what the file holds is not what the blocks compute with.
    """
    device = torch.device(device)
    blocks = list(transformer.get_submodule("transformer_blocks").children())
    sources: list[dict[str, tuple[str, torch.dtype]]] = []
    for index, block in enumerate(blocks):
        found = {}
        for name, parameter in block.named_parameters():
            key = key_maps.TRANSFORMER.publish(f"transformer_blocks.{index}.{name}")
            if checkpoint.tensors[key].shape != tuple(parameter.shape):
                raise InputError(
                    f"{checkpoint.name}: its blocks cannot be streamed and quantised at once; run "
                    "aiprod models convert first and give the converted file."
                )
            found[name] = (key, parameter.dtype)
        sources.append(found)

    def fetch(index: int) -> dict[str, Tensor]:
        return {
            name: checkpoint.fetch(key).to(device, dtype)
            for name, (key, dtype) in sources[index].items()
        }

    return BlockStream(blocks, fetch, device)


def stream_from_memory(transformer: nn.Module, device: torch.device | str) -> BlockStream:
    """Keeps the blocks in main memory, page-locked for a GPU, and moves all else to the device."""
    device = torch.device(device)
    blocks = list(transformer.get_submodule("transformer_blocks").children())
    for block in blocks:
        for parameter in block.parameters():
            host = parameter.data.to("cpu")
            parameter.data = host.pin_memory() if device.type == "cuda" else host
        for name, buffer in list(block.named_buffers()):
            assign(block, name, buffer.to(device))
    for name, child in transformer.named_children():
        if name != "transformer_blocks":
            child.to(device)
    for name, parameter in list(transformer.named_parameters(recurse=False)):
        assign(transformer, name, parameter.data.to(device))

    homes = [{name: p.data for name, p in block.named_parameters()} for block in blocks]

    def fetch(index: int) -> dict[str, Tensor]:
        return {name: host.to(device, non_blocking=True) for name, host in homes[index].items()}

    return BlockStream(blocks, fetch, device)
