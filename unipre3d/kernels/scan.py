"""The selective scan on the CPU: the compiled functions of `unipre3d.backbones.mamba`, forward and backward.

The chapter `43_mamba` teaches what is computed here; this file is about doing it fast. The plan:

1. Channels are worked on eight at a time, as one vector; the states of these eight stay in the cache.
2. `scan` walks along the tokens and keeps the states at the start of every chunk of `CHUNK` tokens.
3. `scan_backward` walks over the chunks from the last to the first. It computes decays and states of a
   chunk again, then the gradients from its last token to its first.
4. The gradients of B and C are sums over channels. They are added up in eight lanes, channel block after
   channel block, and the lanes are added at the end of a chunk.

Every function works on one cloud and a range of channel blocks, writes to memory of its own and releases
the interpreter lock, so a caller may run them in threads. Results do not depend on the threads.
The vectors come from `splat`; an edit there asks for an edit of this file's date, which the on-disk cache
goes by.
"""

import math

import numpy as np

from unipre3d.kernels.splat import kernel, load8, max8, min8, part, scale8, splat8, store8

f32 = np.float32

LANES = 8  # channels of a block
CHUNK = 32  # tokens between two states that are kept

# 2^x on [-1/2, 1/2], exact at 0; relative error 1.6e-8
P1, P2, P3 = f32(6.93147182e-01), f32(2.40226477e-01), f32(5.55033237e-02)
P4, P5, P6 = f32(9.61843692e-03), f32(1.33988739e-03), f32(1.53533620e-04)
ZERO, ONE, LN2 = f32(0.0), f32(1.0), f32(math.log(2.0))
LOW, HIGH = f32(-126.0), f32(127.0)  # of an exponent
ROUND = f32(1.5 * 2**23)  # added and taken away again, it leaves a whole number


@part
def flat(array):
    "The array as one row."
    return array.reshape(-1)


@part
def exp2(a):
    "2^a, held between 2^-126 and 2^127: a polynomial, and the whole part in the exponent. NaN stays NaN."
    a = min8(splat8(HIGH), max8(splat8(LOW), a))
    n = (a + splat8(ROUND)) - splat8(ROUND)
    x = a - n
    p = splat8(P6) * x + splat8(P5)
    p = p * x + splat8(P4)
    p = p * x + splat8(P3)
    p = p * x + splat8(P2)
    p = p * x + splat8(P1)
    return scale8(p * x + splat8(ONE), n)


@kernel
def scan(b, begin, end, u, delta, A, B, C, D, y, starts):
    """Outputs `y` [b l d] of channel blocks begin..end of cloud b; no chunks in `starts`, no states kept.

    u, delta [b l d], B, C [b l n], D [d]; A [blocks n 8] in bits: the decay is 2^(delta A). States at the
    start of each chunk: starts [b chunks blocks n 8].
    """
    _, length, width = u.shape
    n, chunks = B.shape[2], starts.shape[1]
    row = n * LANES
    u, delta, A, y, starts = flat(u), flat(delta), flat(A), flat(y), flat(starts)
    state = np.zeros(end * row, np.float32)
    for first in range(0, length, CHUNK):
        last = min(first + CHUNK, length)
        for block in range(begin, end):
            base = block * row
            if chunks:
                kept = ((b * chunks + first // CHUNK) * (width // LANES) + block) * row
                for own in range(0, row, LANES):
                    store8(starts, kept + own, load8(state, base + own))
            direct = load8(D, block * LANES)
            for t in range(first, last):
                at = (b * length + t) * width + block * LANES
                step, x = load8(delta, at), load8(u, at)
                written, out = step * x, direct * x
                for i in range(n):
                    own = base + i * LANES
                    decay = exp2(step * load8(A, own))
                    h = decay * load8(state, own) + written * splat8(B[b, t, i])
                    store8(state, own, h)
                    out = out + h * splat8(C[b, t, i])
                store8(y, at, out)


@part
def recompute(b, first, last, block, u, delta, A, B, states, decays):
    "Decays and states of a chunk; the states before it are the first row of `states`."
    _, length, width = u.shape
    n = B.shape[2]
    row = n * LANES
    u, delta = flat(u), flat(delta)
    for t in range(first, last):
        at = (b * length + t) * width + block * LANES
        step = load8(delta, at)
        written = step * load8(u, at)
        to = (t - first) * row
        for i in range(n):
            decay = exp2(step * load8(A, block * row + i * LANES))
            store8(decays, to, decay)
            h = decay * load8(states, to) + written * splat8(B[b, t, i])
            store8(states, to + row, h)
            to += LANES


@part
def add_lanes(sums, rows, out):
    "The sum of the eight lanes of each of the first vectors."
    for t in range(rows):
        for i in range(out.shape[1]):
            at = (t * out.shape[1] + i) * LANES
            total = ZERO
            for lane in range(at, at + LANES):
                total += sums[lane]
            out[t, i] = total


@kernel
def scan_backward(
    b, begin, end, group, u, delta, A, B, C, D, starts, g_y, g_u, g_delta, g_A, g_B, g_C, g_D
):
    """Gradients of channel blocks begin..end of cloud b, from that of the outputs, g_y [b l d].

    Written: g_u, g_delta [b l d]; g_A [b blocks n 8], not in bits, and g_D [b d], which are still to be
    added over clouds; g_B, g_C [groups b l n], which are still to be added over groups of blocks.
    """
    _, length, width = u.shape
    n, chunks = B.shape[2], starts.shape[1]
    blocks, row = width // LANES, n * LANES
    A, starts, g_A, g_D = flat(A), flat(starts), flat(g_A), flat(g_D)
    us, steps, g_y, g_u, g_delta = flat(u), flat(delta), flat(g_y), flat(g_u), flat(g_delta)
    states = np.empty((CHUNK + 1) * row, np.float32)
    decays = np.empty(CHUNK * row, np.float32)
    sums_B = np.empty(CHUNK * row, np.float32)
    sums_C = np.empty(CHUNK * row, np.float32)
    later = np.zeros(end * row, np.float32)  # what reaches a state from the tokens behind it
    of_A = np.zeros(end * row, np.float32)
    zero = splat8(ZERO)
    for block in range(begin, end):
        store8(g_D, b * width + block * LANES, zero)
    for chunk in range(chunks - 1, -1, -1):
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
        sums_B[:] = ZERO
        sums_C[:] = ZERO
        for block in range(begin, end):
            kept = ((b * chunks + chunk) * blocks + block) * row
            for own in range(0, row, LANES):
                store8(states, own, load8(starts, kept + own))
            recompute(b, first, last, block, u, delta, A, B, states, decays)
            direct, of_D = load8(D, block * LANES), load8(g_D, b * width + block * LANES)
            for t in range(last - 1, first - 1, -1):
                at = (b * length + t) * width + block * LANES
                step, x, g_out = load8(steps, at), load8(us, at), load8(g_y, at)
                written, of_written, of_step = step * x, zero, zero
                to, own = (t - first) * row, block * row
                for i in range(n):
                    g = load8(later, own) + g_out * splat8(C[b, t, i])
                    store8(sums_C, to, load8(sums_C, to) + g_out * load8(states, to + row))
                    store8(sums_B, to, load8(sums_B, to) + g * written)
                    of_written = of_written + g * splat8(B[b, t, i])
                    g = g * load8(decays, to)
                    store8(later, own, g)
                    g = g * load8(states, to)  # now the gradient of delta A
                    of_step = of_step + g * load8(A, own)
                    store8(of_A, own, load8(of_A, own) + g * step)
                    to, own = to + LANES, own + LANES
                store8(g_u, at, of_written * step + g_out * direct)
                store8(g_delta, at, of_written * x + of_step * splat8(LN2))
                of_D = of_D + g_out * x
            store8(g_D, b * width + block * LANES, of_D)
        add_lanes(sums_B, last - first, g_B[group, b, first:last])
        add_lanes(sums_C, last - first, g_C[group, b, first:last])
    for own in range(begin * row, end * row, LANES):
        store8(g_A, b * blocks * row + own, load8(of_A, own))
