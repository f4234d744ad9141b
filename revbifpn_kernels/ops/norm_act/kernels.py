"""Triton kernels of batch statistics, norm_act and its gradient.

A program owns CHANNELS channels of some images and a chunk of their pixels, and walks through them
in tiles [CHANNELS, PIXELS], so it loads the factors of its channels once. UNIT divides the extent
along memory and all other strides, which are counted in UNITs: rows of 196 elements are aligned to
16 bytes, which Triton does not see in an argument. `CHANNELS_LAST` says which side of the tile lies
along memory, nothing else.

Sums are gathered in a fixed order, without atomics: the same bits on every run. Contraction is off
(launch.py), so what is fused is written as `fma`.
"""

import triton
import triton.language as tl

# Arguments that vary with the batch: compiled for any value, so a new batch is no new kernel.
COUNTS = ("N", "C", "pixels", "blocks", "chunks", "images", "chunk", "parts")


@triton.jit
def hardswish_share(z):
    return tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z)."""
    if ACT == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACT == "hardswish":
        return z * hardswish_share(z)
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def activate_with_slope(z, ACT: tl.constexpr):
    """act(z) and act′(z), which at the kinks is PyTorch's."""
    if ACT == "silu":
        share = tl.sigmoid(z)
        return z * share, share * tl.fma(z, 1.0 - share, 1.0)
    elif ACT == "hardswish":
        share = hardswish_share(z)
        # z/3 + ½ is share + z/6; outside, share alone is the slope.
        return z * share, tl.fma(tl.where(tl.abs(z) >= 3.0, 0.0, z), 1.0 / 6.0, share)
    elif ACT == "relu":
        return activate(z, ACT), tl.where(z <= 0.0, 0.0, 1.0)
    else:
        return z, tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def locate(
    N, C, pixels, blocks, chunks, images, chunk,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """C and this program's channels [CHANNELS, 1], images and tiles: two firsts and two ends.

    Blocks of channels vary fastest: what runs at the same time lies side by side in both formats.
    """
    if CHANNELS_LAST:
        C = C * UNIT
        tiles = tl.cdiv(pixels, PIXELS)
    else:
        tiles = tl.cdiv(pixels, PIXELS // UNIT)
    pid = tl.program_id(0)
    part = pid // blocks
    c = (pid % blocks) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    n = (part // chunks).to(tl.int64) * images
    t = (part % chunks).to(tl.int64) * chunk
    return C, c, n, tl.minimum(n + images, N), t, tl.minimum(t + chunk, tiles)


@triton.jit
def pixels_in_tile(
    t, pixels, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """How many pixels of tile t lie in the map."""
    FACTOR: tl.constexpr = 1 if CHANNELS_LAST else UNIT
    left = tl.minimum(pixels - t * (PIXELS // FACTOR), PIXELS // FACTOR)
    return left.to(tl.int32) * FACTOR


@triton.jit
def tile_mask(
    c, C, t, pixels, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """[CHANNELS, PIXELS]: what of tile t lies in the map."""
    left = pixels_in_tile(t, pixels, UNIT, PIXELS, CHANNELS_LAST)
    return (c < C) & (tl.arange(0, PIXELS)[None, :] < left)


@triton.jit
def tile_pointers(
    ptr, strides, n, c, t, UNIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """[CHANNELS, PIXELS] pointers to tile t of image n; strides of n, c and pixels."""
    # Interpreted, loops count in Python's numbers, which would take on a stride's 32 bits.
    n = tl.full([], n, tl.int64)
    p = tl.full([], t, tl.int64) * PIXELS
    offs_p = tl.arange(0, PIXELS)[None, :]
    if CHANNELS_LAST:
        base = ptr + (n * strides[0] + p * strides[2]) * UNIT
        return base + (offs_p.to(tl.int64) * strides[2]) * UNIT + c
    else:
        base = ptr + (n * strides[0]) * UNIT + p
        return base + (c.to(tl.int64) * strides[1]) * UNIT + offs_p


@triton.jit
def load_factors(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C):
    """Mean, invstd·weight and bias of each channel, [CHANNELS, 1]."""
    mask = c < C
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0)
    scale = tl.load(invstd_ptr + c, mask=mask, other=0.0)
    bias = tl.zeros_like(mean)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + c, mask=mask, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=mask, other=0.0)
    return mean, scale, bias


@triton.jit(do_not_specialize=COUNTS)
def _batch_statistics_kernel(
    parts_ptr, x_ptr, x_strides, N, C, pixels, blocks, chunks, images, chunk, parts,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(4, parts, C): two terms of the mean, sum of squares about it, and count of each part.

    Values are taken about the mean of the part's first tile, the first term, so their squares
    exceed those about the part's mean at most by a factor of its tiles: nothing cancels.
    """
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    ptr = tile_pointers(x_ptr, x_strides, n_first, c, t_first, UNIT, PIXELS, CHANNELS_LAST)
    mask = tile_mask(c, C, t_first, pixels, UNIT, PIXELS, CHANNELS_LAST)
    first = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    in_first = pixels_in_tile(t_first, pixels, UNIT, PIXELS, CHANNELS_LAST)
    shift = tl.sum(first, 1, keep_dims=True) / in_first.to(tl.float32)
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    squares = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for n in range(n_first, n_end):
        for t in range(t_first, t_end):
            ptr = tile_pointers(x_ptr, x_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            difference = tl.where(mask, x - shift, 0.0)
            sums += difference
            squares = tl.fma(difference, difference, squares)
    in_last = pixels_in_tile(t_end - 1, pixels, UNIT, PIXELS, CHANNELS_LAST)
    in_image = (t_end - 1 - t_first) * PIXELS + in_last
    count = ((n_end - n_first) * in_image).to(tl.float32)
    total = tl.sum(sums, 1, keep_dims=True)
    excess = total / count
    square = tl.fma(-total, excess, tl.sum(squares, 1, keep_dims=True))
    ptr = parts_ptr + (tl.program_id(0) // blocks).to(tl.int64) * C + c
    size = parts.to(tl.int64) * C
    tl.store(ptr, shift, mask=c < C)
    tl.store(ptr + size, excess, mask=c < C)
    tl.store(ptr + 2 * size, tl.where(square < 0.0, 0.0, square), mask=c < C)
    tl.store(ptr + 3 * size, tl.zeros_like(shift) + count, mask=c < C)


@triton.jit
def load_parts(parts_ptr, first, parts, c, C, shift, PARTS: tl.constexpr):
    """Means less `shift`, sums of squares and counts of PARTS parts, [CHANNELS, PARTS] each.

    Shifts cancel without rounding, so a mean's difference is as exact as its second term.
    """
    part = first + tl.arange(0, PARTS)[None, :]
    mask = (c < C) & (part < parts)
    ptr = parts_ptr + part.to(tl.int64) * C + c
    size = parts.to(tl.int64) * C
    difference = tl.load(ptr, mask=mask, other=0.0) - shift
    difference += tl.load(ptr + size, mask=mask, other=0.0)
    square = tl.load(ptr + 2 * size, mask=mask, other=0.0)
    return difference, square, tl.load(ptr + 3 * size, mask=mask, other=0.0)


@triton.jit
def move_running(ptr, c, mask, value, momentum):
    running = tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)
    moved = tl.fma(value, momentum, running * (1.0 - momentum))
    tl.store(ptr + c, moved.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _batch_statistics_combine_kernel(
    mean_ptr, invstd_ptr, running_mean_ptr, running_var_ptr, batches_ptr, parts_ptr,
    eps, momentum, elements, unbiased, C, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Mean and invstd from the parts by Chan's formula; running statistics and `batches` move.

    `elements` a channel has, and `unbiased` = elements / (elements − 1).
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    mask_c = c < C
    shift = tl.load(parts_ptr + c, mask=mask_c, other=0.0)
    total = tl.zeros_like(shift) + elements
    sums = tl.zeros([CHANNELS, PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        difference, _, count = load_parts(parts_ptr, first, parts, c, C, shift, PARTS)
        sums = tl.fma(count, difference, sums)
    excess = tl.div_rn(tl.sum(sums, 1, keep_dims=True), total)
    squares = tl.zeros([CHANNELS, PARTS], tl.float32)
    for first in range(0, parts, PARTS):
        difference, square, count = load_parts(parts_ptr, first, parts, c, C, shift, PARTS)
        difference -= excess
        squares += tl.fma(count * difference, difference, square)
    mean = shift + excess
    var = tl.div_rn(tl.sum(squares, 1, keep_dims=True), total)
    invstd = tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))
    tl.store(mean_ptr + c, mean, mask=mask_c)
    tl.store(invstd_ptr + c, invstd, mask=mask_c)
    if running_mean_ptr is not None:
        move_running(running_mean_ptr, c, mask_c, mean, momentum)
    if running_var_ptr is not None:
        move_running(running_var_ptr, c, mask_c, var * unbiased, momentum)
    if batches_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_kernel(
    y_ptr, y_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, gate_ptr,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean)·scale + bias)·gate."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_factors(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    for n in range(n_first, n_end):
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            ptr = tile_pointers(x_ptr, x_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            y = activate(tl.fma(x - mean, scale, bias), ACT)
            if gate_ptr is not None:
                y *= gate
            ptr = tile_pointers(y_ptr, y_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            tl.store(ptr, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_means_kernel(
    means_ptr, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, share,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(chunks, N, C): share·Σ act(z) over the pixels of each chunk."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_factors(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    row = (tl.program_id(0) // blocks % chunks).to(tl.int64) * N
    for n in range(n_first, n_end):
        sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            ptr = tile_pointers(x_ptr, x_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            sums += tl.where(mask, activate(tl.fma(x - mean, scale, bias), ACT), 0.0)
        total = tl.sum(sums, 1, keep_dims=True) * share
        tl.store(means_ptr + (row + n) * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_sums_kernel(
    sums_ptr, grad_ptr, grad_strides, x_ptr, x_strides, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr, GATED: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(chunks, 2 or 5, N, C): the gradient's sums over the pixels of each chunk."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_factors(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    row = (tl.program_id(0) // blocks % chunks).to(tl.int64) * (N * (5 if GATED else 2))
    size = N.to(tl.int64) * C
    for n in range(n_first, n_end):
        sum_g = tl.zeros([CHANNELS, PIXELS], tl.float32)
        sum_gx = tl.zeros([CHANNELS, PIXELS], tl.float32)
        if GATED:
            sum_s = tl.zeros([CHANNELS, PIXELS], tl.float32)
            sum_sx = tl.zeros([CHANNELS, PIXELS], tl.float32)
            sum_gy = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            ptr = tile_pointers(x_ptr, x_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            xc = tl.load(ptr, mask=mask, other=0.0).to(tl.float32) - mean
            ptr = tile_pointers(grad_ptr, grad_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            grad = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            y, slope = activate_with_slope(tl.fma(xc, scale, bias), ACT)
            sloped = grad * slope
            sum_g += sloped
            sum_gx = tl.fma(sloped, xc, sum_gx)
            if GATED:
                slope = tl.where(mask, slope, 0.0)
                sum_s += slope
                sum_sx = tl.fma(slope, xc, sum_sx)
                sum_gy = tl.fma(grad, y, sum_gy)
        ptr = sums_ptr + (row + n) * C + c
        tl.store(ptr, tl.sum(sum_g, 1, keep_dims=True), mask=c < C)
        tl.store(ptr + size, tl.sum(sum_gx, 1, keep_dims=True), mask=c < C)
        if GATED:
            tl.store(ptr + 2 * size, tl.sum(sum_s, 1, keep_dims=True), mask=c < C)
            tl.store(ptr + 3 * size, tl.sum(sum_sx, 1, keep_dims=True), mask=c < C)
            tl.store(ptr + 4 * size, tl.sum(sum_gy, 1, keep_dims=True), mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_totals_kernel(
    dweight_ptr, dbias_ptr, sums_ptr, invstd_ptr, gate_ptr, grad_means_ptr, share,
    N, C, CHANNELS: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """dbias = Σdz and dweight = invstd·Σ(dz·xc), from the sums of all images."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    size = N.to(tl.int64) * C
    totals = tl.zeros([CHANNELS, IMAGES], tl.float32)
    totals_x = tl.zeros([CHANNELS, IMAGES], tl.float32)
    for first in range(0, N, IMAGES):
        n = first + tl.arange(0, IMAGES)[None, :]
        mask = (c < C) & (n < N)
        offs = n.to(tl.int64) * C + c
        sum_g = tl.load(sums_ptr + offs, mask=mask, other=0.0)
        sum_gx = tl.load(sums_ptr + size + offs, mask=mask, other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
            sum_g *= gate
            sum_gx *= gate
        if grad_means_ptr is not None:
            extra = tl.load(grad_means_ptr + offs, mask=mask, other=0.0) * share
            sum_s = tl.load(sums_ptr + 2 * size + offs, mask=mask, other=0.0)
            sum_sx = tl.load(sums_ptr + 3 * size + offs, mask=mask, other=0.0)
            sum_g = tl.fma(extra, sum_s, sum_g)
            sum_gx = tl.fma(extra, sum_sx, sum_gx)
        totals += sum_g
        totals_x += sum_gx
    invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
    tl.store(dbias_ptr + c, tl.sum(totals, 1, keep_dims=True), mask=c < C)
    tl.store(dweight_ptr + c, tl.sum(totals_x, 1, keep_dims=True) * invstd, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _norm_act_grad_kernel(
    dx_ptr, dx_strides, grad_ptr, grad_strides, x_ptr, x_strides,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, gate_ptr, grad_means_ptr, dweight_ptr, dbias_ptr,
    share, inverse_count, N, C, pixels, blocks, chunks, images, chunk, ACT: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """dx; the statistics are constants where dweight_ptr and dbias_ptr are None."""
    C, c, n_first, n_end, t_first, t_end = locate(
        N, C, pixels, blocks, chunks, images, chunk, UNIT, CHANNELS, PIXELS, CHANNELS_LAST
    )
    mean, scale, bias = load_factors(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c, C)
    if dbias_ptr is not None:
        mean_dz = tl.load(dbias_ptr + c, mask=c < C, other=0.0) * inverse_count
        invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
        along_x = tl.load(dweight_ptr + c, mask=c < C, other=0.0) * invstd * inverse_count
    for n in range(n_first, n_end):
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
        if grad_means_ptr is not None:
            extra = tl.load(grad_means_ptr + n * C + c, mask=c < C, other=0.0) * share
        for t in range(t_first, t_end):
            mask = tile_mask(c, C, t, pixels, UNIT, PIXELS, CHANNELS_LAST)
            ptr = tile_pointers(x_ptr, x_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            xc = tl.load(ptr, mask=mask, other=0.0).to(tl.float32) - mean
            ptr = tile_pointers(grad_ptr, grad_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            grad = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                grad *= gate
            if grad_means_ptr is not None:
                grad += extra
            _, slope = activate_with_slope(tl.fma(xc, scale, bias), ACT)
            dz = grad * slope
            if dbias_ptr is not None:
                dz = tl.fma(-xc, along_x, dz - mean_dz)
            ptr = tile_pointers(dx_ptr, dx_strides, n, c, t, UNIT, PIXELS, CHANNELS_LAST)
            tl.store(ptr, (dz * scale).to(dx_ptr.dtype.element_ty), mask=mask)
