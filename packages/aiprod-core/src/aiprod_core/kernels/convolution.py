"""The VAE's 3x3x3 convolutions on a CPU in fewer multiplications, or by one product.

Where there are pixels enough, Winograd's F(4x4, 3x3) computes 4 x 4 outputs of a frame from 36
products instead of 144 (Lavin & Gray, arXiv:1509.09308); the kernel's three rows in time are three
products that add up. Its sums round more: about 1e-5 of the largest output, where a direct float32
convolution rounds 1e-6. Where there are so few pixels that the weights are most of the memory to
be read, one matrix product reads them once and in order. What is left and small goes to oneDNN, to
which PyTorch gives larger inputs only.

The form follows from the shapes alone, so that a machine always gives the same bits. There is no
derivative: with gradients on, and in 16 bits, the layer computes as ever.

Letters: C, O channels in and out, F frames, H W height and width, tiles of 4 x 4 outputs.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiprod_core.model.conv_blocks import CausalConv3d

# Where one product is faster: oneDNN runs 512 -> 2048 channels at 80 positions at a quarter of a
# product's speed (Intel Xeon, AVX-512, one thread; so do the other bounds here).
MAX_PRODUCT_POSITIONS = 256
MIN_PRODUCT_WEIGHTS = 2**22
# Narrower layers are mostly transforms, whichever they are.
MIN_WINOGRAD_CHANNELS = 48
# The weights grow fourfold and are made at every call, which must be little beside what they save:
# at 448 positions all is lost again, at 832 a fifth of the time is saved, at 4,352 half of it.
MIN_WINOGRAD_POSITIONS = 768
# Up to this C x F x H PyTorch computes one clip's convolution by itself and not by oneDNN; that
# takes up to twice as long (AMD Zen 4, one thread: 4.4 and 2.6 ms for 192 channels, 112 positions).
MAX_SMALL_INPUT = 20480
# Of products held at once; tiles are done by rows, so that most of it stays in the cache.
WINOGRAD_BYTES = 8 * 2**20


def causal_conv3d(layer: CausalConv3d, x: Tensor) -> Tensor:
    """`CausalConv3d` for x (1, C, F, H, W), in the form that `form_of` names."""
    conv = layer.conv
    form = "direct" if torch.is_grad_enabled() else form_of(conv, x)
    if form == "direct":
        return CausalConv3d.forward(layer, x)
    if form == "onednn":
        return _onednn(layer, x)
    frames = _pad_space(conv, x[0].movedim(1, 0))  # (F, C, H + 2, W + 2)
    frames = frames.movedim(1, -1).contiguous()  # (F, H + 2, W + 2, C)
    before = 2 if layer.causal else 1
    if form == "product":
        out = _product(frames, conv.weight, conv.bias, before)
    else:
        out = torch.ops.aiprod.winograd(frames, conv.weight, conv.bias, before)
    return out.movedim(-1, 0)[None]


def form_of(conv: nn.Conv3d, x: Tensor) -> str:
    """ "direct", "onednn", "product" or "winograd"."""
    if x.dtype != torch.float32 or len(x) != 1 or conv.stride != (1, 1, 1):
        return "direct"
    frames, height, width = x.shape[2:]
    positions = frames * height * width
    if positions <= MAX_PRODUCT_POSITIONS and conv.weight.numel() >= MIN_PRODUCT_WEIGHTS:
        return "product"
    covered = frames * 16 * -(-height // 4) * -(-width // 4)
    if (
        min(conv.in_channels, conv.out_channels) >= MIN_WINOGRAD_CHANNELS
        and positions >= MIN_WINOGRAD_POSITIONS
        and covered <= 1.5 * positions
    ):
        return "winograd"
    return "onednn" if x.numel() // width <= MAX_SMALL_INPUT else "direct"


def _onednn(layer: CausalConv3d, x: Tensor) -> Tensor:
    """As PyTorch computes it for larger inputs; with x channels last it would be slow again."""
    conv, one = layer.conv, (1, 1, 1)
    frames = _pad_space(conv, layer.pad_time(x)[0].movedim(1, 0)).movedim(1, 0)[None]
    return torch.ops.aten.mkldnn_convolution(
        frames.contiguous(), conv.weight, conv.bias, (0, 0, 0), one, one, groups=1
    )


def _pad_space(conv: nn.Conv3d, frames: Tensor) -> Tensor:
    """(F, C, H, W) with a pixel more on each side, as the layer pads."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(frames, (1, 1, 1, 1), mode=mode)


def _product(frames: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
    """frames (F, H + 2, W + 2, C), `before` of 2 edge frames go first. Returns (F, H, W, O)."""
    first, last = frames[:1], frames[-1:]
    frames = torch.cat([first] * before + [frames] + [last] * (2 - before))
    patches = frames.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)  # (F, H, W, C, 3, 3, 3)
    return F.linear(patches.flatten(3), weight.flatten(1), bias)


def winograd(frames: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
    """frames (F, H + 2, W + 2, C), contiguous; weight (O, C, 3, 3, 3). Returns (F, H, W, O)."""
    num_frames, height, width, channels = frames.shape
    height, width, outputs = height - 2, width - 2, weight.shape[0]
    to_inputs, to_weights, to_outputs = _transforms()
    taps = weight.permute(2, 0, 1, 3, 4).reshape(-1, 9)  # (3 O C, 9)
    taps = (to_weights @ taps.T).view(36, 3, outputs, channels)

    rows, columns = -(-height // 4), -(-width // 4)
    if height % 4 or width % 4:
        frames = F.pad(frames, (0, 0, 0, 4 * columns - width, 0, 4 * rows - height))
    out = frames.new_empty(num_frames, rows, 4, columns, 4, outputs)
    row_bytes = 36 * (num_frames + 2) * columns * (channels + outputs) * 4
    chunk = max(1, WINOGRAD_BYTES // row_bytes)
    per_frame, per_row, per_column, _ = frames.stride()
    for row in range(0, rows, chunk):
        count = min(chunk, rows - row)
        tiles = count * columns  # of one frame
        # The 6 x 6 pixels under each tile; neighbours share two rows and columns.
        pixels = frames[:, 4 * row :].as_strided(
            (6, 6, num_frames, count, columns, channels),
            (per_row, per_column, per_frame, 4 * per_row, 4 * per_column, 1),
            frames.storage_offset() + 4 * row * per_row,
        )
        inputs = frames.new_empty(36, num_frames + 2, tiles, channels)
        inside = inputs[:, before : before + num_frames]
        torch.mm(to_inputs, pixels.reshape(36, -1), out=inside.view(36, -1))
        inputs[:, :before] = inside[:, :1]
        inputs[:, before + num_frames :] = inside[:, -1:]
        inputs = inputs.view(36, -1, channels)  # a frame is `tiles` rows
        products = frames.new_zeros(36, num_frames * tiles, outputs)
        for step in range(3):
            moved = inputs[:, step * tiles : (step + num_frames) * tiles]
            products.baddbmm_(moved, taps[:, step].transpose(1, 2))
        squares = (to_outputs @ products.view(36, -1)).view(
            4, 4, num_frames, count, columns, outputs
        )
        out[:, row : row + count] = squares.permute(2, 3, 0, 4, 1, 5)
    if bias is not None:
        out += bias
    return out.view(num_frames, 4 * rows, 4 * columns, outputs)[:, :height, :width]


@cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Of 6 x 6 pixels (36, 36), of a 3 x 3 kernel (36, 9), and to 4 x 4 outputs (16, 36)."""
    pixels = [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
    kernel = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]  # over 24
    outputs = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    one_axis = (torch.tensor(matrix, dtype=torch.float64) for matrix in (pixels, kernel, outputs))
    x, g, y = one_axis
    g = g / 24
    return torch.kron(x, x).float(), torch.kron(g, g).float(), torch.kron(y, y).float()


# One operator, so that what counts convolutions (aiprod bench) sees one.
_library = torch.library.Library("aiprod", "FRAGMENT")
_library.define("winograd(Tensor frames, Tensor weight, Tensor? bias, int before) -> Tensor")
_library.impl("winograd", winograd, "CPU")


@torch.library.register_fake("aiprod::winograd")
def _shape_of_winograd(frames: Tensor, weight: Tensor, bias: Tensor | None, before: int) -> Tensor:
    count, height, width, _ = frames.shape
    return frames.new_empty(count, height - 2, width - 2, weight.shape[0])
