"""Gaussian splatting on the CPU: every compiled function of `unipre3d.render`, forward and backward.

The chapter `52_render` teaches what is computed here; this file is about doing it fast. The plan:

1. `project` turns the Gaussians of one view into 2-D ones and drops those that cannot reach a pixel, most
   of them eight at a time (`candidates`); `settle` sorts them by depth. Their arithmetic is float64.
2. `strip_lists` says for every column of 8 pixels which Gaussians touch it, front to back, and in
   which rows exactly.
3. `draw` walks over tiles of 8 x 64 pixels. Its inner loop, `blend`, adds one Gaussian to one row of
   8 pixels at a time, or to two rows where registers hold sixteen floats. It is written with explicit
   vectors (`vectors` below). A compiler that finds vectors by itself may stop to do so unnoticed, and
   scalar code is many times slower. What all pixels of a row share is worked out before, for `BATCH`
   Gaussians at a time (`preparing`), so that the loop has few operations and no sum that runs down the rows.
   A pass draws four channels; more of them take several passes.
4. `draw_backward` replays the same loop front to back and keeps what is still to come along each ray.
   Nothing but the images is needed from the forward pass, and there is no division by the
   transmittance. It leaves ten sums for each Gaussian and view.
5. `project_backward` takes these sums back to means, quaternions, scales (or covariances), opacities,
   harmonics and cameras.

Nothing that is handed in may make these functions touch memory that is not theirs. `project` keeps a
Gaussian only if all that is computed from it is finite and within the limits below. Every comparison
that decides about an index is written so that NaN is refused (`not x >= low`, never `x < low`). No
number becomes an index before it is held between the ends of its range. With NUMBA_BOUNDSCHECK=1 also
the vector loads and stores are checked; `tests/test_render_fuzz.py` runs all of it that way.

All functions release the interpreter lock and write to memory of their own, so a caller may run them in
threads: `project` over (view, range of Gaussians), `settle` and `add_rows` over views, `draw*` over (view,
strip of columns), `project_backward` over ranges of Gaussians. Results do not depend on the threads.
All kernels live in one file because the on-disk cache does not see edits to a callee in another one.
"""

import functools
import math
import operator

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, float64, njit, types
from numba.extending import intrinsic, models, overload, register_model

from unipre3d.kernels import cached

f32, u64 = np.float32, np.uint64

TILE_W, TILE_H = 8, 64  # pixels of a tile
WIDE = llvm.get_host_cpu_features().get("avx512f", False) and not config.CPU_NAME
LANES = 16 if WIDE else 8  # floats of a vector: one or two rows of a tile
PAIR = LANES // TILE_W
BAND = 6 * LANES  # floats of PAIR rows in the working buffer: six images
N_REC, N_SUM = 11, 10  # numbers that describe a 2-D Gaussian; sums that its backward leaves
CHANNELS = 4  # of one pass
CHUNK = 4096  # Gaussians of one job of `project`
GROUP = 8  # Gaussians of which `candidates` finds at once whether a view may show them
BLOCK = 256  # Gaussians of which those that a view may show are found at once
MOST_SH = 25  # spherical harmonics of degree 4
BATCH = 16  # Gaussians of a tile that are prepared at once; with one a tile ends if all its pixels are dark

LOG2_255 = math.log2(255.0)
HALF_LOG2E = 0.5 / math.log(2.0)  # sigma = d' inv(cov) d / 2, in bits
LN4 = 2.0 * math.log(2.0)
WIDEST = 2.02 * math.log(255.0)  # squared reach (standard deviations) at opacity 1, with some room
MARGIN = 1.0 + 1e-5  # extents are enlarged by this much: rounding never drops a pixel

# Limits of what is drawn: the products of the backward pass stay within float32, and no scene comes
# near them.
LARGEST_VARIANCE = 1e30  # of an ellipse along an image axis, squared pixels
BRIGHTEST = 1e25  # largest colour
FARTHEST = 1e25  # largest depth
SHORTEST_QUAT = 1e-12  # a quaternion shorter than this has no direction
SAFE = 1e-6  # a c - b^2 is a plain difference down to this fraction of a c
LARGEST = float(np.finfo(np.float32).max)

ZERO = f32(0.0)
TINY = f32(1e-10)
ALPHA_MAX = 0.999
LOG2_CAP = math.log2(ALPHA_MAX) - 1e-5  # an opacity below has no alpha that reaches the largest
T_MIN = 1e-4
EXP2 = (
    1.000000000e00,
    6.931470037e-01,
    2.402224690e-01,
    5.550711229e-02,
    9.671294130e-03,
    1.326940721e-03,
)  # 2^x on [-1/2, 1/2]: relative error 9.4e-8, with its rounding 1.5e-7
# where `table` keeps pixel centres, 2^x, what rounds, the largest alpha, log2 of the smallest, the light of a
# finished pixel, and the rows of a tile
POWER, ROUND, CAP, FAINT = LANES, 7 * LANES, 8 * LANES, 9 * LANES
DARK, ROW = 10 * LANES, 11 * LANES
# where the terms of each row of an ellipse are kept, TILE_H floats of each
RISE, FALL, DOWN, SQUARE = 0, TILE_H, 2 * TILE_H, 3 * TILE_H

# real spherical harmonics up to degree 4
S0 = math.sqrt(1 / (4 * math.pi))
S1 = math.sqrt(3 / (4 * math.pi))
S2A = math.sqrt(15 / (4 * math.pi))
S2B = math.sqrt(5 / (16 * math.pi))
S2C = math.sqrt(15 / (16 * math.pi))
S3A = math.sqrt(35 / (32 * math.pi))
S3B = math.sqrt(105 / (4 * math.pi))
S3C = math.sqrt(21 / (32 * math.pi))
S3D = math.sqrt(7 / (16 * math.pi))
S3E = math.sqrt(105 / (16 * math.pi))
S4A = 0.75 * math.sqrt(35 / math.pi)
S4B = 0.75 * math.sqrt(35 / (2 * math.pi))
S4C = 0.75 * math.sqrt(5 / math.pi)
S4D = 0.75 * math.sqrt(5 / (2 * math.pi))
S4E = 0.1875 / math.sqrt(math.pi)

RULES = dict(nogil=True, error_model="numpy", fastmath={"contract"})
kernel = cached(**RULES)
INSIDE = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **RULES)
part = njit(
    **INSIDE
)  # only called from kernels; a call that is left would pass vectors through memory


# ------------------------------------------------------------------------------- vectors of floats


FUSE = ("contract",)  # a product and a sum may become one instruction


@functools.cache
def vector_type(lanes, digits):
    "A vector register of so many floats with so many binary digits, for numba and for LLVM."
    kind = ir.VectorType({32: ir.FloatType(), 64: ir.DoubleType()}[digits], lanes)

    class Vector(types.Type):
        def __init__(self):
            super().__init__(name=f"float{digits} x {lanes}")

    @register_model(Vector)
    class VectorModel(models.PrimitiveModel):
        def __init__(self, manager, of):
            super().__init__(manager, of, kind)

    return Vector(), kind


@functools.cache
def vectors(lanes, digits):
    """Operations on a vector register of so many floats; arithmetic works on it, too.

    With 64 binary digits also that between a vector and a number. A processor whose registers are narrower
    takes several of them.
    """
    vector, kind = vector_type(lanes, digits)
    whole_kind = ir.VectorType(ir.IntType(digits), lanes)
    mask_kind = ir.VectorType(ir.IntType(32), lanes)
    number = types.Float(f"float{digits}")

    def constant(value, of=kind):
        return ir.Constant(of, [value] * lanes)

    def pointer(context, builder, signature, args):
        "Address of array[index] as a vector pointer."
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.bitcast(builder.gep(array.data, [args[1]]), kind.as_pointer())

    @intrinsic
    def read(typing, array, index):
        "array[index : index + lanes] of a contiguous array of such floats."

        def code(context, builder, signature, args):
            return builder.load(pointer(context, builder, signature, args), align=digits // 8)

        return vector(array, index), code

    @intrinsic
    def write(typing, array, index, value):
        "array[index : index + lanes] = value"

        def code(context, builder, signature, args):
            builder.store(args[2], pointer(context, builder, signature, args), align=digits // 8)
            return context.get_dummy_value()

        return types.void(array, index, value), code

    load, store = read, write
    if config.BOUNDSCHECK:

        @part
        def load(array, index):
            "`read` that refuses what lies outside the array."
            if not (index >= 0 and index + lanes <= len(array)):
                raise IndexError("load: outside the array")
            return read(array, index)

        @part
        def store(array, index, value):
            "`write` that refuses what lies outside the array."
            if not (index >= 0 and index + lanes <= len(array)):
                raise IndexError("store: outside the array")
            write(array, index, value)

    def everywhere(builder, value):
        "A number in all places."
        nothing = ir.Constant(kind, ir.Undefined)
        one = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, nothing, constant(0, mask_kind))

    @intrinsic
    def splat(typing, value):
        "One number in all places."

        def code(context, builder, signature, args):
            return everywhere(builder, args[0])

        return vector(number), code

    @intrinsic
    def spread(typing, array, index):
        "array[index] of a contiguous float32 array in all places."

        def code(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            return everywhere(builder, builder.load(builder.gep(data, [args[1]])))

        return vector(array, index), code

    def of_one(code):
        "An operation on one vector, whose instructions are `code(builder, a)`."

        @intrinsic
        def apply(typing, a):
            return vector(a), lambda context, builder, signature, args: code(builder, *args)

        return apply

    def of_two(code):
        "An operation on two vectors, whose instructions are `code(builder, a, b)`."

        @intrinsic
        def apply(typing, a, b):
            return vector(a, b), lambda context, builder, signature, args: code(builder, *args)

        return apply

    def arithmetic(op, name):
        "Teach the compiler `op` between two vectors."
        apply = of_two(lambda builder, a, b: getattr(builder, name)(a, b, flags=FUSE))

        @overload(op, jit_options=INSIDE)
        def implementation(a, b):
            if a is vector and b is vector:
                return lambda a, b: apply(a, b)
            if digits == 64 and a is vector and isinstance(b, types.Number):
                return lambda a, b: apply(a, splat(float64(b)))
            if digits == 64 and b is vector and isinstance(a, types.Number):
                return lambda a, b: apply(splat(float64(a)), b)

    arithmetic(operator.add, "fadd")
    arithmetic(operator.sub, "fsub")
    arithmetic(operator.mul, "fmul")
    arithmetic(operator.truediv, "fdiv")

    @intrinsic
    def pick(typing, a, b, yes, no):
        "yes where a >= b, else no"

        def code(context, builder, signature, args):
            return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], args[3])

        return vector(a, b, yes, no), code

    @intrinsic
    def below(typing, a, b, yes, no):
        "yes where a < b or one of them is NaN, else no"

        def code(context, builder, signature, args):
            return builder.select(builder.fcmp_unordered("<", args[0], args[1]), args[2], args[3])

        return vector(a, b, yes, no), code

    @intrinsic
    def keep(typing, a, b, value):
        "value where a >= b, else 0"

        def code(context, builder, signature, args):
            chosen = builder.fcmp_ordered(">=", args[0], args[1])
            return builder.select(chosen, args[2], constant(0.0))

        return vector(a, b, value), code

    @of_two
    def smaller(builder, a, b):
        "The smaller of the two."
        return builder.select(builder.fcmp_ordered("<", a, b), a, b)

    @of_two
    def larger(builder, a, b):
        "The larger of the two; b where one is NaN."
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    @of_one
    def size(builder, a):
        "|a|"
        rest = constant(2 ** (digits - 1) - 1, whole_kind)
        return builder.bitcast(builder.and_(builder.bitcast(a, whole_kind), rest), kind)

    @of_one
    def dead(builder, a):
        "-|a|"
        sign = constant(-(2 ** (digits - 1)), whole_kind)
        return builder.bitcast(builder.or_(builder.bitcast(a, whole_kind), sign), kind)

    @intrinsic
    def any_alive(typing, a):
        "Is any of them without a minus sign?"

        def code(context, builder, signature, args):
            bits = builder.bitcast(args[0], whole_kind)
            mask = builder.icmp_signed(">=", bits, constant(0, whole_kind))
            number = ir.IntType(lanes)
            return builder.icmp_unsigned(
                "!=", builder.bitcast(mask, number), ir.Constant(number, 0)
            )

        return types.boolean(a), code

    def each(name):
        "What LLVM calls by this name, of every number of a vector."

        @of_one
        def apply(builder, a):
            of_many = ir.FunctionType(kind, [kind])
            full_name = f"llvm.{name}.v{lanes}f{digits}"
            return builder.call(builder.module.declare_intrinsic(full_name, (), of_many), [a])

        return apply

    @of_two
    def raised(builder, a, power):
        "a * 2^n, where n stands in the last bits of `power`, for what leaves a normal number."
        up = builder.shl(builder.bitcast(power, whole_kind), constant(23, whole_kind))
        return builder.bitcast(builder.add(up, builder.bitcast(a, whole_kind)), kind)

    @of_two
    def scale(builder, a, power):
        "a * 2^power for whole numbers in `power` that leave a normal number."
        up = builder.shl(builder.fptosi(power, whole_kind), constant(23, whole_kind))
        return builder.bitcast(builder.add(up, builder.bitcast(a, whole_kind)), kind)

    @of_two
    def add_pairs(builder, a, b):
        "Sums of neighbours: first those of a, then those of b."
        even = ir.Constant(mask_kind, list(range(0, 2 * lanes, 2)))
        odd = ir.Constant(mask_kind, list(range(1, 2 * lanes, 2)))
        return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))

    @intrinsic
    def unless(typing, a, b, value):
        "0 where a > b, else value"

        def code(context, builder, signature, args):
            chosen = builder.fcmp_ordered(">", args[0], args[1])
            return builder.select(chosen, constant(0.0), args[2])

        return vector(a, b, value), code

    memory = load, store, splat, spread
    bits = size, dead, any_alive, raised, scale
    others = each("sqrt"), each("floor"), each("ceil")
    return memory, (pick, below, keep, unless, smaller, larger, *bits, add_pairs, *others)


(load8, store8, splat8, _), (_, _, _, _, min8, max8, _, _, _, _, scale8, *_) = vectors(8, 32)
(load64, store64, all64, _), several = vectors(GROUP, 64)
_, _, keep64, unless64, min64, max64, *_, sqrt64, floor64, ceil64 = several
(load, store, all_of, spread_one), several = vectors(LANES, 32)
pick, below, keep, _, smaller, _, size, dead, any_alive, raised, _, add_pairs, *_ = several


def row_lanes(row):
    "Which places of a vector hold the pixels of a row of its band."
    return ir.Constant(ir.VectorType(ir.IntType(32), TILE_W), list(range(row, LANES, PAIR)))


def row_of(row):
    "The eight pixels of this row of a band."
    (eight, _), (wide, kind) = vector_type(TILE_W, 32), vector_type(LANES, 32)

    @intrinsic
    def apply(typing, a):
        def code(context, builder, signature, args):
            return builder.shuffle_vector(args[0], ir.Constant(kind, ir.Undefined), row_lanes(row))

        return eight(a), code

    return apply


@intrinsic
def band_of(typing, upper, lower):
    "Two rows of eight pixels, those of a column side by side."
    order = [place for pixel in range(TILE_W) for place in (pixel, pixel + TILE_W)]
    mask = ir.Constant(ir.VectorType(ir.IntType(32), 2 * TILE_W), order)

    def code(context, builder, signature, args):
        return builder.shuffle_vector(*args, mask)

    return vector_type(2 * TILE_W, 32)[0](upper, lower), code


@intrinsic
def cycle_two(typing, array, index):
    "array[index], array[index + 1] of a contiguous float32 array, again and again."
    wide, kind = vector_type(LANES, 32)
    two = ir.VectorType(ir.FloatType(), 2)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0, 1] * (LANES // 2))

    def code(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), two.as_pointer())
        pair = builder.load(place, align=4)
        return builder.shuffle_vector(pair, ir.Constant(two, ir.Undefined), mask)

    return wide(array, index), code


cycle = cycle_two if PAIR == 2 else spread_one
if config.BOUNDSCHECK:
    unchecked = cycle

    @part
    def cycle(array, index):
        "What repeats a number for each row, and refuses what lies outside the array."
        if not (index >= 0 and index + PAIR <= len(array)):
            raise IndexError("cycle: outside the array")
        return unchecked(array, index)


if PAIR == 2:
    top_row, bottom_row = row_of(0), row_of(1)

    @part
    def put(image, at, wide, both, value):
        "Write the rows of a band to an image of this width; the lower one only with `both`."
        store8(image, at, top_row(value))
        if both:
            store8(image, at + wide, bottom_row(value))

    @part
    def take(image, at, wide, both):
        "A band of an image of this width; without `both` the lower row is zero."
        below = splat8(ZERO)
        if both:
            below = load8(image, at + wide)
        return band_of(load8(image, at), below)

    @part
    def full_light(both):
        "Light of a band that nothing covers; a row that is not there takes none."
        return band_of(splat8(f32(1.0)), splat8(f32(1.0) if both else f32(-1.0)))

else:

    @part
    def put(image, at, wide, both, value):
        "Write a row of eight pixels to an image."
        store(image, at, value)

    @part
    def take(image, at, wide, both):
        "A row of eight pixels of an image."
        return load(image, at)

    @part
    def full_light(both):
        "Light of a row that nothing covers."
        return all_of(f32(1.0))


def table():
    """Constants of the inner loops, LANES of each: read from memory they cost no instruction of their own.

    Pixel centres; `EXP2`; a number that rounds what is added to it; the largest alpha, the log2 of the smallest,
    the light of a finished pixel; the numbers of the rows of a tile.
    """
    rounding = 1.5 * 2**23
    numbers = [*EXP2, rounding, ALPHA_MAX, -LOG2_255, np.nextafter(f32(T_MIN), f32(1))]
    centres = np.arange(LANES) // PAIR + 0.5
    whole = aligned(LANES * (1 + len(numbers)) + TILE_H)
    whole[:] = np.concatenate([centres, np.repeat(numbers, LANES), np.arange(TILE_H)])
    return whole


@kernel
def aligned(n):
    "Room for so many floats that begins where a line of the cache does: no vector of them lies in two."
    room = np.empty(n + 16, np.float32)
    skip = -room.ctypes.data % 64 // 4
    return room[skip : skip + n]


@part
def exp2(a, C):
    "2^a for -126 < a < 128: a whole number goes into the exponent, a polynomial gives the rest."
    shifted = a + load(C, ROUND)
    x = a - (shifted - load(C, ROUND))
    p = load(C, POWER + 5 * LANES) * x + load(C, POWER + 4 * LANES)
    p = p * x + load(C, POWER + 3 * LANES)
    p = p * x + load(C, POWER + 2 * LANES)
    p = p * x + load(C, POWER + LANES)
    return raised(p * x + load(C, POWER), shifted)


# ------------------------------------------------------------------------------------- one Gaussian


@part
def length_of(quat, g):
    "Length of the quaternion of Gaussian g, in float64 where its squares leave the range of float32."
    w, x, y, z = float(quat[g, 0]), float(quat[g, 1]), float(quat[g, 2]), float(quat[g, 3])
    length = float64(math.sqrt(w * w + x * x + y * y + z * z))
    if length >= 1e-12 and length <= 1e18:
        return length
    w, x, y, z = float64(w), float64(x), float64(y), float64(z)
    return math.sqrt(w * w + x * x + y * y + z * z)


@part
def rotation(quat, g):
    "Of Gaussian g: the unit quaternion, the inverse of its length, the rotation matrix row by row."
    w, x, y, z = float(quat[g, 0]), float(quat[g, 1]), float(quat[g, 2]), float(quat[g, 3])
    r = 1.0 / length_of(quat, g)
    w, x, y, z = w * r, x * r, y * r, z * r
    matrix = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
    return (w, x, y, z), r, matrix


@part
def cross(a0, a1, a2, b0, b1, b2):
    "Vector product of a and b."
    return a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@part
def normal_of(P, A, S):
    """The vector product n of the two rows of Q = P A diag(S), without a difference of large numbers.

    The covariance Q Q' has the determinant |n|^2. So a Gaussian that is a million times longer than
    wide keeps its width.
    """
    a00, a01, a02, a10, a11, a12, a20, a21, a22 = A
    n0, n1, n2 = cross(P[0], P[1], P[2], P[3], P[4], P[5])
    return (
        (n0 * a00 + n1 * a10 + n2 * a20) * S[1] * S[2],
        (n0 * a01 + n1 * a11 + n2 * a21) * S[0] * S[2],
        (n0 * a02 + n1 * a12 + n2 * a22) * S[0] * S[1],
    )


@part
def root_of(P, A, S):
    "The two rows of Q = P A diag(S), one behind the other."
    a00, a01, a02, a10, a11, a12, a20, a21, a22 = A
    return (
        (P[0] * a00 + P[1] * a10 + P[2] * a20) * S[0],
        (P[0] * a01 + P[1] * a11 + P[2] * a21) * S[1],
        (P[0] * a02 + P[1] * a12 + P[2] * a22) * S[2],
        (P[3] * a00 + P[4] * a10 + P[5] * a20) * S[0],
        (P[3] * a01 + P[4] * a11 + P[5] * a21) * S[1],
        (P[3] * a02 + P[4] * a12 + P[5] * a22) * S[2],
    )


@part
def gram(q00, q01, q02, q10, q11, q12):
    "The covariance (a b; b c) = Q Q' of an ellipse."
    return (
        q00 * q00 + q01 * q01 + q02 * q02,
        q00 * q10 + q01 * q11 + q02 * q12,
        q10 * q10 + q11 * q11 + q12 * q12,
    )


@part
def to_float32(value):
    "The value, held within what float32 can say; NaN stays NaN."
    if value > LARGEST:
        return LARGEST
    if value < -LARGEST:
        return -LARGEST
    return value


@part
def to_camera(mean, g, cam, v):
    "Camera coordinates of Gaussian g's centre in view v."
    x, y, z = float(mean[g, 0]), float(mean[g, 1]), float(mean[g, 2])
    return (
        cam[v, 0, 0] * x + cam[v, 0, 1] * y + cam[v, 0, 2] * z + cam[v, 0, 3],
        cam[v, 1, 0] * x + cam[v, 1, 1] * y + cam[v, 1, 2] * z + cam[v, 1, 3],
        cam[v, 2, 0] * x + cam[v, 2, 1] * y + cam[v, 2, 2] * z + cam[v, 2, 3],
    )


@part
def derivative(cam, v, jx, jy, tu, tv):
    "P = J W row by row: pixels per world unit at the slopes (tu, tv), with (jx, jy) = focal / depth."
    return (
        jx * (cam[v, 0, 0] - tu * cam[v, 2, 0]),
        jx * (cam[v, 0, 1] - tu * cam[v, 2, 1]),
        jx * (cam[v, 0, 2] - tu * cam[v, 2, 2]),
        jy * (cam[v, 1, 0] - tv * cam[v, 2, 0]),
        jy * (cam[v, 1, 1] - tv * cam[v, 2, 1]),
        jy * (cam[v, 1, 2] - tv * cam[v, 2, 2]),
    )


@part
def frustum(K, v, H, W):
    "Limits of x/z and y/z where the projection is linearised: the image and 15 % of its size around it."
    mx = 0.15 * W / K[v, 0, 0]
    my = 0.15 * H / K[v, 1, 1]
    return (
        -K[v, 0, 2] / K[v, 0, 0] - mx,
        (W - K[v, 0, 2]) / K[v, 0, 0] + mx,
        -K[v, 1, 2] / K[v, 1, 1] - my,
        (H - K[v, 1, 2]) / K[v, 1, 1] + my,
    )


@part
def linearise(x, y, z, K, v, limits, ortho):
    """Where the centre falls (pixels), and where the projection is linearised.

    Those are the slopes x/z and y/z held inside the limits, and focal / depth along both axes.
    """
    fx, fy, cx, cy = K[v, 0, 0], K[v, 1, 1], K[v, 0, 2], K[v, 1, 2]
    if ortho:
        return fx * x + cx, fy * y + cy, 0.0, 0.0, fx, fy
    u0, u1, v0, v1 = limits
    rz = 1.0 / z
    tu, tv = min(max(x * rz, u0), u1), min(max(y * rz, v0), v1)
    return fx * x * rz + cx, fy * y * rz + cy, tu, tv, fx * rz, fy * rz


@part
def times_symmetric(x, y, z, S):
    "The row (x, y, z) times a symmetric matrix, of which S is the upper triangle row by row."
    return (
        x * S[0] + y * S[1] + z * S[2],
        x * S[1] + y * S[3] + z * S[4],
        x * S[2] + y * S[4] + z * S[5],
    )


@part
def upper(cov, g):
    "The upper triangle of the covariance of Gaussian g, row by row."
    return (
        float64(cov[g, 0, 0]),
        float64(cov[g, 0, 1]),
        float64(cov[g, 0, 2]),
        float64(cov[g, 1, 1]),
        float64(cov[g, 1, 2]),
        float64(cov[g, 2, 2]),
    )


@part
def spread(P, S):
    "The covariance (a b; b c) = P S P' of an ellipse."
    x, y, z = times_symmetric(P[0], P[1], P[2], S)
    a = x * P[0] + y * P[1] + z * P[2]
    b = x * P[3] + y * P[4] + z * P[5]
    x, y, z = times_symmetric(P[3], P[4], P[5], S)
    return a, b, x * P[3] + y * P[4] + z * P[5]


@part
def fill(d, i, value, dx, dy, dz):
    "Row i of `harmonics`."
    d[i, 0], d[i, 1], d[i, 2], d[i, 3] = value, dx, dy, dz


@part
def harmonics(d, x, y, z, k):
    """Fill d [25 4] with the first k spherical harmonics at the unit direction (x, y, z).

    The value stands first, its three derivatives follow.
    """
    fill(d, 0, S0, 0.0, 0.0, 0.0)
    if k > 1:
        fill(d, 1, -S1 * y, 0.0, -S1, 0.0)
        fill(d, 2, S1 * z, 0.0, 0.0, S1)
        fill(d, 3, -S1 * x, -S1, 0.0, 0.0)
    if k > 4:
        xx, yy, zz = x * x, y * y, z * z
        fill(d, 4, S2A * x * y, S2A * y, S2A * x, 0.0)
        fill(d, 5, -S2A * y * z, 0.0, -S2A * z, -S2A * y)
        fill(d, 6, S2B * (3 * zz - 1), 0.0, 0.0, 6 * S2B * z)
        fill(d, 7, -S2A * x * z, -S2A * z, 0.0, -S2A * x)
        fill(d, 8, S2C * (xx - yy), 2 * S2C * x, -2 * S2C * y, 0.0)
        if k > 9:
            five = 5 * zz - 1
            fill(d, 9, -S3A * y * (3 * xx - yy), -6 * S3A * x * y, -3 * S3A * (xx - yy), 0.0)
            fill(d, 10, S3B * x * y * z, S3B * y * z, S3B * x * z, S3B * x * y)
            fill(d, 11, -S3C * y * five, 0.0, -S3C * five, -10 * S3C * y * z)
            fill(d, 12, S3D * z * (5 * zz - 3), 0.0, 0.0, S3D * (15 * zz - 3))
            fill(d, 13, -S3C * x * five, -S3C * five, 0.0, -10 * S3C * x * z)
            fill(d, 14, S3E * z * (xx - yy), 2 * S3E * x * z, -2 * S3E * y * z, S3E * (xx - yy))
            fill(d, 15, -S3A * x * (xx - 3 * yy), -3 * S3A * (xx - yy), 6 * S3A * x * y, 0.0)
        if k > 16:
            seven, minus, xy = 7 * zz - 1, xx - yy, x * y
            odd_y, odd_x, three = y * (3 * xx - yy), x * (xx - 3 * yy), 7 * zz - 3
            fill(d, 16, S4A * xy * minus, S4A * odd_y, S4A * odd_x, 0.0)
            fill(d, 17, -S4B * z * odd_y, -6 * S4B * xy * z, -3 * S4B * z * minus, -S4B * odd_y)
            fill(d, 18, S4C * xy * seven, S4C * y * seven, S4C * x * seven, 14 * S4C * xy * z)
            fill(d, 19, -S4D * y * z * three, 0.0, -S4D * z * three, -3 * S4D * y * seven)
            fill(d, 20, S4E * ((35 * zz - 30) * zz + 3), 0.0, 0.0, 20 * S4E * z * three)
            fill(d, 21, -S4D * x * z * three, -S4D * z * three, 0.0, -3 * S4D * x * seven)
            fill(
                d,
                22,
                0.5 * S4C * minus * seven,
                S4C * x * seven,
                -S4C * y * seven,
                7 * S4C * z * minus,
            )
            fill(d, 23, -S4B * z * odd_x, -3 * S4B * z * minus, 6 * S4B * xy * z, -S4B * odd_x)
            fill(d, 24, 0.25 * S4A * (minus * minus - 4 * xy * xy), S4A * odd_x, -S4A * odd_y, 0.0)


# ---------------------------------------------------------------------------------- forward, a view


@part
def sort_by_depth(depth, order):
    "Stable order of positive float64 depths: four counting passes over 44 bits of their distance."
    n = len(depth)
    if n == 0:
        return
    bits = depth.view(np.uint64)
    low, high = bits[0], bits[0]
    for i in range(n):
        low, high = min(low, bits[i]), max(high, bits[i])
    shift = u64(0)
    while (high - low) >> shift >= u64(1 << 44):
        shift += u64(1)
    other = np.empty(n, np.int32)
    count = np.empty(2048, np.int32)
    for i in range(n):
        order[i] = i
    a, b = order, other
    for step in range(4):
        for i in range(2048):
            count[i] = 0
        down = shift + u64(11 * step)
        for i in range(n):
            count[((bits[i] - low) >> down) & u64(2047)] += 1
        total = 0
        for i in range(2048):
            count[i], total = total, total + count[i]
        for i in range(n):
            digit = ((bits[a[i]] - low) >> down) & u64(2047)
            b[count[digit]] = a[i]
            count[digit] += 1
        a, b = b, a


@part
def copy_block(first, n, cloud, block):
    "Centres, largest variance and opacity of n Gaussians; behind them some that nothing draws."
    mean, _, scale, cov, opacity, _ = cloud
    for i in range(n):
        g = first + i
        block[i], block[BLOCK + i], block[2 * BLOCK + i] = mean[g, 0], mean[g, 1], mean[g, 2]
        if len(cov):
            widest = float64(cov[g, 0, 0]) + cov[g, 1, 1] + cov[g, 2, 2]
        else:
            s0, s1, s2 = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
            widest = float64(max(s0 * s0, s1 * s1, s2 * s2))
        block[3 * BLOCK + i] = widest
        block[4 * BLOCK + i] = opacity[g]
    for i in range(n, min(n + GROUP, BLOCK)):
        block[4 * BLOCK + i] = 0.0


@part
def candidates(v, first, n, camera, rules, limits, block, chosen):
    """Which of the n Gaussians of a block may be seen: written are their indices, returned is how many.

    No ellipse is wider than that of a sphere of its largest deviation.
    """
    pose, K, _, H, W = camera
    near, far, eps2d, _, _, ortho = rules
    u0, u1, v0, v1 = limits
    fx, fy, cx, cy = K[v, 0, 0], K[v, 1, 1], K[v, 0, 2], K[v, 1, 2]
    one, zero = all64(1.0), all64(0.0)
    for i in range(0, n, GROUP):
        X, Y, Z = load64(block, i), load64(block, BLOCK + i), load64(block, 2 * BLOCK + i)
        x = pose[v, 0, 0] * X + pose[v, 0, 1] * Y + pose[v, 0, 2] * Z + pose[v, 0, 3]
        y = pose[v, 1, 0] * X + pose[v, 1, 1] * Y + pose[v, 1, 2] * Z + pose[v, 1, 3]
        z = pose[v, 2, 0] * X + pose[v, 2, 1] * Y + pose[v, 2, 2] * Z + pose[v, 2, 3]
        if ortho:
            scale, tu, tv = one, zero, zero
        else:
            scale = 1.0 / z
            tu = min64(max64(x * scale, all64(u0)), all64(u1))
            tv = min64(max64(y * scale, all64(v0)), all64(v1))
        jx, jy = fx * scale, fy * scale
        mx, my = x * jx + cx, y * jy + cy
        off_x = max64(max64(0.0 - mx, mx - W), one) - 1.0
        off_y = max64(max64(0.0 - my, my - H), one) - 1.0
        widest = WIDEST * load64(block, 3 * BLOCK + i)
        fine = keep64(255.0 * load64(block, 4 * BLOCK + i), one, one)
        fine = keep64(z, all64(near), fine)
        fine = keep64(all64(far), z, fine)
        reach_x = jx * jx * (1.0 + tu * tu) * widest + WIDEST * eps2d
        reach_y = jy * jy * (1.0 + tv * tv) * widest + WIDEST * eps2d
        fine = unless64(off_x * off_x, reach_x, fine)
        fine = unless64(off_y * off_y, reach_y, fine)
        store64(block, 5 * BLOCK + i, fine)
    count = 0
    for i in range(n):
        chosen[count] = first + i
        count += int(block[5 * BLOCK + i] > 0.0)
    return count


@kernel
def project(v, first, last, cloud, bits, camera, rules, ids, rec, colour, shape):
    """Project Gaussians first..last into view v and keep those whose box of `radii` overlaps the image.

    Returns how many there are. A Gaussian of which something is not finite, or beyond the limits at the
    head of this file, is left out.

    `cloud` is (mean, quat, scale, cov, opacity, sh): with rows in `cov` [n 3 3], quat and scale are not
    read; `sh` [n k 3] may have k = 0, then colours come from elsewhere. `bits` [n] is log2 of the opacity.
    `camera` is (pose [v 4 4], K [v 3 3], centre [v 3], H, W), `rules` (near, far, eps2d, clip, antialiased,
    ortho).

    Written for each: `ids` its index; `rec` (centre in pixels, e, f, h, log2 opacity, depth; half the width
    of the ellipse where alpha is 1/255, how far right of the centre its top is, how much lower its middle
    gets a pixel further right, half its height over half its width); `colour` (red, green, blue, depth);
    `shape`, where it has rows, (factor of the opacity, radii in pixels). The triangle (e f; 0 h) is the root
    of the inverse covariance in bits: with y1 = e dx + f dy, y2 = h dy,
    alpha = opacity * 2^-(y1^2 + y2^2).
    """
    mean, quat, scale, cov, opacity, sh = cloud
    pose, K, centre, H, W = camera
    near, far, eps2d, clip, antialiased, ortho = rules
    limits = frustum(K, v, H, W)
    ox, oy, oz = centre[v, 0], centre[v, 1], centre[v, 2]
    k = sh.shape[1]
    rules = near, min(far, FARTHEST), eps2d, clip, antialiased, ortho
    Y = np.empty((MOST_SH, 4))
    block = np.zeros(6 * BLOCK)
    chosen = np.empty(BLOCK + 1, np.int64)
    m = 0
    for begin in range(first, last, BLOCK):
        n = min(BLOCK, last - begin)
        copy_block(begin, n, cloud, block)
        count = candidates(v, begin, n, camera, rules, limits, block, chosen)
        for g in chosen[:count]:
            alpha = float(opacity[g])
            x, y, z = to_camera(mean, g, pose, v)
            mx, my, tu, tv, jx, jy = linearise(x, y, z, K, v, limits, ortho)
            P = derivative(pose, v, jx, jy, tu, tv)
            if len(cov):
                a, b, c = spread(P, upper(cov, g))
                det0 = max(a * c - b * b, 0.0)
            else:
                _, inverse_length, A = rotation(quat, g)
                if not inverse_length <= 1.0 / SHORTEST_QUAT:
                    continue
                S = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
                a, b, c = gram(*root_of(P, A, S))
                det0 = a * c - b * b
                if not det0 > SAFE * a * c:
                    n0, n1, n2 = normal_of(P, A, S)
                    det0 = n0 * n0 + n1 * n1 + n2 * n2
            if not (a <= LARGEST_VARIANCE and c <= LARGEST_VARIANCE):
                continue
            a, c = a + eps2d, c + eps2d
            det = a * c - b * b
            if not det > SAFE * a * c:
                det = det0 + eps2d * (a + c - eps2d)
            if not (a > 0.0 and c > 0.0 and det > 0.0 and alpha <= LARGEST):
                continue
            factor = math.sqrt(det0 / det)
            lo = bits[g]
            if antialiased:
                alpha *= factor
                if not alpha * 255.0 >= 1.0:
                    continue
                lo = math.log2(alpha)
            room = max(lo + LOG2_255, 0.0)
            reach = math.sqrt(room / HALF_LOG2E)
            rx = math.ceil(reach * math.sqrt(a))
            ry = math.ceil(reach * math.sqrt(c))
            if not (mx + rx > 0.0 and mx - rx < W and my + ry > 0.0 and my - ry < H):
                continue
            if rx <= clip and ry <= clip:
                continue
            e = math.sqrt(HALF_LOG2E * c / det)
            h = math.sqrt(HALF_LOG2E / c)
            dx, dy, dz = float(mean[g, 0]) - ox, float(mean[g, 1]) - oy, float(mean[g, 2]) - oz
            distance = math.sqrt(dx * dx + dy * dy + dz * dz)
            if not distance > 0.0:
                continue
            if k > 0:
                r = 1.0 / distance
                harmonics(Y, dx * r, dy * r, dz * r, k)
                drawable = True
                for j in range(3):
                    bright = 0.5
                    for i in range(k):
                        bright += Y[i, 0] * sh[g, i, j]
                    if not (bright > -math.inf and bright <= BRIGHTEST):
                        drawable = False
                    colour[m, j] = max(bright, 0.0)
                if not drawable:
                    continue
            ids[m], colour[m, 3] = g, z
            f = -e * b / c
            # where alpha is 1/255: fh dy^2 + 2 e f dx dy + e^2 dx^2 = room; its top is at dx = tip, its bottom at -tip
            fh = f * f + h * h
            wide = math.sqrt(fh * room * MARGIN) / (e * h)
            rec[m, 0], rec[m, 1], rec[m, 2], rec[m, 3] = mx, my, e, f
            rec[m, 4], rec[m, 5], rec[m, 6] = h, lo, z
            rec[m, 7], rec[m, 8] = wide, -f * wide / math.sqrt(fh)
            rec[m, 9], rec[m, 10] = -e * f / fh, e * h / fh
            if len(shape):
                shape[m, 0], shape[m, 1], shape[m, 2] = factor, rx, ry
            m += 1
    return m


@kernel
def settle(counts, ids, rec, colour, shape, order, span, end):
    """Close the gaps between the chunks of one view, sort its rows, find the columns of each.

    `counts` says how many rows each job of `project` kept. Written: `order`, the rows from near to far,
    and `span`, the first and last column (0..end) of each, in that order. Returns the number of rows.
    """
    m = 0
    for chunk in range(len(counts)):
        at = chunk * CHUNK
        for i in range(counts[chunk]):
            if at + i > m:
                ids[m] = ids[at + i]
                rec[m] = rec[at + i]
                colour[m] = colour[at + i]
                if len(shape):
                    shape[m] = shape[at + i]
            m += 1
    depth = np.empty(m)
    for i in range(m):
        depth[i] = rec[i, 6]
    sort_by_depth(depth, order)
    for j in range(m):
        i = order[j]
        span[j, 0], span[j, 1] = columns(rec[i, 0], rec[i, 7], 0, end)
    return m


# -------------------------------------------------------------------------------------------- tiles


@part
def columns(mx, half, begin, end):
    "Tile columns first..last, within begin..end, that a Gaussian of this half width reaches."
    left = (mx - half - 0.5) / TILE_W
    right = (mx + half - 0.5) / TILE_W
    if not (left <= end and right >= begin):
        return begin, begin
    first = max(int(math.floor(max(left, -1.0))), begin)
    last = min(int(math.floor(min(right, float(end)))) + 1, end)
    return first, last


@kernel
def strip_lists(m, rec, order, span, begin, end, H):
    """For tile columns begin..end: which Gaussians reach each, front to back, and in which rows exactly.

    Returns own [k], the rows of `rec` that reach any of them, front to back; of those place [2 k], their
    centres, and form [4 k], e, f, h and log2 opacity; starts, ends [columns] and entry [2 ..], pairs of
    (place in own, first and last row in 16 bits each). The rows of GROUP columns are found at once.
    """
    starts = np.zeros(end - begin + 1, np.int64)  # at first, how many more than the column before
    k = 0
    for j in range(m):
        c0, c1 = max(span[j, 0], begin), min(span[j, 1], end)
        if c0 < c1:
            starts[c0 - begin + 1] += 1
            if c1 < end:
                starts[c1 - begin + 1] -= 1
            k += 1
    reached = 0
    for c in range(end - begin):
        reached += starts[c + 1]
        starts[c + 1] = starts[c] + reached
    ends = starts[:-1].copy()
    own = np.empty(k, np.int32)
    place = np.empty(2 * k)
    form = np.empty(4 * k, np.float32)
    entry = np.empty(2 * starts[end - begin], np.int32)
    room = aligned(6 * GROUP).view(np.float64)
    steps, top, bottom = room[:GROUP], room[GROUP : 2 * GROUP], room[2 * GROUP :]
    steps[:] = np.arange(GROUP) * float(TILE_W)
    zero, tall = all64(0.0), all64(float(H))
    p = 0
    for j in range(m):
        c0, c1 = max(span[j, 0], begin), min(span[j, 1], end)
        if c0 >= c1:
            continue
        i = order[j]
        own[p] = i
        mx, my = rec[i, 0], rec[i, 1]
        place[2 * p], place[2 * p + 1] = mx, my
        for n in range(4):
            form[4 * p + n] = rec[i, 2 + n]
        wide, tip, slope, aspect = rec[i, 7], rec[i, 8], rec[i, 9], rec[i, 10]
        edge, square = all64(wide), all64(wide * wide)
        for c in range(c0, c1, GROUP):
            x = (c * TILE_W + 0.5 - mx) + load64(steps, 0)
            left, right = max64(x, 0.0 - edge), min64(x + (TILE_W - 1.0), edge)
            lo, hi = min64(max64(all64(-tip), left), right), min64(max64(all64(tip), left), right)
            lo, hi = (
                my + slope * lo - aspect * sqrt64(max64(square - lo * lo, zero)),
                my + slope * hi + aspect * sqrt64(max64(square - hi * hi, zero)),
            )
            hi = keep64(right, left, max64(hi, zero))
            store64(top, 0, min64(ceil64(max64(lo, zero) - 0.5), tall))
            store64(bottom, 0, min64(floor64(min64(hi, tall + 1.0) - 0.5) + 1.0, tall))
            for o in range(min(c1 - c, GROUP)):
                r0, r1 = int(top[o]), int(bottom[o])
                at = ends[c + o - begin]
                entry[2 * at], entry[2 * at + 1] = p, r0 << 16 | r1
                ends[c + o - begin] = at + (r0 < r1)
        p += 1
    return own, place, form, starts, ends, entry


@part
def alive(buf, rows):
    "Does any pixel of the first rows of a tile still take light?"
    for at in range(0, -(-rows // PAIR) * BAND, BAND):
        if any_alive(load(buf, at)):
            return True
    return False


@part
def fall_of_rows(terms, at, i, C, f, h, lo, k2):
    "LANES rows of `rows_of_ellipse` from row i on; returns y2."
    row = load(C, ROW + i)
    y2 = all_of(h) * row + all_of(k2)
    store(terms, at + RISE + i, all_of(f) * row)
    store(terms, at + FALL + i, all_of(lo) - y2 * y2)
    return y2


@part
def rows_of_ellipse(terms, at, n, C, f, h, lo, k2):
    """What all pixels of a row share, for n rows of an ellipse: y1 = a + RISE for some a of each column, and
    log2 alpha = FALL - y1^2."""
    for i in range(0, n, 2 * LANES):
        fall_of_rows(terms, at, i, C, f, h, lo, k2)
        fall_of_rows(terms, at, i + LANES, C, f, h, lo, k2)


@part
def rows_for_gradient(terms, at, n, C, f, h, lo, k2):
    "As `rows_of_ellipse`, with y2 and its square."
    for i in range(0, n, 2 * LANES):
        for j in (i, i + LANES):
            y2 = fall_of_rows(terms, at, j, C, f, h, lo, k2)
            store(terms, at + DOWN + j, y2)
            store(terms, at + SQUARE + j, y2 * y2)


def preparing(rows, step):
    "The start of every batch, for `draw` or `draw_backward`; `step` floats hold the rows of one Gaussian."

    @part
    def prepare(C, place, form, tint, entry, first, last, x0, y0, y1, where, start, terms):
        """Prepare entries first..last of a column for rows y0..y1, and return how many of them reach those.

        Written for each: `where` [4]: band of the buffer, bands, number of the ellipse; `start` [12]: e, f, h,
        log2 opacity, y1 and y2 at the left end of the first row, four channels; its rows in `terms`.

        The inner loops end when a processor does not expect it. What they need next is at hand then.
        """
        n = 0
        for t in range(first, last):
            i, rows_here = entry[2 * t], entry[2 * t + 1]
            r0, r1 = max(rows_here >> 16, y0), min(rows_here & 0xFFFF, y1)
            if r0 >= r1:
                continue
            r0 -= (r0 - y0) % PAIR
            e, f, h, lo = form[4 * i], form[4 * i + 1], form[4 * i + 2], form[4 * i + 3]
            dx, dy = x0 - place[2 * i], r0 + 0.5 - place[2 * i + 1]
            k1, k2 = f32(e * dx + f * dy), f32(h * dy)
            rows(terms, step * n, r1 - r0, C, f, h, lo, k2)
            where[4 * n], where[4 * n + 1] = (r0 - y0) // PAIR * BAND, (r1 - r0 + PAIR - 1) // PAIR
            where[4 * n + 2] = i
            at = 12 * n
            start[at], start[at + 1], start[at + 2], start[at + 3] = e, f, h, lo
            start[at + 4], start[at + 5] = k1, k2
            for j in range(CHANNELS):
                start[at + 6 + j] = tint[4 * i + j]
            n += 1
        return n

    return prepare


prepare = preparing(rows_of_ellipse, DOWN)
prepare_backward = preparing(rows_for_gradient, SQUARE + TILE_H)


def blending(capped):
    "The inner loop of `draw`; without `capped` no alpha may reach its largest value."

    @part
    def blend(buf, at, bands, C, terms, rows, e, k1, r, g, b, z):
        """Add one Gaussian, whose rows stand in `terms` from `rows` on, to some bands of a tile.

        A band of the buffer holds light, red, green, blue, depth, alpha of LANES pixels.
        """
        across = all_of(e) * load(C, 0) + all_of(k1)
        r, g, b, z, zero = all_of(r), all_of(g), all_of(b), all_of(z), all_of(ZERO)
        for _ in range(bands):
            T = load(buf, at)
            if any_alive(T):
                y1 = across + cycle(terms, rows + RISE)
                q = cycle(terms, rows + FALL) - y1 * y1
                alpha = exp2(q, C)
                if capped:
                    alpha = smaller(alpha, load(C, CAP))
                w = keep(q, load(C, FAINT), T * alpha)
                left = T - w
                w = below(left, load(C, DARK), zero, w)
                store(buf, at, below(left, load(C, DARK), dead(T), left))
                store(buf, at + LANES, load(buf, at + LANES) + w * r)
                store(buf, at + 2 * LANES, load(buf, at + 2 * LANES) + w * g)
                store(buf, at + 3 * LANES, load(buf, at + 3 * LANES) + w * b)
                store(buf, at + 4 * LANES, load(buf, at + 4 * LANES) + w * z)
                store(buf, at + 5 * LANES, load(buf, at + 5 * LANES) + w)
            at, rows = at + BAND, rows + PAIR

    return blend


blend, blend_capped = blending(False), blending(True)


@part
def rows_of(colour, own):
    "colour[own], one row behind another."
    rows = np.empty(CHANNELS * len(own), np.float32)
    for p in range(len(own)):
        for j in range(CHANNELS):
            rows[CHANNELS * p + j] = colour[own[p], j]
    return rows


@kernel
def draw(C, colour, lists, begin, end, back, expected, rgb, alpha, depth, light):
    """Draw tile columns begin..end of one view, whose width must be a multiple of 8.

    `lists` are those of `strip_lists`. Images are rgb [3 h w], the channels 0..2 of `colour`; depth [h w],
    its last channel, divided by alpha if `expected`; alpha and the light that is left, [h w].
    """
    own, place, form, starts, ends, entry = lists
    H, W = alpha.shape
    rgb, alpha = rgb.reshape(-1), alpha.reshape(-1)
    depth, light = depth.reshape(-1), light.reshape(-1)
    back_z, zero, tiny = all_of(back[3]), all_of(ZERO), all_of(TINY)
    tint = rows_of(colour, own)
    buf = aligned(BAND * TILE_H // PAIR)
    terms = aligned(BATCH * DOWN)
    where, start = np.empty(4 * BATCH, np.int64), np.empty(12 * BATCH, np.float32)
    for c in range(begin, end):
        x0 = c * TILE_W
        for y0 in range(0, H, TILE_H):
            y1 = min(y0 + TILE_H, H)
            p = 0
            for y in range(y0, y1, PAIR):
                store(buf, p, full_light(y + 1 < y1))
                for j in range(1, 6):
                    store(buf, p + j * LANES, zero)
                p += BAND
            for t in range(starts[c - begin], ends[c - begin], BATCH):
                last = min(t + BATCH, ends[c - begin])
                n = prepare(C, place, form, tint, entry, t, last, x0, y0, y1, where, start, terms)
                for i in range(n):
                    at, bands = where[4 * i], where[4 * i + 1]
                    e, lo, k1 = start[12 * i], start[12 * i + 3], start[12 * i + 4]
                    r, g, b = start[12 * i + 6], start[12 * i + 7], start[12 * i + 8]
                    z = start[12 * i + 9]
                    if lo > LOG2_CAP:
                        blend_capped(buf, at, bands, C, terms, DOWN * i, e, k1, r, g, b, z)
                    else:
                        blend(buf, at, bands, C, terms, DOWN * i, e, k1, r, g, b, z)
                if not alive(buf, y1 - y0):
                    break
            # one image after the other: few pages of memory at a time
            for j in range(3):
                p, back_j, image = (1 + j) * LANES, all_of(back[j]), j * H * W
                for y in range(y0, y1, PAIR):
                    T = size(load(buf, p - (1 + j) * LANES))
                    put(rgb, image + y * W + x0, W, y + 1 < y1, load(buf, p) + T * back_j)
                    p += BAND
            p = 0
            for y in range(y0, y1, PAIR):
                put(light, y * W + x0, W, y + 1 < y1, size(load(buf, p)))
                p += BAND
            p = 5 * LANES
            for y in range(y0, y1, PAIR):
                put(alpha, y * W + x0, W, y + 1 < y1, load(buf, p))
                p += BAND
            p = 0
            for y in range(y0, y1, PAIR):
                Z = load(buf, p + 4 * LANES) + size(load(buf, p)) * back_z
                if expected:
                    A = load(buf, p + 5 * LANES)
                    Z = Z / pick(A, tiny, A, tiny)
                put(depth, y * W + x0, W, y + 1 < y1, Z)
                p += BAND


# ----------------------------------------------------------------------------------------- backward


@part
def add_sums(sums, at, a, b, c, d, e, f, g, h, i, j):
    "Add the sum of each of ten vectors to sums[at : at + 10]; what follows up to 16 is no sum."
    abcd = add_pairs(add_pairs(a, b), add_pairs(c, d))
    efgh = add_pairs(add_pairs(e, f), add_pairs(g, h))
    ij = add_pairs(i, j)
    ij = add_pairs(ij, ij)
    first, rest = add_pairs(abcd, efgh), add_pairs(ij, ij)
    if LANES == 16:
        store(sums, at, load(sums, at) + add_pairs(first, rest))
    else:
        store(sums, at, load(sums, at) + first)
        store(sums, at + 8, load(sums, at + 8) + rest)


def blending_backward(capped, deep):
    "The inner loop of `draw_backward`; without `deep` the fourth channel has no gradient."

    @part
    def blend_backward(buf, at, bands, C, terms, rows, e, f, h, k1, k2, r, g, b, z, sums, own):
        """The same bands again, from the front.

        A band of the buffer holds light, what is still to come along the ray times its gradient, and the
        gradients of red, green, blue and depth. Adds to `sums` from `own` on:
        v, v y1, v y2, v y1^2, v y1 y2, v y2^2, with v = dL / d ln alpha, and weight times gradient of red,
        green, blue, depth.

        Within one place of the vectors y1 = a + ratio * y2 with constant a, so three sums with v are enough
        until the end.
        """
        across = all_of(e) * load(C, 0) + all_of(k1)
        r, g, b, z, zero = all_of(r), all_of(g), all_of(b), all_of(z), all_of(ZERO)
        s, s2, s22, cr, cg, cb, cz = zero, zero, zero, zero, zero, zero, zero
        for _ in range(bands):
            T = load(buf, at)
            if any_alive(T):
                y1 = across + cycle(terms, rows + RISE)
                q = cycle(terms, rows + FALL) - y1 * y1
                full = exp2(q, C)
                alpha = smaller(full, load(C, CAP)) if capped else full
                w = keep(q, load(C, FAINT), T * alpha)
                left = T - w
                w = below(left, load(C, DARK), zero, w)
                store(buf, at, below(left, load(C, DARK), dead(T), left))
                gr, gg, gb = (
                    load(buf, at + 2 * LANES),
                    load(buf, at + 3 * LANES),
                    load(buf, at + 4 * LANES),
                )
                toward = gr * r + gg * g + gb * b
                if deep:
                    gz = load(buf, at + 5 * LANES)
                    toward = toward + gz * z
                    cz = cz + w * gz
                mine = w * toward
                rest = load(buf, at + LANES) - mine
                store(buf, at + LANES, rest)
                cr, cg, cb = cr + w * gr, cg + w * gg, cb + w * gb
                v = mine - rest * (w / left)  # alpha / (1 - alpha), or 0
                if capped:
                    v = keep(load(C, CAP), full, v)
                s = s + v
                s2 = s2 + v * cycle(terms, rows + DOWN)
                s22 = s22 + v * cycle(terms, rows + SQUARE)
            at, rows = at + BAND, rows + PAIR
        ratio = all_of(f / h)
        a = across - ratio * all_of(k2)
        s1, s12 = a * s + ratio * s2, a * s2 + ratio * s22
        s11 = a * s1 + ratio * s12
        add_sums(sums, own, s, s1, s2, s11, s12, s22, cr, cg, cb, cz)

    return blend_backward


blend_backward, blend_backward_capped = (
    blending_backward(False, False),
    blending_backward(True, False),
)
deep_backward, deep_backward_capped = blending_backward(False, True), blending_backward(True, True)


@kernel
def draw_backward(
    C,
    colour,
    lists,
    begin,
    end,
    expected,
    rgb,
    alpha,
    depth,
    light,
    g_rgb,
    g_alpha,
    g_depth,
    g_back,
):
    """Gradients of tile columns begin..end of one view.

    `g_alpha` and `g_depth` may have no rows, which counts as zero. Returns sums [k 16] of the ellipses that
    `lists` names: six of their shape, four of their channels, six that mean nothing. Written: g_back [4].
    """
    own, place, form, starts, ends_of, entry = lists
    H, W = alpha.shape
    k = len(own)
    rgb, alpha = rgb.reshape(-1), alpha.reshape(-1)
    depth, light = depth.reshape(-1), light.reshape(-1)
    g_rgb, g_alpha, g_depth = g_rgb.reshape(-1), g_alpha.reshape(-1), g_depth.reshape(-1)
    tint = rows_of(colour, own)
    buf = aligned(BAND * TILE_H // PAIR)
    terms = aligned(BATCH * (SQUARE + TILE_H))
    where, start = np.empty(4 * BATCH, np.int64), np.empty(12 * BATCH, np.float32)
    sums = aligned(16 * k)
    sums[:] = ZERO
    ends = np.empty(LANES * CHANNELS, np.float32)
    zero, tiny, deep = all_of(ZERO), all_of(TINY), len(g_depth) > 0
    back_r, back_g, back_b, back_z = zero, zero, zero, zero
    for c in range(begin, end):
        x0 = c * TILE_W
        for y0 in range(0, H, TILE_H):
            y1 = min(y0 + TILE_H, H)
            p = 0
            for y in range(y0, y1, PAIR):
                at, both = y * W + x0, y + 1 < y1
                A, T, Z = (
                    take(alpha, at, W, both),
                    take(light, at, W, both),
                    take(depth, at, W, both),
                )
                gz = take(g_depth, at, W, both) if deep else zero
                lost = take(g_alpha, at, W, both) if len(g_alpha) else zero
                gr = take(g_rgb, at, W, both)
                gg = take(g_rgb, at + H * W, W, both)
                gb = take(g_rgb, at + 2 * H * W, W, both)
                rest = gr * take(rgb, at, W, both) + gg * take(rgb, at + H * W, W, both)
                rest = rest + gb * take(rgb, at + 2 * H * W, W, both)
                if expected:
                    gz = keep(A, tiny, gz / pick(A, tiny, A, tiny))
                    lost = lost - gz * Z
                    rest = rest + gz * Z * A
                else:
                    rest = rest + gz * Z
                    back_z = back_z + gz * T
                store(buf, p, full_light(both))
                store(buf, p + LANES, rest - T * lost)
                store(buf, p + 2 * LANES, gr)
                store(buf, p + 3 * LANES, gg)
                store(buf, p + 4 * LANES, gb)
                store(buf, p + 5 * LANES, gz)
                back_r, back_g, back_b = back_r + gr * T, back_g + gg * T, back_b + gb * T
                p += BAND
            for t in range(starts[c - begin], ends_of[c - begin], BATCH):
                last = min(t + BATCH, ends_of[c - begin])
                n = prepare_backward(
                    C, place, form, tint, entry, t, last, x0, y0, y1, where, start, terms
                )
                for i in range(n):
                    at, bands, own_at = where[4 * i], where[4 * i + 1], 16 * where[4 * i + 2]
                    rows, first = (SQUARE + TILE_H) * i, 12 * i
                    e, f, h, lo = start[first], start[first + 1], start[first + 2], start[first + 3]
                    k1, k2 = start[first + 4], start[first + 5]
                    r, g, b = start[first + 6], start[first + 7], start[first + 8]
                    z = start[first + 9]
                    band = at, bands, C, terms, rows, e, f, h, k1, k2
                    capped = lo > LOG2_CAP
                    if deep and capped:
                        deep_backward_capped(buf, *band, r, g, b, z, sums, own_at)
                    elif deep:
                        deep_backward(buf, *band, r, g, b, z, sums, own_at)
                    elif capped:
                        blend_backward_capped(buf, *band, r, g, b, z, sums, own_at)
                    else:
                        blend_backward(buf, *band, r, g, b, z, sums, own_at)
                if not alive(buf, y1 - y0):
                    break
    store(ends, 0, back_r)
    store(ends, LANES, back_g)
    store(ends, 2 * LANES, back_b)
    store(ends, 3 * LANES, back_z)
    for j in range(CHANNELS):
        g_back[j] = ZERO
        for o in range(LANES):
            g_back[j] += ends[LANES * j + o]
    return sums.reshape(k, 16)


@kernel
def add_rows(own, sums, total, channel):
    "Add the sums [k 16] of one strip and pass to `total` [rows 6 + channels] of its view."
    shape = N_SUM - CHANNELS
    for p in range(len(own)):
        i = own[p]
        for j in range(shape):
            total[i, j] += sums[p, j]
        for j in range(CHANNELS):
            total[i, shape + channel + j] += sums[p, shape + j]


@part
def root_gradient(e, f, h, y1, y2, got):
    "One column of dL/dQ of a narrow ellipse: (y1, y2) is the root (e f; 0 h) times that column of Q."
    k2 = LN4 * LN4
    z1 = got[3] * y1 + got[4] * y2
    z2 = got[4] * y1 + got[5] * y2
    return k2 * e * z1, k2 * (f * z1 + h * z2)


@part
def to_quaternion(quat, scale, g, d, g_quat, g_scale):
    "From the gradient d of M = R diag(scale), row by row, to quaternion and scale of Gaussian g."
    d00, d01, d02, d10, d11, d12, d20, d21, d22 = d
    (w, x, y, z), norm, A = rotation(quat, g)
    a00, a01, a02, a10, a11, a12, a20, a21, a22 = A
    s0, s1, s2 = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
    g_scale[g, 0] = to_float32(d00 * a00 + d10 * a10 + d20 * a20)
    g_scale[g, 1] = to_float32(d01 * a01 + d11 * a11 + d21 * a21)
    g_scale[g, 2] = to_float32(d02 * a02 + d12 * a12 + d22 * a22)
    d00, d10, d20 = d00 * s0, d10 * s0, d20 * s0
    d01, d11, d21 = d01 * s1, d11 * s1, d21 * s1
    d02, d12, d22 = d02 * s2, d12 * s2, d22 * s2
    gw = 2 * (-z * d01 + y * d02 + z * d10 - x * d12 - y * d20 + x * d21)
    gx = 2 * (y * (d01 + d10) + z * (d02 + d20) - 2 * x * (d11 + d22) + w * (d21 - d12))
    gy = 2 * (x * (d01 + d10) + z * (d12 + d21) - 2 * y * (d00 + d22) + w * (d02 - d20))
    gz = 2 * (x * (d02 + d20) + y * (d12 + d21) - 2 * z * (d00 + d11) + w * (d10 - d01))
    along = w * gw + x * gx + y * gy + z * gz
    g_quat[g, 0] = to_float32((gw - along * w) * norm)
    g_quat[g, 1] = to_float32((gx - along * x) * norm)
    g_quat[g, 2] = to_float32((gy - along * y) * norm)
    g_quat[g, 3] = to_float32((gz - along * z) * norm)


@kernel
def project_backward(
    first,
    last,
    view_first,
    view_last,
    cloud,
    camera,
    rules,
    base,
    count,
    ids,
    rec,
    colour,
    sums,
    g_cloud,
    g_view,
):
    """Gradients of Gaussians first..last of one cloud from the sums of its views view_first..view_last.

    `base[v]`, `count[v]` say where view v keeps its rows of `ids`, `rec`, `colour` and `sums` [rows 10].
    The gradients `g_cloud` (mean, quat, scale, cov, opacity, sh) come in as zeros; those of a Gaussian
    that no view draws stay so. That of `cov` is symmetric. Where `g_view` [views 15] has rows, the parts
    of these Gaussians are added to them: nine of the rotation, three of the translation, three of the centre.
    """
    mean, quat, scale, cov, opacity, sh = cloud
    g_mean, g_quat, g_scale, g_cov, g_opacity, g_sh = g_cloud
    pose, K, centre, H, W = camera
    _, _, eps2d, _, antialiased, ortho = rules
    k = sh.shape[1]
    n_views = view_last - view_first
    cursor, end = np.empty(n_views, np.int64), np.empty(n_views, np.int64)
    seen = np.empty(n_views, np.int64)
    Y = np.empty((MOST_SH, 4))
    got = np.empty(N_SUM)
    acc_sh = np.empty((MOST_SH, 3))
    for o in range(n_views):
        v = view_first + o
        lo, hi = base[v], base[v] + count[v]
        while lo < hi:
            mid = (lo + hi) // 2
            if ids[mid] < first:
                lo = mid + 1
            else:
                hi = mid
        cursor[o], end[o] = lo, base[v] + count[v]
    for g in range(first, last):
        n_seen = 0
        for o in range(n_views):
            at = cursor[o]
            drawn = at < end[o] and ids[at] == g
            seen[n_seen], cursor[o] = o, at + drawn
            n_seen += drawn
        if n_seen == 0:
            continue  # and something of it may not be finite
        if len(cov):
            sigma = upper(cov, g)
        else:
            _, _, A = rotation(quat, g)
            a00, a01, a02, a10, a11, a12, a20, a21, a22 = A
            s0, s1, s2 = S = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
            m00, m01, m02, m10, m11, m12 = (
                a00 * s0,
                a01 * s1,
                a02 * s2,
                a10 * s0,
                a11 * s1,
                a12 * s2,
            )
            m20, m21, m22 = a20 * s0, a21 * s1, a22 * s2
            sigma = (
                m00 * m00 + m01 * m01 + m02 * m02,
                m00 * m10 + m01 * m11 + m02 * m12,
                m00 * m20 + m01 * m21 + m02 * m22,
                m10 * m10 + m11 * m11 + m12 * m12,
                m10 * m20 + m11 * m21 + m12 * m22,
                m20 * m20 + m21 * m21 + m22 * m22,
            )
        gm0, gm1, gm2, g_log = 0.0, 0.0, 0.0, 0.0
        # dL/dM of narrow ellipses, where the covariance is M M'; of the others dL/dcovariance
        d00, d01, d02, d10, d11, d12, d20, d21, d22 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        h00, h01, h02, h11, h12, h22 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(k):
            for j in range(3):
                acc_sh[i, j] = 0.0
        for o in seen[:n_seen]:
            v, at = view_first + o, cursor[o] - 1
            for j in range(N_SUM):
                got[j] = sums[at, j]
            e, f, h = rec[at, 2], rec[at, 3], rec[at, 4]
            g_log += got[0]

            # harmonics and the direction they are seen from
            ox, oy, oz = 0.0, 0.0, 0.0
            if k > 0:
                dx = float(mean[g, 0]) - centre[v, 0]
                dy = float(mean[g, 1]) - centre[v, 1]
                dz = float(mean[g, 2]) - centre[v, 2]
                r = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
                dx, dy, dz = dx * r, dy * r, dz * r
                harmonics(Y, dx, dy, dz, k)
                hx, hy, hz = 0.0, 0.0, 0.0
                for j in range(3):
                    if colour[at, j] > ZERO:
                        gc = got[6 + j]
                        for i in range(k):
                            acc_sh[i, j] += Y[i, 0] * gc
                            c = sh[g, i, j] * gc
                            hx += Y[i, 1] * c
                            hy += Y[i, 2] * c
                            hz += Y[i, 3] * c
                along = hx * dx + hy * dy + hz * dz
                ox, oy, oz = (hx - along * dx) * r, (hy - along * dy) * r, (hz - along * dz) * r
                gm0, gm1, gm2 = gm0 + ox, gm1 + oy, gm2 + oz

            # the forward projection once more
            X, Yc, Z = to_camera(mean, g, pose, v)
            limits = frustum(K, v, H, W)
            _, _, tu, tv, jx, jy = linearise(X, Yc, Z, K, v, limits, ortho)
            fx, fy = K[v, 0, 0], K[v, 1, 1]
            p00, p01, p02, p10, p11, p12 = P = derivative(pose, v, jx, jy, tu, tv)
            u0, u1, u2 = times_symmetric(p00, p01, p02, sigma)
            v0, v1, v2 = times_symmetric(p10, p11, p12, sigma)
            a = u0 * p00 + u1 * p01 + u2 * p02
            b = u0 * p10 + u1 * p11 + u2 * p12
            c = v0 * p10 + v1 * p11 + v2 * p12

            # the centre in pixels; t = dL/dP, where the covariance of the ellipse is P sigma P'
            k2 = 0.5 * LN4 * LN4
            g_mx = LN4 * e * got[1]
            g_my = LN4 * (f * got[1] + h * got[2])
            det0 = a * c - b * b
            det = (a + eps2d) * (c + eps2d) - b * b
            if len(cov) or det > SAFE * (a + eps2d) * (c + eps2d):
                # G = dL/d(a b; b c), which is symmetric
                G00 = k2 * e * e * got[3]
                G01 = k2 * e * (f * got[3] + h * got[4])
                G11 = k2 * (f * f * got[3] + 2 * f * h * got[4] + h * h * got[5])
                if antialiased:
                    if not len(cov) and not det0 > SAFE * a * c:
                        n0, n1, n2 = normal_of(P, A, S)
                        det0 = n0 * n0 + n1 * n1 + n2 * n2
                    # of a covariance, as in `project`
                    if not det > SAFE * (a + eps2d) * (c + eps2d):
                        det = max(det0, 0.0) + eps2d * (a + c + eps2d)
                    i0 = 0.5 * got[0] / det0 if det0 > 0.0 else 0.0
                    i1 = 0.5 * got[0] / det
                    G00 += i0 * c - i1 * (c + eps2d)
                    G01 -= i0 * b - i1 * b
                    G11 += i0 * a - i1 * (a + eps2d)
                t00, t10 = 2 * (G00 * u0 + G01 * v0), 2 * (G01 * u0 + G11 * v0)
                t01, t11 = 2 * (G00 * u1 + G01 * v1), 2 * (G01 * u1 + G11 * v1)
                t02, t12 = 2 * (G00 * u2 + G01 * v2), 2 * (G01 * u2 + G11 * v2)
                w00, w10 = G00 * p00 + G01 * p10, G01 * p00 + G11 * p10
                w01, w11 = G00 * p01 + G01 * p11, G01 * p01 + G11 * p11
                w02, w12 = G00 * p02 + G01 * p12, G01 * p02 + G11 * p12
                h00 += p00 * w00 + p10 * w10
                h01 += p00 * w01 + p10 * w11
                h02 += p00 * w02 + p10 * w12
                h11 += p01 * w01 + p11 * w11
                h12 += p01 * w02 + p11 * w12
                h22 += p02 * w02 + p12 * w12
            else:
                # much longer than wide: G would lose what is small in it. Q = P M has the rows q0 and q1,
                # B = dL/dQ. With n = q0 x q1 there is no difference: c q0 - b q1 = q1 x n, and
                # a q1 - b q0 = n x q0
                q00, q01, q02, q10, q11, q12 = root_of(P, A, S)
                a, b, c = gram(q00, q01, q02, q10, q11, q12)
                n0, n1, n2 = normal_of(P, A, S)
                det0 = n0 * n0 + n1 * n1 + n2 * n2
                det = det0 + eps2d * (a + c + eps2d)
                top0, top1, top2 = cross(q10, q11, q12, n0, n1, n2)
                low0, low1, low2 = cross(n0, n1, n2, q00, q01, q02)
                c += eps2d
                b00, b10 = root_gradient(e, f, h, e / c * (top0 + eps2d * q00), h * q10, got)
                b01, b11 = root_gradient(e, f, h, e / c * (top1 + eps2d * q01), h * q11, got)
                b02, b12 = root_gradient(e, f, h, e / c * (top2 + eps2d * q02), h * q12, got)
                if antialiased:
                    b00 += got[0] * (top0 / det0 - (top0 + eps2d * q00) / det)
                    b01 += got[0] * (top1 / det0 - (top1 + eps2d * q01) / det)
                    b02 += got[0] * (top2 / det0 - (top2 + eps2d * q02) / det)
                    b10 += got[0] * (low0 / det0 - (low0 + eps2d * q10) / det)
                    b11 += got[0] * (low1 / det0 - (low1 + eps2d * q11) / det)
                    b12 += got[0] * (low2 / det0 - (low2 + eps2d * q12) / det)
                d00 += p00 * b00 + p10 * b10
                d01 += p00 * b01 + p10 * b11
                d02 += p00 * b02 + p10 * b12
                d10 += p01 * b00 + p11 * b10
                d11 += p01 * b01 + p11 * b11
                d12 += p01 * b02 + p11 * b12
                d20 += p02 * b00 + p12 * b10
                d21 += p02 * b01 + p12 * b11
                d22 += p02 * b02 + p12 * b12
                t00 = b00 * m00 + b01 * m01 + b02 * m02
                t01 = b00 * m10 + b01 * m11 + b02 * m12
                t02 = b00 * m20 + b01 * m21 + b02 * m22
                t10 = b10 * m00 + b11 * m01 + b12 * m02
                t11 = b10 * m10 + b11 * m11 + b12 * m12
                t12 = b10 * m20 + b11 * m21 + b12 * m22

            r00, r01, r02 = pose[v, 0, 0], pose[v, 0, 1], pose[v, 0, 2]
            r10, r11, r12 = pose[v, 1, 0], pose[v, 1, 1], pose[v, 1, 2]
            r20, r21, r22 = pose[v, 2, 0], pose[v, 2, 1], pose[v, 2, 2]
            if ortho:
                gX, gY, gZ = fx * g_mx, fy * g_my, got[9]
            else:
                # P = (fx/z)(row_x - u row_z), u = x/z held inside the frustum
                rz = 1.0 / Z
                g_jx = t00 * (r00 - tu * r20) + t01 * (r01 - tu * r21) + t02 * (r02 - tu * r22)
                g_jy = t10 * (r10 - tv * r20) + t11 * (r11 - tv * r21) + t12 * (r12 - tv * r22)
                g_u = -jx * (t00 * r20 + t01 * r21 + t02 * r22) if X * rz == tu else 0.0
                g_v = -jy * (t10 * r20 + t11 * r21 + t12 * r22) if Yc * rz == tv else 0.0
                g_u += fx * g_mx
                g_v += fy * g_my
                gX, gY = g_u * rz, g_v * rz
                gZ = got[9] - (g_jx * jx + g_jy * jy + g_u * X * rz + g_v * Yc * rz) * rz
            gm0 += r00 * gX + r10 * gY + r20 * gZ
            gm1 += r01 * gX + r11 * gY + r21 * gZ
            gm2 += r02 * gX + r12 * gY + r22 * gZ
            if len(g_view):
                x, y, z = float(mean[g, 0]), float(mean[g, 1]), float(mean[g, 2])
                g_view[o, 0] += jx * t00 + gX * x
                g_view[o, 1] += jx * t01 + gX * y
                g_view[o, 2] += jx * t02 + gX * z
                g_view[o, 3] += jy * t10 + gY * x
                g_view[o, 4] += jy * t11 + gY * y
                g_view[o, 5] += jy * t12 + gY * z
                g_view[o, 6] += gZ * x - jx * tu * t00 - jy * tv * t10
                g_view[o, 7] += gZ * y - jx * tu * t01 - jy * tv * t11
                g_view[o, 8] += gZ * z - jx * tu * t02 - jy * tv * t12
                g_view[o, 9] += gX
                g_view[o, 10] += gY
                g_view[o, 11] += gZ
                g_view[o, 12] -= ox
                g_view[o, 13] -= oy
                g_view[o, 14] -= oz

        g_mean[g, 0], g_mean[g, 1], g_mean[g, 2] = to_float32(gm0), to_float32(gm1), to_float32(gm2)
        g_opacity[g] = to_float32(g_log / opacity[g])
        for i in range(k):
            for j in range(3):
                g_sh[g, i, j] = to_float32(acc_sh[i, j])
        if len(cov):
            h00, h01, h02 = to_float32(h00), to_float32(h01), to_float32(h02)
            h11, h12, h22 = to_float32(h11), to_float32(h12), to_float32(h22)
            g_cov[g, 0, 0], g_cov[g, 0, 1], g_cov[g, 0, 2] = h00, h01, h02
            g_cov[g, 1, 0], g_cov[g, 1, 1], g_cov[g, 1, 2] = h01, h11, h12
            g_cov[g, 2, 0], g_cov[g, 2, 1], g_cov[g, 2, 2] = h02, h12, h22
        else:
            d00 += 2 * (h00 * m00 + h01 * m10 + h02 * m20)
            d01 += 2 * (h00 * m01 + h01 * m11 + h02 * m21)
            d02 += 2 * (h00 * m02 + h01 * m12 + h02 * m22)
            d10 += 2 * (h01 * m00 + h11 * m10 + h12 * m20)
            d11 += 2 * (h01 * m01 + h11 * m11 + h12 * m21)
            d12 += 2 * (h01 * m02 + h11 * m12 + h12 * m22)
            d20 += 2 * (h02 * m00 + h12 * m10 + h22 * m20)
            d21 += 2 * (h02 * m01 + h12 * m11 + h22 * m21)
            d22 += 2 * (h02 * m02 + h12 * m12 + h22 * m22)
            d = d00, d01, d02, d10, d11, d12, d20, d21, d22
            to_quaternion(quat, scale, g, d, g_quat, g_scale)


INFINITE, ONE = 0x7F800000, 0x3F800000  # bits of these numbers in float32


@part
def extremes(bits):
    "The smallest of some int32, and the largest without its sign."
    low, high = np.int32(ONE), np.int32(0)
    for i in range(len(bits)):
        low = min(low, bits[i])
        high = max(high, bits[i] & np.int32(0x7FFFFFFF))
    return low, high


@kernel
def plain_values(mean, scale, quat, opacity, sh):
    """Are all numbers finite, deviations above zero, opacities in 0..1, and quaternions not zero?

    The tensors come as int32, one number behind another: so their order is that of whole numbers.
    """
    for bits in (mean, quat, sh):
        if not extremes(bits)[1] < INFINITE:
            return False
    thinnest, widest = extremes(scale)
    faintest, densest = extremes(opacity)
    if not (thinnest > 0 and widest < INFINITE and faintest >= 0 and densest <= ONE):
        return False
    for i in range(0, len(quat), 4):
        all_four = quat[i] | quat[i + 1] | quat[i + 2] | quat[i + 3]
        if all_four & np.int32(0x7FFFFFFF) == 0:
            return False
    return True
