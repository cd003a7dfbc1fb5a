"""Sparse convolution on the CPU: the compiled functions of `unipre3d.geometry.sparse`, forward and backward.

The chapter `13_sparse` teaches what is computed here; this file is about doing it fast. A rulebook lists
pairs of an input row and an output row, sorted by blocks of output rows and, within a block, by the offset
of the window. All pairs of one offset share one matrix.

1. `convolve` makes one block: six pairs at a time are multiplied with sixteen columns of their matrix. The
   rows are read where they lie, the sums stay in registers, and are then added to the block's own output.
2. `weight_gradient` makes the matrices of all offsets over some blocks: six rows of a matrix by sixteen
   columns. The pairs are gathered a few at a time, so that all of the matrix reads them from the nearest cache.

Before that, `fill_table` and `cut_table` make the rulebook.

Six by sixteen fills the registers of a processor with vectors of 256 bits, and is most of what one with 512
bits can do. All functions release the interpreter lock and write to memory of their own, in one order, so a
caller may run them in threads; results do not depend on the threads.
"""

import numpy as np

from unipre3d.kernels.splat import kernel, part, vectors

f32 = np.float32
WIDE = 16  # columns of a matrix that are worked on together
HIGH = 6  # and rows
NEAR = 6144  # floats that stay in the nearest cache


(load16, store16, splat16, spread16), _ = vectors(WIDE, 32)
ZERO = f32(0.0)


@part
def zero16():
    "Sixteen zeros."
    return splat16(ZERO)


@part
def add16(array, index, value):
    "array[index : index + 16] += value"
    store16(array, index, load16(array, index) + value)


@kernel
def fill_table(number, step, down, kernel, table):
    """For each cell and offset of the window, the place of the cell that lies there, or -1: table [k n].

    number [n] rising; from one cell to the next along the first axis it grows by `step`, along the second by
    `down`, along the third by one.
    """
    n = len(number)
    for a in range(kernel[0]):
        for b in range(kernel[1]):
            line = a * kernel[1] + b
            shift = (a - kernel[0] // 2) * step + (b - kernel[1] // 2) * down - kernel[2] // 2
            place = 0
            for i in range(n):
                want = number[i] + shift
                while place < n and number[place] < want:
                    place += 1
                here = place
                for c in range(kernel[2]):
                    found = here < n and number[here] == want + c
                    table[line * kernel[2] + c, i] = here if found else -1
                    if found:
                        here += 1


@kernel
def cut_table(table, side, src, dst, counts, order, start):
    """The pairs of a table [k m] in blocks of `side` columns, by offset within a block.

    Written: src, dst [p] row and column of each pair, counts [blocks k]; within each block `order` [p], its pairs
    by column, and `start` [m], where in it a column begins.
    """
    p = 0
    cursor = np.empty(side, np.int32)
    for block in range(len(counts)):
        first, last = block * side, min((block + 1) * side, table.shape[1])
        begin = p
        cursor[:] = 0
        for offset in range(len(table)):
            before = p
            for i in range(first, last):
                if table[offset, i] >= 0:
                    src[p], dst[p] = table[offset, i], i
                    cursor[i - first] += 1
                    p += 1
            counts[block, offset] = p - before
        total = 0
        for i in range(first, last):
            start[i] = total
            total += cursor[i - first]
            cursor[i - first] = start[i]
        for q in range(begin, p):
            order[begin + cursor[dst[q] - first]] = q - begin
            cursor[dst[q] - first] += 1


@kernel
def convolve(block, feat, weight, src, dst, pieces, edges, rows, out):
    """Output rows of one block: the sum of feat[src] weight[offset] over the pairs that end in each.

    feat [n c], weight [k c wide] with zeros up to a multiple of 16 columns; src, dst [p] places of the pairs,
    those of offset k from pieces[block, k] to pieces[block, k + 1]. The block makes places edges[block] to
    edges[block + 1]; place i is row rows[i] of out [m o].
    """
    count, c_in, wide = weight.shape
    first, last = edges[block], edges[block + 1]
    feat, weight = feat.reshape(-1), weight.reshape(-1)
    sums = np.zeros((last - first) * wide, np.float32)
    for offset in range(count):
        end = pieces[block, offset + 1]
        for p in range(pieces[block, offset], end, HIGH):
            # beyond the end the last pair is worked on again, and not added
            p1, p2, p3 = min(p + 1, end - 1), min(p + 2, end - 1), min(p + 3, end - 1)
            p4, p5 = min(p + 4, end - 1), min(p + 5, end - 1)
            r0, r1, r2 = src[p] * c_in, src[p1] * c_in, src[p2] * c_in
            r3, r4, r5 = src[p3] * c_in, src[p4] * c_in, src[p5] * c_in
            for column in range(0, wide, WIDE):
                a0, a1, a2, a3, a4, a5 = zero16(), zero16(), zero16(), zero16(), zero16(), zero16()
                at = offset * c_in * wide + column
                for c in range(c_in):
                    w = load16(weight, at)
                    a0 = a0 + spread16(feat, r0 + c) * w
                    a1 = a1 + spread16(feat, r1 + c) * w
                    a2 = a2 + spread16(feat, r2 + c) * w
                    a3 = a3 + spread16(feat, r3 + c) * w
                    a4 = a4 + spread16(feat, r4 + c) * w
                    a5 = a5 + spread16(feat, r5 + c) * w
                    at += wide
                add16(sums, (dst[p] - first) * wide + column, a0)
                if p + 1 < end:
                    add16(sums, (dst[p1] - first) * wide + column, a1)
                if p + 2 < end:
                    add16(sums, (dst[p2] - first) * wide + column, a2)
                if p + 3 < end:
                    add16(sums, (dst[p3] - first) * wide + column, a3)
                if p + 4 < end:
                    add16(sums, (dst[p4] - first) * wide + column, a4)
                if p + 5 < end:
                    add16(sums, (dst[p5] - first) * wide + column, a5)
    for i in range(first, last):
        row = rows[i]
        for column in range(out.shape[1]):
            out[row, column] = sums[(i - first) * wide + column]


@part
def copy_rows(array, places, first, last, out):
    "Rows array[places[first .. last]], one after the other."
    width = array.shape[1]
    to = 0
    for p in range(first, last):
        row = places[p]
        for i in range(width):
            out[to + i] = array[row, i]
        to += width


@part
def add_products(x, g, rows, c_in, wide, own):
    "own [c wide] += x' g, with x [rows c], g [rows wide]."
    for c in range(0, c_in, HIGH):
        # beyond the end the last row is worked on again, and not added
        c1, c2, c3 = min(c + 1, c_in - 1), min(c + 2, c_in - 1), min(c + 3, c_in - 1)
        c4, c5 = min(c + 4, c_in - 1), min(c + 5, c_in - 1)
        for column in range(0, wide, WIDE):
            a0, a1, a2, a3, a4, a5 = zero16(), zero16(), zero16(), zero16(), zero16(), zero16()
            row, at = 0, column
            for _ in range(rows):
                w = load16(g, at)
                a0 = a0 + spread16(x, row + c) * w
                a1 = a1 + spread16(x, row + c1) * w
                a2 = a2 + spread16(x, row + c2) * w
                a3 = a3 + spread16(x, row + c3) * w
                a4 = a4 + spread16(x, row + c4) * w
                a5 = a5 + spread16(x, row + c5) * w
                row, at = row + c_in, at + wide
            at = c * wide + column
            add16(own, at, a0)
            if c + 1 < c_in:
                add16(own, at + wide, a1)
            if c + 2 < c_in:
                add16(own, at + 2 * wide, a2)
            if c + 3 < c_in:
                add16(own, at + 3 * wide, a3)
            if c + 4 < c_in:
                add16(own, at + 4 * wide, a4)
            if c + 5 < c_in:
                add16(own, at + 5 * wide, a5)


@kernel
def weight_gradient(begin, end, mirror, feat, grad, src, dst, pieces, out):
    """The sum of feat[dst] grad[src] over the pairs of each offset, for blocks begin .. end of a reversed book.

    feat [n c]; grad [m wide] and out [k c wide] with zeros up to a multiple of 16 columns. `mirror`: the book
    counts offsets from the end.
    """
    c_in, wide = feat.shape[1], grad.shape[1]
    count = len(out)
    out[:] = f32(0.0)
    many = max(16, min(256, NEAR // (c_in + wide)))
    x, g = np.empty(many * c_in, np.float32), np.empty(many * wide, np.float32)
    for block in range(begin, end):
        for offset in range(count):
            own = out[count - 1 - offset if mirror else offset].reshape(-1)
            stop = pieces[block, offset + 1]
            for first in range(pieces[block, offset], stop, many):
                last = min(first + many, stop)
                copy_rows(feat, dst, first, last, x)
                copy_rows(grad, src, first, last, g)
                add_products(x, g, last - first, c_in, wide, own)
