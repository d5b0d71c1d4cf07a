"""What does not change over the steps of a run, computed once.

The positions give the rotary tables, and in 2.0's style the text gives the keys and values of every
block: neither depends on the noise level. Samplers and guidance call the network step by step and
do not know, nor does the network: for the length of a run its functions of constant inputs keep
their last results. An input counts as the same when it is the same memory, unchanged.

In 2.3's style the noise level modulates the text first, so that its keys change with every step;
only the rotary tables are kept there.

What the noise level steers is known as soon as the schedule is: a CPU, which would read the weights
that make modulations anew for every level, computes those of all steps together.

The keys and values take 2 x S x D numbers a block and stream: 1.2 GB for 1,024 text tokens of a 19B
model in bfloat16, which are 5 % of the work of a step at 6,000 video tokens and a third of it at
400.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_core.model.layers import AdaLayerNormSingle
from aiprod_core.model.transformer import Transformer

# Inputs that alternate within a run: the passes of guidance when they do not go in one batch.
ALTERNATING = 4


@contextmanager
def computed_once(transformer: Transformer) -> Iterator[None]:
    """Within it, the transformer keeps what it makes of inputs that come again."""
    with ExitStack() as stack:
        stack.enter_context(_keeping(transformer, "rotary_tables", 2 * ALTERNATING))
        for name in ("caption_projection", "audio_caption_projection"):
            projection = getattr(transformer, name)
            if projection is not None:
                stack.enter_context(_keeping(projection, "forward", ALTERNATING))
        if not transformer.config.cross_attention_adaln:
            for block in transformer.transformer_blocks:
                for name in ("attn2", "audio_attn2"):
                    if hasattr(block, name):
                        text = getattr(block, name)
                        stack.enter_context(_keeping(text, "keys_values", ALTERNATING))
        yield


@contextmanager
def computed_ahead(transformer: Transformer, sigmas: Tensor) -> Iterator[None]:
    """Within it, the modulations of a schedule's noise levels are computed with the first of them.

    sigmas (T,) are the levels that will be asked for. Others are computed as ever, and so are all
    on a GPU, where to look at a level costs more than to compute it.
    """
    config = transformer.config
    with ExitStack() as stack:
        for name, module in transformer.named_children():
            if isinstance(module, AdaLayerNormSingle):
                # The gates between the modalities have a scale of their own.
                scale = (
                    config.av_ca_timestep_scale_multiplier
                    if "gate" in name
                    else config.timestep_scale_multiplier
                )
                ahead = Ahead(module.forward, sigmas.float() * scale)
                stack.enter_context(_hidden(module, "forward", ahead))
        yield


def _keeping(module: nn.Module, method: str, capacity: int) -> AbstractContextManager[None]:
    return _hidden(module, method, Remembering(getattr(module, method), capacity))


@contextmanager
def _hidden(module: nn.Module, method: str, other: Any) -> Iterator[None]:
    setattr(module, method, other)
    try:
        yield
    finally:
        delattr(module, method)  # the instance's, which hid the class's


class Ahead:
    """A function of timesteps (B, N) that computes its results for all of `timesteps` (T,) at once.

    It returns a tuple of tensors (B, N, ...), row by row the same function.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], timesteps: Tensor) -> None:
        self.function = function
        self.timesteps = timesteps
        self.row_of = {timestep: row for row, timestep in enumerate(timesteps.tolist())}
        self._rows: tuple[Tensor, ...] | None = None

    @torch.compiler.disable
    def __call__(self, timesteps: Tensor) -> tuple[Tensor, ...]:
        if timesteps.shape[1] != 1 or timesteps.device.type != "cpu":
            return self.function(timesteps)
        levels = set(timesteps[:, 0].tolist())
        row = self.row_of.get(levels.pop())
        if levels or row is None:  # samples of several levels, or one that is not of the schedule
            return self.function(timesteps)
        if self._rows is None:
            self._rows = self.function(self.timesteps[:, None])
        return tuple(
            values[row : row + 1].expand(len(timesteps), *values.shape[1:]) for values in self._rows
        )


class Remembering:
    """A function that keeps its last `capacity` results, each for the very inputs it came from."""

    def __init__(self, function: Callable[..., Any], capacity: int) -> None:
        self.function = function
        self.capacity = capacity
        # The inputs are held too: as long as they live, their addresses mean them.
        self._known: dict[Any, tuple[Any, Any]] = {}

    @torch.compiler.disable
    def __call__(self, *args: Any, **options: Any) -> Any:
        key = tuple(_identity(value) for value in (*args, *options.values()))
        if key not in self._known:
            if len(self._known) == self.capacity:
                del self._known[next(iter(self._known))]
            self._known[key] = (args, options), self.function(*args, **options)
        return self._known[key][1]


def _identity(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    version = 0 if value.is_inference() else value._version  # counts changes in place
    return value.data_ptr(), value.shape, value.stride(), value.dtype, version
