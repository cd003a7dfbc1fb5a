"""Maxima of groups on the CPU: the compiled functions of `unipre3d.backbones.layers`, forward and backward.

The chapter `39_layers` teaches what is computed here; this file is about doing it fast.

1. `share` makes the gradient of a maximum over each group. Rows that reach it get equal parts.
2. `rise` finds the maximum and its row, the first where several reach it; a NaN wins.
3. `follow` and `collect` make the gradients of a linear map whose rows were only needed for their maximum:
   one row of each group and column has a gradient, so there is little to do.

Every function works on a block of groups, first .. last, writes to memory of its own and releases the interpreter
lock, so a caller may run them in threads.
"""

import numpy as np

from unipre3d.kernels import cached

kernel = cached(nogil=True, error_model="numpy")


@kernel
def share(block, first, last, x, top, grad, out):
    "out [m k c]: the gradient grad [m c] of the maxima top [m c] of x [m k c]."
    size, width = x.shape[1:]
    count = np.empty(width, x.dtype)
    for group in range(first, last):
        count[:] = 0
        for row in range(size):
            for i in range(width):
                count[i] += x[group, row, i] == top[group, i]
        for i in range(width):
            count[i] = grad[group, i] / count[i]
        for row in range(size):
            for i in range(width):
                hit = x.dtype.type(x[group, row, i] == top[group, i])
                out[group, row, i] = hit * count[i]


@kernel
def rise(block, first, last, x, top, row):
    "The maximum top [m c] of groups of x [m k c], and its row [m c]."
    size, width = x.shape[1:]
    for group in range(first, last):
        for i in range(width):
            top[group, i] = x[group, 0, i]
            row[group, i] = 0
        for k in range(1, size):
            for i in range(width):
                value = x[group, k, i]
                if value > top[group, i] or value != value:
                    top[group, i] = value
                    row[group, i] = k


@kernel
def follow(block, first, last, grad, row, weight, out):
    "out [m k d]: the gradient of the rows of a map weight [c d], of which grad [m c] reaches row [m c]."
    width, inner = weight.shape
    for group in range(first, last):
        out[group] = 0
        for i in range(width):
            k, value = row[group, i], grad[group, i]
            for j in range(inner):
                out[group, k, j] += value * weight[i, j]


@kernel
def collect(block, first, last, grad, row, x, out):
    "out[block] [c d]: the gradient of that map from some groups of its input x [m k d]."
    _, width, inner = out.shape
    out[block] = 0
    for group in range(first, last):
        for i in range(width):
            k, value = row[group, i], grad[group, i]
            for j in range(inner):
                out[block, i, j] += value * x[group, k, j]
