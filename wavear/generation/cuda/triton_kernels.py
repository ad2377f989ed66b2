"""The Triton kernels of WaveNet's loop over samples: one program for a group of streams.

All matrices lie as `torch.nn.Linear` has them, (outputs, inputs), padded with zeros to whole tiles;
`triton_packing` makes them. Every product is `tl.dot` on the rows of a whole group, also where
streams are missing from it: so the sums of a stream are taken in the same order whatever batch it
rides in.

Threads of a program pass values on through global memory (the queues and the scratch, which stay in
the first- and second-level caches) and meet at `tl.debug_barrier` in between. Programs never wait
for each other.

Sums over tiles are taken element by element and reduced after the loop, which is faster; the
compiler's pass that would do so (Triton 3.8) fails where such a sum is used twice.
"""

# What is inside a kernel is Triton's language: its types are not Python's.
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # no code: above all codes
_LOWEST = tl.constexpr(-(2**31))  # below the key of every logit


@triton.jit
def _dot(x, w, acc, UPCAST: tl.constexpr):
    """acc + x @ w with float32 sums; float32 operands as three products on tensor cores ("tf32x3").

    The interpreter works with NumPy, which has no bfloat16: there halves are multiplied as the
    float32 they stand for.
    """
    if UPCAST:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision="tf32x3")


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _relu(x):
    """NaN stays NaN, which `tl.maximum` would make 0."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def project(
    cond, stride_stream, stride_channel, stride_time, weights, bias, out, samples, rows, channels,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (rows, OUTPUTS) = bias + weights @ cond, a row for each stream and sample."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = row < rows
    start = (row // samples).to(tl.int64) * stride_stream + (row % samples).to(
        tl.int64
    ) * stride_time
    acc = tl.zeros((ROWS, TILE), tl.float32) + tl.load(bias + column)[None, :]
    for k in range(0, CHANNELS, STEP):
        channel = k + tl.arange(0, STEP)
        mask = there[:, None] & (channel < channels)[None, :]
        x = tl.load(cond + start[:, None] + channel[None, :] * stride_channel, mask=mask, other=0.0)
        w = tl.load(weights + column[None, :] * CHANNELS + channel[:, None])
        acc = _dot(x.to(w.dtype), w, acc, UPCAST)
    tl.store(out + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :], acc, mask=there[:, None])


@triton.jit
def _queue(layer, now, KERNEL: tl.constexpr, DEPTH: tl.constexpr):
    """(dilation, length, first slot) of a layer's queue, and the slot of sample `now` in it.

    The layers of a stack have dilations 1, 2, 4...; a queue has (KERNEL - 1) * dilation slots and
    one for the current sample, and they lie one after the other.
    """
    place = layer % DEPTH
    dilation = 1 << place
    length = (KERNEL - 1) * dilation + 1
    stack = (KERNEL - 1) * ((1 << DEPTH) - 1) + DEPTH
    first = (layer // DEPTH) * stack + (KERNEL - 1) * (dilation - 1) + place
    return dilation, length, first, now % length


@triton.jit
def _layers_in_registers(
    x, queues, there, z, gates, dilated, residual, residual_bias, now, LAYERS: tl.constexpr,
    DEPTH: tl.constexpr, KERNEL: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All layers, whose signal x (ROWS, R) never leaves the registers; gated units go to `gates`.

    The weights of the layers to come, and their past, are fetched while a layer is computed:
    nothing of them depends on the layers before.
    """
    r = tl.arange(0, R)
    k = tl.arange(0, R)[:, None]
    for layer in tl.range(0, LAYERS, num_stages=STAGES):
        dilation, length, first, slot = _queue(layer, now, KERNEL, DEPTH)
        a = tl.load(z + layer * 2 * R + r[None, :], mask=there, other=0.0)
        b = tl.load(z + (layer * 2 + 1) * R + r[None, :], mask=there, other=0.0)
        w = dilated + layer * KERNEL * 2 * R * R + r[None, :] * R + k
        for tap in tl.static_range(KERNEL - 1):  # the oldest first
            old = (slot + length - (KERNEL - 1 - tap) * dilation) % length
            past = tl.load(queues + (first + old) * R + r[None, :], mask=there, other=0.0).to(
                dilated.dtype.element_ty
            )
            a = _dot(past, tl.load(w + 2 * tap * R * R), a, UPCAST)
            b = _dot(past, tl.load(w + (2 * tap + 1) * R * R), b, UPCAST)
        current = x.to(dilated.dtype.element_ty)
        a = _dot(current, tl.load(w + 2 * (KERNEL - 1) * R * R), a, UPCAST)
        b = _dot(current, tl.load(w + (2 * KERNEL - 1) * R * R), b, UPCAST)
        gated = (_tanh(a) * _sigmoid(b)).to(dilated.dtype.element_ty)
        tl.store(queues + (first + slot) * R + r[None, :], x, mask=there)
        tl.store(gates + layer * R + r[None, :], gated)
        w = tl.load(residual + layer * R * R + r[None, :] * R + k)
        x = _dot(gated, w, x + tl.load(residual_bias + layer * R + r)[None, :], UPCAST)
    return x


@triton.jit
def _add_tap(
    a, b, x, there, w, R: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr
):
    """Add one tap to both halves of a gate's input; `x`, `w` point to each row's first input."""
    k = tl.arange(0, STEP)
    for start in range(0, R, STEP):
        values = tl.load(x + (start + k)[None, :], mask=there, other=0.0).to(w.dtype.element_ty)
        a = _dot(values, tl.load(w + (start + k)[:, None]), a, UPCAST)
        b = _dot(values, tl.load(w + R * R + (start + k)[:, None]), b, UPCAST)
    return a, b


@triton.jit
def _layers_in_tiles(
    signal, queues, there, z, gates, dilated, residual, residual_bias, now, LAYERS: tl.constexpr,
    DEPTH: tl.constexpr, KERNEL: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All layers in tiles of outputs, the signal in memory (ROWS, R), where it is too wide."""
    for layer in range(LAYERS):
        dilation, length, first, slot = _queue(layer, now, KERNEL, DEPTH)
        for tile in range(0, R, TILE):
            r = tile + tl.arange(0, TILE)
            a = tl.load(z + layer * 2 * R + r[None, :], mask=there, other=0.0)
            b = tl.load(z + (layer * 2 + 1) * R + r[None, :], mask=there, other=0.0)
            w = dilated + layer * KERNEL * 2 * R * R + r[None, :] * R
            for tap in range(KERNEL - 1):
                old = (slot + length - (KERNEL - 1 - tap) * dilation) % length
                past, taps = queues + (first + old) * R, w + 2 * tap * R * R
                a, b = _add_tap(a, b, past, there, taps, R, TILE, STEP, UPCAST)
            taps = w + 2 * (KERNEL - 1) * R * R
            a, b = _add_tap(a, b, signal, there, taps, R, TILE, STEP, UPCAST)
            gated = (_tanh(a) * _sigmoid(b)).to(dilated.dtype.element_ty)
            tl.store(gates + layer * R + r[None, :], gated)
            current = tl.load(signal + r[None, :])
            tl.store(queues + (first + slot) * R + r[None, :], current, mask=there)
        tl.debug_barrier()
        for tile in range(0, R, TILE):
            r = tile + tl.arange(0, TILE)
            x = tl.load(signal + r[None, :]) + tl.load(residual_bias + layer * R + r)[None, :]
            for start in range(0, R, STEP):
                k = start + tl.arange(0, STEP)
                gated = tl.load(gates + layer * R + k[None, :])
                w = tl.load(residual + layer * R * R + r[None, :] * R + k[:, None])
                x = _dot(gated, w, x, UPCAST)
            tl.store(signal + r[None, :], x)
        tl.debug_barrier()


@triton.jit
def _outputs(
    x, w, bias, column, INPUTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """bias + x @ w.T for a tile of columns; `x` points to the rows, (ROWS, 1)."""
    acc = tl.zeros((ROWS, TILE), tl.float32) + tl.load(bias + column)[None, :]
    for start in tl.range(0, INPUTS, STEP, num_stages=STAGES):
        k = start + tl.arange(0, STEP)
        acc = _dot(
            tl.load(x + k[None, :]), tl.load(w + column[None, :] * INPUTS + k[:, None]), acc, UPCAST
        )
    return acc


@triton.jit
def _head(
    row, gates, skips, hidden, logits, skip, skip_bias, head1, head1_bias, head2, head2_bias,
    GATES: tl.constexpr, S: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    S_TILE: tl.constexpr, A_TILE: tl.constexpr, Q_TILE: tl.constexpr, G_STEP: tl.constexpr,
    S_STEP: tl.constexpr, A_STEP: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the gated units of all layers to skips (one product), hidden units and logits."""
    for tile in range(0, S, S_TILE):
        n = tile + tl.arange(0, S_TILE)
        acc = _outputs(gates, skip, skip_bias, n, GATES, ROWS, S_TILE, G_STEP, STAGES, UPCAST)
        tl.store(skips + row * S + n[None, :], _relu(acc).to(skips.dtype.element_ty))
    tl.debug_barrier()
    for tile in range(0, A, A_TILE):
        n = tile + tl.arange(0, A_TILE)
        acc = _outputs(
            skips + row * S, head1, head1_bias, n, S, ROWS, A_TILE, S_STEP, STAGES, UPCAST
        )
        tl.store(hidden + row * A + n[None, :], _relu(acc).to(hidden.dtype.element_ty))
    tl.debug_barrier()
    for tile in range(0, Q, Q_TILE):
        n = tile + tl.arange(0, Q_TILE)
        acc = _outputs(
            hidden + row * A, head2, head2_bias, n, A, ROWS, Q_TILE, A_STEP, STAGES, UPCAST
        )
        tl.store(logits + row * Q + n[None, :], acc)
    tl.debug_barrier()


@triton.jit
def _largest(logits, Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return the largest of each row's logits; `logits` points to the rows, (ROWS, 1)."""
    largest = tl.full((ROWS, TILE), float("-inf"), tl.float32)
    for tile in range(0, Q, TILE):
        q = tile + tl.arange(0, TILE)
        largest = tl.maximum(largest, tl.load(logits + q[None, :]))
    return tl.max(largest, axis=1)


@triton.jit
def _weight(logits, largest, sharpness):
    """exp((logits - largest) / temperature), in float64 for the sums."""
    return tl.exp((logits - largest) * sharpness).to(tl.float64)


@triton.jit
def _key(logits):
    """Integers in the order of the logits."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _logit(key):
    """Return the logit of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _count(logits, key, Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """How many logits of each row have at least this key."""
    count = tl.zeros((ROWS, TILE), tl.int32)
    for tile in range(0, Q, TILE):
        q = tile + tl.arange(0, TILE)
        count += (_key(tl.load(logits + q[None, :])) >= key[:, None]).to(tl.int32)
    return tl.sum(count, axis=1)


@triton.jit
def _total(
    logits, largest, sharpness, key, Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Return the weight of the logits of each row that have at least this key."""
    total = tl.zeros((ROWS, TILE), tl.float64)
    for tile in range(0, Q, TILE):
        q = tile + tl.arange(0, TILE)
        values = tl.load(logits + q[None, :])
        weight = _weight(values, largest[:, None], sharpness[:, None])
        total += tl.where(_key(values) >= key[:, None], weight, 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _cut(
    logits, largest, sharpness, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(key, ties): codes stay whose logits have a larger key, and the first `ties` of this key.

    No sorting: the keys are searched by halves, 32 times.
    """
    least = tl.full((ROWS,), _LOWEST, tl.int32)
    ties = tl.full((ROWS,), _NONE, tl.int32)
    if TOP_K:
        low = tl.full((ROWS,), _LOWEST, tl.int64)
        high = tl.full((ROWS,), _NONE, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            enough = _count(logits, middle.to(tl.int32), Q, ROWS, TILE) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        least = low.to(tl.int32)
        ties = top_k - _count(logits, (low + 1).to(tl.int32), Q, ROWS, TILE)
    if TOP_P:
        # Of what top_k leaves: those above its key, and so many of it.
        tied = tl.zeros((ROWS,), tl.float64)
        if TOP_K:
            tied = ties.to(tl.float64) * _weight(_logit(least), largest, sharpness)
        above_least = (least.to(tl.int64) + 1).to(tl.int32)
        share = top_p * (_total(logits, largest, sharpness, above_least, Q, ROWS, TILE) + tied)
        low = least.to(tl.int64)
        high = tl.full((ROWS,), _NONE, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            enough = _total(logits, largest, sharpness, middle.to(tl.int32), Q, ROWS, TILE) >= share
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        reached = _total(logits, largest, sharpness, (low + 1).to(tl.int32), Q, ROWS, TILE)
        # Of equal logits, code number i (from 0) stays if those before it have not reached the
        # share yet.
        cut = low.to(tl.int32)
        each = _weight(_logit(cut), largest, sharpness)
        needed = tl.where(each > 0.0, tl.ceil((share - reached) / each), 1.0)
        needed = tl.minimum(tl.maximum(needed, 1.0), 1e9).to(tl.int32)
        ties = tl.where(cut == least, tl.minimum(ties, needed), needed)
        least = cut
    return least, ties


@triton.jit
def _draw(
    logits, uniform, sharpness, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the code of each row's uniform; -1 where logits are not finite."""
    largest = _largest(logits, Q, ROWS, TILE)
    everything = tl.full((ROWS,), _LOWEST, tl.int32)
    total = _total(logits, largest, sharpness, everything, Q, ROWS, TILE)
    fine = (total > 0.0) & (total < float("inf"))
    least, ties = everything, everything
    if TOP_K or TOP_P:
        least, ties = _cut(logits, largest, sharpness, top_k, top_p, TOP_K, TOP_P, Q, ROWS, TILE)
        left = tl.zeros((ROWS, TILE), tl.float64)
        passed = tl.zeros((ROWS,), tl.int32)
        for tile in range(0, Q, TILE):
            q = tile + tl.arange(0, TILE)
            values = tl.load(logits + q[None, :])
            weight, passed = _kept(values, largest, sharpness, least, ties, passed)
            left += weight
        total = tl.sum(left, axis=1)
    threshold = uniform * total
    before = tl.zeros((ROWS,), tl.float64)
    passed = tl.zeros((ROWS,), tl.int32)
    codes = tl.full((ROWS, TILE), _NONE, tl.int32)
    lasts = tl.zeros((ROWS, TILE), tl.int32)
    for tile in range(0, Q, TILE):
        q = tile + tl.arange(0, TILE)
        values = tl.load(logits + q[None, :])
        if TOP_K or TOP_P:
            weight, passed = _kept(values, largest, sharpness, least, ties, passed)
        else:
            weight = _weight(values, largest[:, None], sharpness[:, None])
        cumulative = before[:, None] + tl.cumsum(weight, axis=1)
        possible = weight > 0.0
        drawn = possible & (cumulative > threshold[:, None])
        codes = tl.minimum(codes, tl.where(drawn, q[None, :], _NONE))
        # Where rounding leads beyond the sum, the last code that has any probability.
        lasts = tl.maximum(lasts, tl.where(possible, q[None, :], 0))
        before += tl.sum(weight, axis=1)
    code, last = tl.min(codes, axis=1), tl.max(lasts, axis=1)
    return tl.where(fine, tl.where(code == _NONE, last, code), -1)


@triton.jit
def _kept(logits, largest, sharpness, least, ties, passed):
    """Weights of a tile of logits, zero where cut off; and the number of keys `least` so far."""
    key = _key(logits)
    tied = (key == least[:, None]).to(tl.int32)
    number = passed[:, None] + tl.cumsum(tied, axis=1)  # from 1 on
    stays = (key > least[:, None]) | ((tied > 0) & (number <= ties[:, None]))
    weight = tl.where(stays, _weight(logits, largest[:, None], sharpness[:, None]), 0.0)
    return weight, passed + tl.sum(tied, axis=1)


@triton.jit
def _log_probability(logits, code, Q: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return the log-probability (float64, nats) of one code of each row by the model's law."""
    largest = _largest(logits, Q, ROWS, TILE)
    everything = tl.full((ROWS,), _LOWEST, tl.int32)
    total = _total(logits, largest, tl.full((ROWS,), 1.0, tl.float32), everything, Q, ROWS, TILE)
    chosen = tl.zeros((ROWS, TILE), tl.float32)
    for tile in range(0, Q, TILE):
        q = tile + tl.arange(0, TILE)
        values = tl.load(logits + q[None, :])
        chosen += tl.where(q[None, :] == code[:, None], values, 0.0)
    return tl.sum(chosen, axis=1).to(tl.float64) - largest.to(tl.float64) - tl.log(total)


@triton.jit(
    do_not_specialize=["start", "samples", "length", "batch", "top_k", "now", "z_rows", "z_moves"]
)
def run(
    uniforms, sharpness, codes, scores, start, samples, length, batch, top_k, top_p, previous,
    queues, now, z, z_rows, z_moves, embedding, dilated, residual, residual_bias, skip, skip_bias,
    head1, head1_bias, head2, head2_bias, gates, signal, skips, hidden, logits,
    LAYERS: tl.constexpr, DEPTH: tl.constexpr, KERNEL: tl.constexpr, SLOTS: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, GATES: tl.constexpr,
    ROWS: tl.constexpr, R_TILE: tl.constexpr, S_TILE: tl.constexpr, A_TILE: tl.constexpr,
    Q_TILE: tl.constexpr, D_TILE: tl.constexpr, R_STEP: tl.constexpr, G_STEP: tl.constexpr,
    S_STEP: tl.constexpr, A_STEP: tl.constexpr, LAYER_STAGES: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr, SCORING: tl.constexpr, SCORED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):  # fmt: skip
    """Generate samples `start` to `start + samples` of a call, for the streams of one group.

    Parameters
    ----------
    uniforms : float64 (batch, length)
    sharpness : float32 (batch, length)
        1 / temperature.
    codes : int32 (batch, length)
        Written, or read where SCORING; -1 where the logits are not finite.
    scores : float64 (batch, length)
        Written where SCORED or SCORING.
    top_p : float64 (1,)
    previous : int32 (batch,)
        The code before; becomes the last one.
    queues : float32 (batch, SLOTS, R)
        The past inputs of each layer, see `_queue`.
    now : int32
        Samples that the queues have seen.
    z : float32 (rows, LAYERS, 2, R)
        What each gate's input starts with: `z_rows` rows for each stream (0: the same for all), of
        which each sample takes the next if `z_moves` is 1.
    gates, signal, skips, hidden, logits
        Scratch: ROWS rows for each program.
    """
    program = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, ROWS)
    stream = program * ROWS + number
    alive = stream < batch
    there = alive[:, None]
    row = number[:, None]
    queues += stream[:, None] * (SLOTS * R)
    z += stream[:, None] * z_rows * (LAYERS * 2 * R)
    at = stream * length + start
    gates += program * ROWS * GATES + row * GATES
    signal += program * ROWS * R + row * R
    skips += program * ROWS * S
    hidden += program * ROWS * A
    logits += program * ROWS * Q
    code = tl.load(previous + stream, mask=alive, other=0)
    share = tl.load(top_p)
    t = 0
    while t < samples:
        begin = z + t * z_moves * (LAYERS * 2 * R)
        if R_TILE == R:
            x = tl.load(embedding + code[:, None] * R + tl.arange(0, R)[None, :])
            _layers_in_registers(
                x, queues, there, begin, gates, dilated, residual, residual_bias, now + t,
                LAYERS, DEPTH, KERNEL, R, LAYER_STAGES, UPCAST,
            )  # fmt: skip
        else:
            for tile in range(0, R, R_TILE):
                r = tile + tl.arange(0, R_TILE)
                tl.store(signal + r[None, :], tl.load(embedding + code[:, None] * R + r[None, :]))
            tl.debug_barrier()
            _layers_in_tiles(
                signal, queues, there, begin, gates, dilated, residual, residual_bias, now + t,
                LAYERS, DEPTH, KERNEL, R, R_TILE, R_STEP, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()
        _head(
            row, gates, skips, hidden, logits, skip, skip_bias, head1, head1_bias, head2,
            head2_bias, GATES, S, A, Q, ROWS, S_TILE, A_TILE, Q_TILE, G_STEP, S_STEP, A_STEP,
            STAGES, UPCAST,
        )  # fmt: skip
        rows = logits + row * Q
        if SCORING:
            code = tl.load(codes + at + t, mask=alive, other=0)
        else:
            uniform = tl.load(uniforms + at + t, mask=alive, other=0.0)
            sharp = tl.load(sharpness + at + t, mask=alive, other=1.0)
            code = _draw(rows, uniform, sharp, top_k, share, TOP_K, TOP_P, Q, ROWS, D_TILE)
            tl.store(codes + at + t, code, mask=alive)
            code = tl.maximum(code, 0)
        if SCORED:
            tl.store(scores + at + t, _log_probability(rows, code, Q, ROWS, D_TILE), mask=alive)
        t += 1
    tl.store(previous + stream, code, mask=alive)
