"""Neighbours and farthest points on the CPU: the compiled functions of `geometry.pointops`.

The chapter `11_pointops` teaches what is computed here; this file is about doing it fast. All of
it rests on one balanced k-d tree for each cloud:

1. `grow` sorts the points of a cloud into a tree. A node is cut at its median across the longest
   edge of its box, so nodes need no links: level l is a row of 2^l nodes, and node j of it holds
   the points n j / 2^l to n (j + 1) / 2^l. Each node keeps its box and its lowest row number.
2. `nearest` and `within` walk down the tree, the more promising child first. They leave out every
   node whose box is too far away.
3. `farthest` keeps in each node the largest gap of its points. A new centre changes only nodes
   whose box is nearer to it than that gap, and the root always knows the next centre.

**Exactness.** `squared` computes a distance in the precision of the points and with the roundings
of `pointops.squared_distance`. Rounding keeps order: of two numbers the larger one is not the
smaller one after a subtraction, a product or a sum. So the same arithmetic, applied to the gap
between a point and a box, never exceeds the distance to a point in the box, to the last bit. No
margin is needed. Points at equal distance are told apart by their rows, the lowest first, and
nodes by their lowest rows. So clouds with many equal points do not slow the search down.

The functions release the interpreter lock and write to memory of their own; a caller may run them
in threads, over clouds or over ranges of queries. Coordinates must be finite. A squared distance
may overflow to infinity; such a point is never a neighbour. Rows and nodes are counted in int32.
"""

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from unipre3d.kernels import cached

RULES = dict(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})
kernel = cached(**RULES)
part = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **RULES)  # only called from kernels

BLOCK = 64  # distances that are computed before any is used
LARGEST_ROW = 2**31 - 1
STACK = 64  # nodes that wait; the deepest tree of int32 points has 31 levels


@intrinsic
def fused(typingctx, a, b, c):
    "a b + c, rounded once."
    if not isinstance(a, types.Float) or a != b or a != c:
        return None

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return a(a, b, c), codegen


@part
def squared(x, y, z):
    "The squared length of a difference, rounded as torch does it."
    return fused(z, z, fused(y, y, x * x))


@part
def outside(value, low, high):
    "How far a coordinate is outside an interval."
    return max(low - value, value - high, value - value)


@part
def to_box(box, node, x, y, z):
    "The squared distance of a place to a node's box; no point in it is nearer."
    return squared(
        outside(x, box[node, 0], box[node, 3]),
        outside(y, box[node, 1], box[node, 4]),
        outside(z, box[node, 2], box[node, 5]),
    )


# ----------------------------------------------------------------------------------------- the tree


@part
def swap(table, number, i, j):
    "Exchange two points."
    for axis in range(3):
        table[axis, i], table[axis, j] = table[axis, j], table[axis, i]
    number[i], number[j] = number[j], number[i]


@part
def halve(table, number, axis, first, last, middle):
    "Reorder first..last along an axis: nothing before `middle` is beyond what comes from there on."
    key = table[axis]
    low, high = first, last - 1
    while low < high:
        a, b, c = key[low], key[(low + high) // 2], key[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while key[i] < pivot:
                i += 1
            while key[j] > pivot:
                j -= 1
            if i <= j:
                swap(table, number, i, j)
                i += 1
                j -= 1
        if middle <= j:
            high = j
        elif middle >= i:
            low = i
        else:
            return


@part
def enclose(table, number, first, last, box, lowest, node):
    "The box and the lowest number of the points first..last."
    for axis in range(3):
        low = high = table[axis, first]
        for i in range(first, last):
            value = table[axis, i]
            low = value if value < low else low
            high = value if value > high else high
        box[node, axis], box[node, 3 + axis] = low, high
    best = number[first]
    for i in range(first, last):
        best = number[i] if number[i] < best else best
    lowest[node] = best


@part
def longest(box, node):
    "The axis along which a box is longest."
    x, y, z = box[node, 3] - box[node, 0], box[node, 4] - box[node, 1], box[node, 5] - box[node, 2]
    if x >= y and x >= z:
        return 0
    return 1 if y >= z else 2


@kernel
def grow(points, table, number, box, lowest, depth):
    """Fill the tree of one cloud of n points; every node holds one or more.

    Read: `points` [n d], of which the first three columns make the tree. Written: `table` [d n] the
    columns in the order of the leaves, `number` [n] their rows, `box` [2^(depth + 1) - 1, 6] the
    lowest and highest corner of each node, `lowest` their lowest rows.
    """
    n, columns = points.shape
    for i in range(n):
        for axis in range(3):
            table[axis, i] = points[i, axis]
        number[i] = i
    for level in range(depth + 1):
        row = (1 << level) - 1
        for j in range(1 << level):
            first, last = n * j >> level, n * (j + 1) >> level
            enclose(table, number, first, last, box, lowest, row + j)
            if level < depth:
                middle = n * (2 * j + 1) >> (level + 1)
                halve(table, number, longest(box, row + j), first, last, middle)
    for axis in range(3, columns):
        for i in range(n):
            table[axis, i] = points[number[i], axis]


# --------------------------------------------------------------------------------------- neighbours


@part
def measure(query, table, first, count, gap):
    "Squared distances of `count` points from a query, all columns counted."
    qx, qy, qz = query[0], query[1], query[2]
    last = first + count
    x, y, z = table[0, first:last], table[1, first:last], table[2, first:last]
    for i in range(count):
        gap[i] = squared(x[i] - qx, y[i] - qy, z[i] - qz)
    for axis in range(3, len(query)):
        for i in range(count):
            step = table[axis, first + i] - query[axis]
            gap[i] = fused(step, step, gap[i])


@part
def keep(near, rows, held, d2, row):
    "Insert a point into the sorted neighbours, of which `held` are filled; the last one drops out."
    i = min(held, len(rows) - 1)
    while i > 0 and (near[i - 1] > d2 or (near[i - 1] == d2 and rows[i - 1] > row)):
        near[i], rows[i] = near[i - 1], rows[i - 1]
        i -= 1
    near[i], rows[i] = d2, row


@part
def search(query, table, number, box, lowest, depth, near, rows, gap, nodes, bounds):
    "Fill the nearest points, sorted by distance and then by row; returns how many there are."
    n, k = len(number), len(rows)
    x, y, z = query[0], query[1], query[2]
    held = 0
    worst, last_row = np.inf, -1  # a point must come before this
    leaves = (1 << depth) - 1
    node, bound, waiting = 0, to_box(box, 0, x, y, z), 0
    while True:
        if bound < worst or (bound == worst and lowest[node] < last_row):
            if node < leaves:
                left, right = 2 * node + 1, 2 * node + 2
                to_left, to_right = to_box(box, left, x, y, z), to_box(box, right, x, y, z)
                if to_right < to_left or (to_right == to_left and lowest[right] < lowest[left]):
                    left, right, to_left, to_right = right, left, to_right, to_left
                if to_right <= worst:
                    nodes[waiting], bounds[waiting] = right, to_right
                    waiting += 1
                node, bound = left, to_left
                continue
            j = node - leaves
            stop = n * (j + 1) >> depth
            for first in range(n * j >> depth, stop, BLOCK):
                count = min(BLOCK, stop - first)
                measure(query, table, first, count, gap)
                for i in range(count):
                    d2 = gap[i]
                    if d2 <= worst:
                        row = number[first + i]
                        if d2 < worst or row < last_row:
                            keep(near, rows, held, d2, row)
                            held = min(held + 1, k)
                            if held == k:
                                worst, last_row = near[k - 1], rows[k - 1]
        if waiting == 0:
            return held
        waiting -= 1
        node, bound = nodes[waiting], bounds[waiting]


@kernel
def nearest(queries, chosen, table, number, box, lowest, depth, start, out):
    """The nearest points of the queries `chosen`, as rows of `out` [m k].

    `start` is added to the row numbers. Where a cloud has too few points the nearest is repeated.
    """
    k = out.shape[1]
    near, gap = np.empty(k, table.dtype), np.empty(BLOCK, table.dtype)
    rows = np.empty(k, np.int32)
    nodes, bounds = np.empty(STACK, np.int32), np.empty(STACK, table.dtype)
    for q in chosen:
        tree = table, number, box, lowest, depth
        held = search(queries[q], *tree, near, rows, gap, nodes, bounds)
        if held == 0:
            rows[0] = lowest[0]
        for i in range(k):
            out[q, i] = start + rows[i if i < held else 0]


@part
def collect(query, table, number, first, last, from_row, radius2, near, rows, held, gap):
    """Insert those of the points first..last that are nearer than a radius into the sorted rows.

    Rows before `from_row` do not count. Returns how many there are now.
    """
    for block in range(first, last, BLOCK):
        count = min(BLOCK, last - block)
        measure(query, table, block, count, gap)
        for i in range(count):
            row = number[block + i]
            if gap[i] < radius2 and row >= from_row and (held < len(rows) or row < rows[-1]):
                keep(near, rows, held, near[0], row)
                held = min(held + 1, len(rows))
    return held


@kernel
def within(
    queries, chosen, radius2, head, table, number, box, lowest, depth, start, out
):
    """The points nearer than a radius to the queries `chosen`, the lowest rows first.

    `head` [d h] holds the first points in the order of their rows. They alone often fill a ball
    with many points; a ball with few points meets few nodes. The rest of a row of `out` [m k]
    repeats its first point; where there is none it is the nearest point.
    """
    n, k = len(number), out.shape[1]
    ahead = head.shape[1]
    in_order = np.arange(ahead).astype(np.int32)
    near, gap = np.zeros(k, table.dtype), np.empty(BLOCK, table.dtype)
    rows = np.empty(k, np.int32)
    nodes, bounds = np.empty(STACK, np.int32), np.empty(STACK, table.dtype)
    leaves = (1 << depth) - 1
    for q in chosen:
        query = queries[q]
        held, waiting = 0, 0
        for block in range(0, ahead, BLOCK):
            stop = min(block + BLOCK, ahead)
            if held < k:
                held = collect(
                    query, head, in_order, block, stop, 0, radius2, near, rows, held, gap
                )
        if held < k and ahead < n:
            nodes[0], waiting = 0, 1
        while waiting > 0:
            waiting -= 1
            node = nodes[waiting]
            if held == k and lowest[node] >= rows[k - 1]:
                continue
            if not to_box(box, node, query[0], query[1], query[2]) < radius2:
                continue
            if node < leaves:
                left, right = 2 * node + 1, 2 * node + 2
                if lowest[left] < lowest[right]:
                    left, right = right, left
                nodes[waiting], nodes[waiting + 1] = left, right
                waiting += 2
            else:
                j = node - leaves
                ends = n * j >> depth, n * (j + 1) >> depth
                held = collect(query, table, number, *ends, ahead, radius2, near, rows, held, gap)
        if held == 0:
            tree = table, number, box, lowest, depth
            if search(query, *tree, near[:1].copy(), rows[:1], gap, nodes, bounds) == 0:
                rows[0] = lowest[0]
        for i in range(k):
            out[q, i] = start + rows[i if i < held else 0]


# ---------------------------------------------------------------------------------- farthest points


@part
def largest(gap, number, first, last):
    "Place of the largest gap among first..last; of several the one with the lowest row."
    here, rows = gap[first:last], number[first:last]
    top = here[0]
    for i in range(len(here)):
        top = here[i] if here[i] > top else top
    lowest = np.int32(LARGEST_ROW)
    for i in range(len(here)):
        row = rows[i] if here[i] == top else np.int32(LARGEST_ROW)
        lowest = row if row < lowest else lowest
    best = 0
    while rows[best] != lowest:
        best += 1
    return first + best


@part
def better(gap, number, a, b):
    "Of two places the one with the larger gap, or else the lower row."
    if gap[a] > gap[b] or (gap[a] == gap[b] and number[a] < number[b]):
        return a
    return b


@part
def shorten(table, gap, first, last, px, py, pz):
    "Lower the gaps of the points first..last to their squared distances from a place."
    here = gap[first:last]
    x, y, z = table[0, first:last], table[1, first:last], table[2, first:last]
    for i in range(len(here)):
        d2 = squared(x[i] - px, y[i] - py, z[i] - pz)
        here[i] = d2 if d2 < here[i] else here[i]


@kernel
def farthest(table, number, box, lowest, depth, start, out):
    """Farthest points of one cloud, from its row 0 on, into `out`; not more than there are points.

    `start` is added to the row numbers.
    """
    n = len(number)
    leaves = (1 << depth) - 1
    gap = np.full(n, np.inf, table.dtype)
    best = np.empty(2 * leaves + 1, np.int32)  # of each node: the place of its largest gap
    top = np.full(2 * leaves + 1, np.inf, table.dtype)  # and that gap
    nodes, changed = np.empty(STACK, np.int32), np.empty(2 * leaves + 1, np.int32)
    for node in range(2 * leaves, -1, -1):
        if node < leaves:
            best[node] = better(gap, number, best[2 * node + 1], best[2 * node + 2])
        else:
            j = node - leaves
            best[node] = largest(gap, number, n * j >> depth, n * (j + 1) >> depth)
    for taken in range(len(out)):
        newest = best[0]
        out[taken] = start + number[newest]
        x, y, z = table[0, newest], table[1, newest], table[2, newest]
        gap[newest] = -1  # a point is taken once
        node = leaves + (((newest + 1) << depth) - 1) // n
        while node > 0:
            top[node] = np.inf  # its way to the root must be followed
            node = (node - 1) // 2
        top[0] = np.inf
        nodes[0] = 0
        waiting, count = 1, 0
        while waiting > 0:
            waiting -= 1
            node = nodes[waiting]
            if to_box(box, node, x, y, z) < top[node]:
                changed[count] = node
                count += 1
                if node < leaves:
                    nodes[waiting], nodes[waiting + 1] = 2 * node + 1, 2 * node + 2
                    waiting += 2
        for c in range(count - 1, -1, -1):
            node = changed[c]
            if node < leaves:
                best[node] = better(gap, number, best[2 * node + 1], best[2 * node + 2])
            else:
                j = node - leaves
                first, last = n * j >> depth, n * (j + 1) >> depth
                shorten(table, gap, first, last, x, y, z)
                best[node] = largest(gap, number, first, last)
            top[node] = gap[best[node]]
