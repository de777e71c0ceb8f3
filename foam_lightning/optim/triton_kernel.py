"""The update of one tensor as one Triton kernel; `gpu_kernel` launches it.

A program updates one tile: BLOCKS whole blocks of WIDTH columns of one row. Moments, residual and
rounding stay in registers, so that memory is read and written once. `functional` defines the
arithmetic and `rounding` and `state` the stored bits; the kernel equals them up to the last bits of
float32, as sums run in another order and a GPU divides and takes roots within 2 units in the last
place.
"""

import triton
import triton.language as tl

from foam_lightning.optim import rounding, state

_GOLDEN = tl.constexpr(rounding.GOLDEN % 2**32)
_MIX1 = tl.constexpr(rounding.MIX1 % 2**32)
_MIX2 = tl.constexpr(rounding.MIX2 % 2**32)
_CODES_PER_SCALE = tl.constexpr(state.CODES_PER_SCALE)
_TINY = tl.constexpr(2.0**-126)  # the smallest normal number of float32


@triton.jit(do_not_specialize=["tiles", "seed"])
def foam_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_scale,
    exp_avg_sq,
    exp_avg_sq_scale,
    clip_factor,
    columns,
    blocks,
    tiles,
    seed,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    decay,
    step_size,
    residual,
    residual_square,
    inverse_sqrt_bias_correction2,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    RAGGED: tl.constexpr,
    CLIP: tl.constexpr,
    MEAN_SQUARE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Update one tile.

    Args:
        param: Weights, (rows, columns), changed.
        grad: Gradient, (rows, columns).
        exp_avg: m, (rows, blocks), changed: values, or int8 codes.
        exp_avg_scale: Scales of the codes of m, else any pointer.
        exp_avg_sq: v, (rows, blocks), changed: values, or uint8 codes.
        exp_avg_sq_scale: Scales of the codes of v, else any pointer.
        clip_factor: The factor of the gradient, read if CLIP.
        columns: Columns of a row.
        blocks: Blocks of a row.
        tiles: Tiles of a row; the grid has rows * tiles programs.
        seed: Of stochastic rounding, a signed 32-bit integer.
        one_minus_beta1: 1 - beta1.
        beta2: Decay of v.
        one_minus_beta2: 1 - beta2.
        eps: Added to the root of the bias-corrected V.
        decay: Factor of the weights.
        step_size: lr * scale / bias correction of m.
        residual: Factor of the residual in M.
        residual_square: Factor of the squared residual in V.
        inverse_sqrt_bias_correction2: 1 / sqrt(bias correction of v).
        WIDTH: Columns of a block, rounded up to a power of two.
        BLOCKS: Blocks of a tile, a power of two; with int8, whole groups of codes.
        RAGGED: Whether the last block of a row has fewer than WIDTH columns.
        CLIP: Whether to multiply the gradient by `clip_factor`.
        MEAN_SQUARE: Whether v averages the squares, else the square of the average.
        STOCHASTIC: Whether to round bfloat16 and int8 stochastically, else to nearest.
    """
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    first = row * columns + tile * (BLOCKS * WIDTH)
    first_block = row * blocks + tile * BLOCKS
    column = tl.arange(0, BLOCKS * WIDTH)
    block = tl.arange(0, BLOCKS)
    num_columns = tl.minimum(columns - tile * (BLOCKS * WIDTH), BLOCKS * WIDTH).to(tl.int32)
    num_blocks = tl.minimum(blocks - tile * BLOCKS, BLOCKS).to(tl.int32)
    is_column = column < num_columns
    is_block = block < num_blocks

    # One-dimensional loads, so that each thread reads 16 bytes at once at every fold level.
    g = tl.load(grad + first + column, mask=is_column, other=0).to(tl.float32)
    w = tl.load(param + first + column, mask=is_column, other=0).to(tl.float32)
    if CLIP:
        g *= tl.load(clip_factor).to(tl.float32)
    m = _read(exp_avg, exp_avg_scale, row, tile, first_block, block, is_block, blocks, BLOCKS)
    v = _read(exp_avg_sq, exp_avg_sq_scale, row, tile, first_block, block, is_block, blocks, BLOCKS)

    if WIDTH == 1:
        mean = g
        mean_square = g * g
    else:
        g = tl.reshape(g, [BLOCKS, WIDTH])
        inverse_count = 1.0 / WIDTH
        if RAGGED:  # the last block averages the columns that exist
            last = num_blocks - 1
            count = tl.minimum(num_columns - last * WIDTH, WIDTH)
            inverse_count = tl.where(block == last, 1.0 / count, inverse_count)
        mean = tl.sum(g, 1) * inverse_count
        mean_square = tl.sum(g * g, 1) * inverse_count if MEAN_SQUARE else mean * mean
    m += one_minus_beta1 * (mean - m)
    v = beta2 * v + one_minus_beta2 * mean_square
    _write(
        exp_avg, exp_avg_scale, m, row, tile, first_block, block, is_block, blocks, seed, BLOCKS,
        STOCHASTIC,
    )  # fmt: skip
    _write(
        exp_avg_sq, exp_avg_sq_scale, v, row, tile, first_block, block, is_block, blocks, seed + 1,
        BLOCKS, STOCHASTIC,
    )  # fmt: skip

    if WIDTH > 1:
        w = tl.reshape(w, [BLOCKS, WIDTH])
        error = g - mean[:, None]
        m = m[:, None] + residual * error
        v = v[:, None] + residual_square * error * error
    denominator = tl.sqrt(v) * inverse_sqrt_bias_correction2 + eps
    w = w * decay - step_size * m / denominator
    if WIDTH > 1:
        w = tl.reshape(w, [BLOCKS * WIDTH])
    if param.dtype.element_ty == tl.bfloat16:
        w = _round_to_bfloat16(w, first + column, seed + 2, STOCHASTIC)
    tl.store(param + first + column, w.to(param.dtype.element_ty), mask=is_column)


@triton.jit
def _read(stored, scale, row, tile, first, block, is_block, blocks, BLOCKS: tl.constexpr):
    """Read a moment as float32, decoded as `state.read_moment` does."""
    x = tl.load(stored + first + block, mask=is_block, other=0).to(tl.float32)
    if stored.dtype.element_ty == tl.int8 or stored.dtype.element_ty == tl.uint8:
        group = _first_group(row, tile, blocks, BLOCKS) + block // _CODES_PER_SCALE
        scale = tl.load(scale + group, mask=is_block, other=0)
        if stored.dtype.element_ty == tl.int8:
            y = x / 127
            x = y * tl.abs(y) * scale
        else:
            y = x / 255
            x = y * y * (y * y) * scale
    return x


@triton.jit
def _write(
    stored, scale, x, row, tile, first, block, is_block, blocks, seed,
    BLOCKS: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Store a moment, encoded and rounded as `state.write_moment_` does."""
    index = first + block
    if stored.dtype.element_ty == tl.int8 or stored.dtype.element_ty == tl.uint8:
        SIZE: tl.constexpr = min(BLOCKS, _CODES_PER_SCALE)
        GROUPS: tl.constexpr = BLOCKS // SIZE
        magnitude = tl.reshape(tl.abs(x), [GROUPS, SIZE])
        # The maximum of a GPU ignores NaN; 0 times the sum lets it through.
        largest = tl.max(magnitude, 1) + 0.0 * tl.sum(magnitude, 1)
        group = tl.arange(0, GROUPS)
        num_groups = tl.cdiv(blocks, _CODES_PER_SCALE)
        is_group = tile * GROUPS + group < num_groups
        tl.store(scale + _first_group(row, tile, blocks, BLOCKS) + group, largest, mask=is_group)
        divisor = tl.maximum(largest, _TINY)
        y = x / tl.reshape(tl.broadcast_to(divisor[:, None], [GROUPS, SIZE]), [BLOCKS])
        fraction = 0.5
        if STOCHASTIC:
            fraction = (_random_bits(index, seed) & 0xFFFFFF).to(tl.float32) * 2.0**-24
        if stored.dtype.element_ty == tl.int8:
            code = tl.sqrt(tl.abs(y)) * 127
            code = tl.floor(tl.where(y < 0, -code, code) + fraction)
            x = tl.minimum(tl.maximum(code, -127), 127)
        else:
            code = tl.floor(tl.sqrt(tl.sqrt(y)) * 255 + fraction)
            x = tl.minimum(tl.maximum(code, 1), 255)
    elif stored.dtype.element_ty == tl.bfloat16:
        x = _round_to_bfloat16(x, index, seed, STOCHASTIC)
    tl.store(stored + index, x.to(stored.dtype.element_ty), mask=is_block)


@triton.jit
def _first_group(row, tile, blocks, BLOCKS: tl.constexpr):
    """Compute the index of the first scale of a tile."""
    return row * tl.cdiv(blocks, _CODES_PER_SCALE) + tile * (BLOCKS // _CODES_PER_SCALE)


@triton.jit
def _round_to_bfloat16(x, index, seed, STOCHASTIC: tl.constexpr):
    """Round float32 to bfloat16, as `rounding.to_bfloat16` or a cast does."""
    bits = x.to(tl.uint32, bitcast=True)
    # To nearest by hand, ties to even, because a cast in Triton's interpreter cuts off.
    carry = _random_bits(index, seed) & 0xFFFF if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where(x == x, bits + carry, bits)  # the bits of a NaN would overflow
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _random_bits(index, seed):
    """Hash index and seed to 32 random bits, as `rounding.random_bits` does."""
    bits = index.to(tl.uint32) * _GOLDEN + seed.to(tl.uint32)
    bits ^= bits >> 16
    bits *= _MIX1
    bits ^= bits >> 13
    bits *= _MIX2
    return bits ^ (bits >> 16)
