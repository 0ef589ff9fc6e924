"""The arithmetic behind the matrix kernels' launches: tiles to try, pieces of a sum, channels to widen at once.

Nothing here was measured on a GPU; what is modeled or assumed says so. Which tile is used is measured, at warm-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

FUSED_ROWS = 512
"""Up to so many tokens 8-bit weights are widened inside the product, above into a workspace for torch's own product.

Modeled: widening outside moves 5 bytes a weight instead of 1 (114 ms for 68.5e9 weights at 3.0 TB/s), the fused
product is assumed at 400 TFLOP/s where torch's reaches 750; the two meet at about 700 tokens. It holds where it cannot
be measured."""

MEASURED_ROWS = 1024
"""Up to so many tokens the two ways are timed against each other, once for a shape."""

WORKSPACE_BYTES = 1 << 28
"""Bound on the workspace for widened weights."""

MAX_TILES = 1 << 13
"""Tiles of one product whose sums may be cut in pieces; there is a counter for each."""

_L2_BYTES = 36 << 20
"""A workspace of this size mostly stays in an H100's 50 MB of L2 (assumed)."""

_SHARED_BYTES = 227 * 1024
_MOST_PROGRAMS = 8
_SATURATING_SHARE = 0.5
"""Assumed: programs on half the places they could have still saturate the memory, for each has stages to spare."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Output channels and inputs of one step of a program, steps in flight, warps, and the weight's side."""

    outputs: int
    inputs: int
    stages: int
    warps: int
    left: bool

    def held_bytes(self, width: int, item: float) -> int:
        """Shared memory of a program with `width` tokens of 16 bits and weights of `item` bytes."""
        return int(max(1, self.stages - 1) * self.inputs * (self.outputs * item + width * 2)) + 1024


_TILES = {
    16: [
        (64, 256, 3, 2, True),
        (64, 256, 3, 4, False),
        (128, 128, 4, 4, False),
        (64, 128, 4, 2, True),
        (128, 256, 3, 8, False),
    ],
    32: [
        (128, 64, 4, 2, True),
        (256, 128, 3, 8, False),
        (128, 128, 3, 2, True),
        (256, 64, 4, 4, False),
        (128, 128, 4, 4, False),
    ],
    64: [(256, 64, 3, 8, False), (256, 64, 4, 4, False), (128, 128, 3, 4, False), (128, 128, 3, 4, True)],
    128: [(128, 64, 4, 8, True), (128, 128, 3, 8, True), (64, 64, 4, 4, True)],
}
"""By the tokens' width: output channels, inputs, stages, warps, weight left or right. For 16-bit weights half the
inputs, and the weight always right.

Instructions a weight of 8 bits, counted in the machine code for Hopper (an H100 that reads 3 TB/s could issue 9.5): 2.7
to 3.2 as left operand of `mma.sync` and 2.8 to 4.1 as the right one; a few more in bf16. Weights come by 16-byte copies
and `ldmatrix`. With four warps or more Triton takes wgmma for a left operand of 64 rows, where 8-bit weights come out
of shared memory two bytes at a time: 5 to 6, and 8-byte copies in, for twice the tensor rate, which matters from 64
tokens on. So up to 32 tokens two warps and the weight left, or more and right. At 64 tokens on the right wgmma reads
the widened weight from shared memory again: 2.3 to 3.4 (fp8 3.5 to 4.6), and no wgmma has to wait for the registers of
another; eight warps on the left made ptxas serialise them, which a test now forbids.

Wide tiles from 32 tokens on, because every tile reads all tokens again: at 32 tokens and 64 channels L2 would deliver
as many bytes of tokens as of weights."""

WIDTHS = tuple(_TILES)

GROUPS = (32, 64, 128)
"""Groups of inputs that the product takes as they are; weights with others are widened first, however few the tokens."""

_GROUPED_TILES = {
    8: [(64, 256, 3, 2, True), (128, 256, 3, 2, True), (64, 128, 4, 2, True)],
    16: [(128, 256, 3, 4, False), (256, 128, 4, 4, False), (64, 256, 3, 2, True)],
    32: [(128, 256, 3, 4, False), (256, 128, 4, 8, False), (128, 128, 4, 4, True), (256, 128, 4, 8, True)],
    64: [(128, 128, 4, 4, True), (256, 128, 4, 8, True)],
    128: [(128, 128, 4, 8, True), (64, 128, 4, 4, True)],
}
"""As `_TILES`, for packed INT4 and groups of 128.

Instructions a weight in the machine code for Hopper, where an SM that reads its share of 3 TB/s could issue 4.9: 1.6 to
1.9 up to 8 tokens (bf16 1.9 to 2.1), 1.8 to 2.0 up to 16 (2.1 to 2.2), 2.4 to 2.6 up to 32 (2.7 to 2.8), 2.7 to 2.8 up
to 64; zero points 0.05 to 0.1 more, groups of 64 0.3 to 0.5 more. int8 in groups has twice the bytes, so 9.8 to spend:
2.0 to 2.3 up to 8 tokens, 2.6 to 2.9 up to 16, 4.2 to 5.0 up to 32.

Up to 8 tokens the weight is the left operand, whose counterpart may be 8 wide. Above, wide tiles: a tile's tokens are
4 BT / BO of its weights' bytes, all from L2. From 32 tokens on also wgmma, which takes the tokens from shared memory."""

GROUPED_WIDTHS = tuple(_GROUPED_TILES)


@cache
def tiles_for(width: int, item: int) -> tuple[Tile, ...]:
    """What is tried for one width of the tokens and size of a weight's element."""
    tiles = (
        Tile(outputs=outputs, inputs=inputs // item, stages=stages, warps=warps, left=left and item == 1)
        for outputs, inputs, stages, warps, left in _TILES[width]
    )
    return tuple(dict.fromkeys(tiles))


@cache
def grouped_tiles(width: int, group: int) -> tuple[Tile, ...]:
    """What is tried for weights with a scale for each `group` of inputs.

    A step has whole groups, and of small ones no more than of 128, whose sums would not fit the registers; but 64 inputs
    at least, a fourth of which is the least that a tensor core multiplies.
    """
    smaller = max(1, 128 // group)
    tiles = (
        Tile(outputs=outputs, inputs=max(inputs // smaller, group, 64), stages=stages, warps=warps, left=left)
        for outputs, inputs, stages, warps, left in _GROUPED_TILES[width]
    )
    return tuple(dict.fromkeys(tiles))


@cache
def token_width(tokens: int, widths: tuple[int, ...] = WIDTHS) -> int:
    """How wide the tokens' side of a tile is: the first of `widths` that holds them, 128 at most."""
    return next((width for width in widths if width >= tokens), widths[-1])


@cache
def num_tiles(tile: Tile, width: int, tokens: int, outputs: int) -> int:
    """Tiles of a product's result."""
    return -(-outputs // tile.outputs) * -(-tokens // width)


@cache
def num_pieces(tile: Tile, width: int, tiles: int, inputs: int, item: float, multiprocessors: int) -> int:
    """In how many pieces the sum over inputs is cut (modeled).

    Time is counted in steps of one program while every place on the GPU is taken. A last wave that leaves places
    empty costs nothing as long as the rest still saturates memory; a program has a step of ramp, and adding pieces
    up costs about two.
    """
    places = multiprocessors * max(1, min(_MOST_PROGRAMS, _SHARED_BYTES // tile.held_bytes(width, item)))
    steps = -(-inputs // tile.inputs)
    best, choice = float("inf"), 1
    for pieces in range(1, 17):
        if pieces > 1 and (steps < 4 * pieces or tiles > MAX_TILES):
            break
        full, rest = divmod(tiles * pieces / places, 1)
        waves = full + (max(rest, _SATURATING_SHARE) if rest else 0)
        time = steps / pieces * waves + 1 + (2 if pieces > 1 else 0)
        if time < best * 0.98:
            best, choice = time, pieces
    return choice


@cache
def partial_elements(
    candidates: tuple[Tile, ...], tokens: int, shape: tuple[int, int], item: float, multiprocessors: int, width: int
) -> int:
    """fp32 sums to make room for, whichever tile is used on a weight of `shape`; 1 where no sum is cut."""
    most = 1
    for tile in candidates:
        tiles = num_tiles(tile, width, tokens, shape[0])
        pieces = num_pieces(tile, width, tiles, shape[1], item, multiprocessors)
        if pieces > 1:
            most = max(most, tiles * pieces * tile.outputs * width)
    return most


def channels_at_once(tokens: int, outputs: int, inputs: int, multiprocessors: int) -> int:
    """Output channels to widen before one call of torch's product (modeled).

    Tiles of 128 x 256 are assumed for that product: the channels fill whole waves of the SMs, as many waves as keep
    the widened copy in L2, at least one.
    """
    per_wave = 256 * max(1, multiprocessors // -(-tokens // 128))
    waves = max(1, _L2_BYTES // (per_wave * inputs * 2))
    most = max(1, WORKSPACE_BYTES // (inputs * 2))
    return min(outputs, per_wave * waves, most)
