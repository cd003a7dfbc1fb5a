"""Gaussian splatting on the CPU: every compiled function of `unipre3d.render`, forward and backward.

The chapter `52_render` teaches what is computed here; this file is about doing it fast. The plan:

1. `project` turns the Gaussians of one view into 2-D ones (float64 arithmetic, it is scalar code anyway), drops those that
   cannot reach a pixel and sorts the rest by depth.
2. `column_lists` says for every column of 8 pixels which Gaussians touch it, front to back, and in which rows exactly.
3. `draw` walks over tiles of 8 x 64 pixels. Its inner loop, `blend`, adds one Gaussian to one row of 8 pixels at a time. It is
   written with explicit vectors of eight floats (`Float8` below), because a compiler that finds them by itself may stop to do so
   unnoticed, and scalar code is many times slower.
4. `draw_backward` replays the same loop front to back and keeps what is still to come along each ray. Nothing but the images is
   needed from the forward pass, and there is no division by the transmittance. It leaves ten sums for each Gaussian and view.
5. `project_backward` takes these sums back to means, quaternions, scales, opacities and harmonics.

Nothing that is handed in may make these functions touch memory that is not theirs. `project` keeps a Gaussian only if all that is
computed from it is finite and within the limits below; every comparison that decides about an index is written so that NaN is
refused (`not x >= low`, never `x < low`); no number becomes an index before it is held between the ends of its range. With
NUMBA_BOUNDSCHECK=1 also the vector loads and stores are checked; `tests/test_render_fuzz.py` runs all of it that way.

All functions release the interpreter lock and write to memory of their own, so a caller may run them in threads: `project` over
views, `draw*` over (view, strip of columns), `project_backward` over ranges of Gaussians. Results do not depend on the threads.
All kernels live in one file because the on-disk cache does not see edits to a callee in another one.
"""

import math
import operator

import numpy as np
from llvmlite import ir
from numba import config, float64, njit, types
from numba.extending import intrinsic, models, overload, register_model

f32, u64 = np.float32, np.uint64

TILE_W, TILE_H = 8, 64  # pixels of a tile: one vector wide
ROW = 6 * TILE_W  # floats of a tile row in the working buffer: six images
N_REC, N_SUM = 8, 10  # floats that describe a 2-D Gaussian; sums that its backward leaves
CHECK = 16  # a tile asks after this many Gaussians whether any pixel still takes light

LOG2_255 = math.log2(255.0)
HALF_LOG2E = 0.5 / math.log(2.0)  # sigma = d' inv(cov) d / 2, in bits
LN4 = 2.0 * math.log(2.0)
WIDEST = 2.02 * math.log(
    255.0
)  # squared reach in standard deviations at opacity 1, with room for rounding
MARGIN = 1.0 + 1e-5  # extents are enlarged by this much: rounding never drops a pixel

# Limits of what is drawn. They leave room for the products of the backward pass in float32, and no scene comes near them.
LARGEST_VARIANCE = 1e30  # of an ellipse along an image axis, squared pixels
BRIGHTEST = 1e25  # largest colour
FARTHEST = 1e25  # largest depth
SHORTEST_QUAT = 1e-12  # a quaternion shorter than this has no direction
SAFE = 1e-6  # a c - b^2 is a plain difference down to this share of a c
LARGEST = float(np.finfo(np.float32).max)

ZERO, TINY = f32(0.0), f32(1e-10)
ALPHA_MAX, T_MIN = 0.999, 1e-4
EXP2 = (
    9.99999925e-01,
    6.93142253e-01,
    2.40172189e-01,
    5.52797228e-02,
    9.18861184e-03,
    9.38788340e-04,
)  # 2^x on [-1, 0]
CAP, FAINT, DARK, LIGHT = (
    56,
    64,
    72,
    80,
)  # where `table` keeps the largest alpha, log2 of the smallest, the least light, 1

# real spherical harmonics up to degree 3
S0, S1 = math.sqrt(1 / (4 * math.pi)), math.sqrt(3 / (4 * math.pi))
S2A, S2B, S2C = (
    math.sqrt(15 / (4 * math.pi)),
    math.sqrt(5 / (16 * math.pi)),
    math.sqrt(15 / (16 * math.pi)),
)
S3A, S3B, S3C = (
    math.sqrt(35 / (32 * math.pi)),
    math.sqrt(105 / (4 * math.pi)),
    math.sqrt(21 / (32 * math.pi)),
)
S3D, S3E = math.sqrt(7 / (16 * math.pi)), math.sqrt(105 / (16 * math.pi))

RULES = dict(nogil=True, error_model="numpy", fastmath={"contract"})
kernel = njit(cache=True, **RULES)
part = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **RULES)  # only called from kernels


# ---------------------------------------------------------------------------------------------------------------- one Gaussian


@part
def length_of(quat, g):
    "Length of the quaternion of Gaussian g; float32 is enough where its squares are neither too large nor too small for it."
    w, x, y, z = float(quat[g, 0]), float(quat[g, 1]), float(quat[g, 2]), float(quat[g, 3])
    length = float64(math.sqrt(w * w + x * x + y * y + z * z))
    if length >= 1e-12 and length <= 1e18:
        return length
    w, x, y, z = float64(w), float64(x), float64(y), float64(z)
    return math.sqrt(w * w + x * x + y * y + z * z)


@part
def rotation(quat, g):
    "Unit quaternion of Gaussian g, the inverse of its length, and the rotation matrix, row by row."
    w, x, y, z = float(quat[g, 0]), float(quat[g, 1]), float(quat[g, 2]), float(quat[g, 3])
    r = 1.0 / length_of(quat, g)
    w, x, y, z = w * r, x * r, y * r, z * r
    return (
        w,
        x,
        y,
        z,
        r,
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


@part
def cross(a0, a1, a2, b0, b1, b2):
    "Vector product of a and b."
    return a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0


@part
def normal_of(
    p00, p01, p02, p10, p11, p12, a00, a01, a02, a10, a11, a12, a20, a21, a22, s0, s1, s2
):
    """The vector product n of the two rows of Q = P A diag(s), without a difference of large numbers.

    The covariance Q Q' has the determinant |n|^2, and a Gaussian that is a million times longer than wide keeps its width."""
    n0, n1, n2 = cross(p00, p01, p02, p10, p11, p12)
    return (
        (n0 * a00 + n1 * a10 + n2 * a20) * s1 * s2,
        (n0 * a01 + n1 * a11 + n2 * a21) * s0 * s2,
        (n0 * a02 + n1 * a12 + n2 * a22) * s0 * s1,
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
def frustum(K, v, H, W):
    "Limits of x/z and y/z where the projection is linearised: the image and 15 % of its size around it."
    mx, my = 0.15 * W / K[v, 0, 0], 0.15 * H / K[v, 1, 1]
    return (
        -K[v, 0, 2] / K[v, 0, 0] - mx,
        (W - K[v, 0, 2]) / K[v, 0, 0] + mx,
        -K[v, 1, 2] / K[v, 1, 1] - my,
        (H - K[v, 1, 2]) / K[v, 1, 1] + my,
    )


@part
def harmonics(d, x, y, z, k):
    "Fill the first k spherical harmonics at the unit direction (x, y, z) and their derivatives: d [16 4], value first."
    d[0, 0], d[0, 1], d[0, 2], d[0, 3] = S0, 0.0, 0.0, 0.0
    if k > 1:
        d[1, 0], d[1, 1], d[1, 2], d[1, 3] = -S1 * y, 0.0, -S1, 0.0
        d[2, 0], d[2, 1], d[2, 2], d[2, 3] = S1 * z, 0.0, 0.0, S1
        d[3, 0], d[3, 1], d[3, 2], d[3, 3] = -S1 * x, -S1, 0.0, 0.0
    if k > 4:
        xx, yy, zz = x * x, y * y, z * z
        d[4, 0], d[4, 1], d[4, 2], d[4, 3] = S2A * x * y, S2A * y, S2A * x, 0.0
        d[5, 0], d[5, 1], d[5, 2], d[5, 3] = -S2A * y * z, 0.0, -S2A * z, -S2A * y
        d[6, 0], d[6, 1], d[6, 2], d[6, 3] = S2B * (3 * zz - 1), 0.0, 0.0, 6 * S2B * z
        d[7, 0], d[7, 1], d[7, 2], d[7, 3] = -S2A * x * z, -S2A * z, 0.0, -S2A * x
        d[8, 0], d[8, 1], d[8, 2], d[8, 3] = S2C * (xx - yy), 2 * S2C * x, -2 * S2C * y, 0.0
        if k > 9:
            d[9, 0], d[9, 1], d[9, 2], d[9, 3] = (
                -S3A * y * (3 * xx - yy),
                -6 * S3A * x * y,
                -3 * S3A * (xx - yy),
                0.0,
            )
            d[10, 0], d[10, 1], d[10, 2], d[10, 3] = (
                S3B * x * y * z,
                S3B * y * z,
                S3B * x * z,
                S3B * x * y,
            )
            d[11, 0], d[11, 1], d[11, 2], d[11, 3] = (
                -S3C * y * (5 * zz - 1),
                0.0,
                -S3C * (5 * zz - 1),
                -10 * S3C * y * z,
            )
            d[12, 0], d[12, 1], d[12, 2], d[12, 3] = (
                S3D * z * (5 * zz - 3),
                0.0,
                0.0,
                S3D * (15 * zz - 3),
            )
            d[13, 0], d[13, 1], d[13, 2], d[13, 3] = (
                -S3C * x * (5 * zz - 1),
                -S3C * (5 * zz - 1),
                0.0,
                -10 * S3C * x * z,
            )
            d[14, 0], d[14, 1], d[14, 2], d[14, 3] = (
                S3E * z * (xx - yy),
                2 * S3E * x * z,
                -2 * S3E * y * z,
                S3E * (xx - yy),
            )
            d[15, 0], d[15, 1], d[15, 2], d[15, 3] = (
                -S3A * x * (xx - 3 * yy),
                -3 * S3A * (xx - yy),
                6 * S3A * x * y,
                0.0,
            )


# ------------------------------------------------------------------------------------------------------------- forward, a view


@part
def sort_by_depth(depth, order):
    "Stable order of positive float64 depths: four counting passes over the 44 leading bits of their distance in bits."
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
    other, count = np.empty(n, np.int32), np.empty(2048, np.int32)
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


@kernel
def project(
    v,
    mean,
    quat,
    scale,
    opacity,
    sh,
    first,
    last,
    cam,
    K,
    H,
    W,
    near,
    far,
    eps2d,
    antialiased,
    ids,
    xy,
    rec,
    order,
):
    """Project Gaussians first..last into view v, keep those that can reach a pixel, sort them; returns how many there are.

    A Gaussian of which something is not finite, or beyond the limits at the head of this file, is left out.

    Written for each: `ids` its index, `xy` the centre in pixels, `rec` (e, f, h, log2 opacity, red, green, blue, depth). The
    triangle (e f; 0 h) is the root of the inverse covariance in bits: with y1 = e dx + f dy, y2 = h dy,
    alpha = opacity * 2^-(y1^2 + y2^2).
    """
    fx, fy, cx, cy = K[v, 0, 0], K[v, 1, 1], K[v, 0, 2], K[v, 1, 2]
    u0, u1, v0, v1 = frustum(K, v, H, W)
    r00, r01, r02 = cam[v, 0, 0], cam[v, 0, 1], cam[v, 0, 2]
    r10, r11, r12 = cam[v, 1, 0], cam[v, 1, 1], cam[v, 1, 2]
    r20, r21, r22 = cam[v, 2, 0], cam[v, 2, 1], cam[v, 2, 2]
    ox = -(r00 * cam[v, 0, 3] + r10 * cam[v, 1, 3] + r20 * cam[v, 2, 3])
    oy = -(r01 * cam[v, 0, 3] + r11 * cam[v, 1, 3] + r21 * cam[v, 2, 3])
    oz = -(r02 * cam[v, 0, 3] + r12 * cam[v, 1, 3] + r22 * cam[v, 2, 3])
    k, far = sh.shape[1], min(far, FARTHEST)
    Y, depth, m = np.empty((16, 4)), np.empty(last - first), 0
    for g in range(first, last):
        alpha = float(opacity[g])
        if not alpha * 255.0 >= 1.0:
            continue
        x, y, z = to_camera(mean, g, cam, v)
        if not (z >= near and z <= far):
            continue
        rz = 1.0 / z
        mx, my = fx * x * rz + cx, fy * y * rz + cy
        tu, tv = min(max(x * rz, u0), u1), min(max(y * rz, v0), v1)
        jx, jy = fx * rz, fy * rz
        s0, s1, s2 = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
        # cheap first: no ellipse is wider than that of a sphere of its largest scale
        widest = max(s0 * s0, s1 * s1, s2 * s2)
        off_x, off_y = max(0.5 - mx, mx - (W - 0.5), 0.0), max(0.5 - my, my - (H - 0.5), 0.0)
        if off_x * off_x > WIDEST * (jx * jx * (1 + tu * tu) * widest + eps2d):
            continue
        if off_y * off_y > WIDEST * (jy * jy * (1 + tv * tv) * widest + eps2d):
            continue
        _, _, _, _, inverse_length, a00, a01, a02, a10, a11, a12, a20, a21, a22 = rotation(quat, g)
        p00, p01, p02 = jx * (r00 - tu * r20), jx * (r01 - tu * r21), jx * (r02 - tu * r22)
        p10, p11, p12 = jy * (r10 - tv * r20), jy * (r11 - tv * r21), jy * (r12 - tv * r22)
        q00, q10 = (
            (p00 * a00 + p01 * a10 + p02 * a20) * s0,
            (p10 * a00 + p11 * a10 + p12 * a20) * s0,
        )
        q01, q11 = (
            (p00 * a01 + p01 * a11 + p02 * a21) * s1,
            (p10 * a01 + p11 * a11 + p12 * a21) * s1,
        )
        q02, q12 = (
            (p00 * a02 + p01 * a12 + p02 * a22) * s2,
            (p10 * a02 + p11 * a12 + p12 * a22) * s2,
        )
        a, b, c = (
            q00 * q00 + q01 * q01 + q02 * q02,
            q00 * q10 + q01 * q11 + q02 * q12,
            q10 * q10 + q11 * q11 + q12 * q12,
        )
        if not (
            a <= LARGEST_VARIANCE
            and c <= LARGEST_VARIANCE
            and inverse_length <= 1.0 / SHORTEST_QUAT
        ):
            continue
        det0 = a * c - b * b
        if not det0 > SAFE * a * c:
            n0, n1, n2 = normal_of(
                p00,
                p01,
                p02,
                p10,
                p11,
                p12,
                a00,
                a01,
                a02,
                a10,
                a11,
                a12,
                a20,
                a21,
                a22,
                s0,
                s1,
                s2,
            )
            det0 = n0 * n0 + n1 * n1 + n2 * n2
        a, c = a + eps2d, c + eps2d
        det = a * c - b * b
        if not det > SAFE * a * c:
            det = det0 + eps2d * (a + c - eps2d)
        if not (det > 0.0 and alpha <= LARGEST):
            continue
        if antialiased:
            alpha *= math.sqrt(det0 / det)
            if not alpha * 255.0 >= 1.0:
                continue
        lo = math.log2(alpha)
        reach = math.sqrt((lo + LOG2_255) / HALF_LOG2E) * MARGIN
        rx, ry = reach * math.sqrt(a), reach * math.sqrt(c)
        if not (mx + rx >= 0.5 and mx - rx <= W - 0.5 and my + ry >= 0.5 and my - ry <= H - 0.5):
            continue
        e, h = math.sqrt(HALF_LOG2E * c / det), math.sqrt(HALF_LOG2E / c)
        dx, dy, dz = float(mean[g, 0]) - ox, float(mean[g, 1]) - oy, float(mean[g, 2]) - oz
        distance = math.sqrt(dx * dx + dy * dy + dz * dz)
        if not distance > 0.0:
            continue
        r = 1.0 / distance
        harmonics(Y, dx * r, dy * r, dz * r, k)
        drawable = True
        for j in range(3):
            colour = 0.5
            for i in range(k):
                colour += Y[i, 0] * sh[g, i, j]
            if not (colour > -math.inf and colour <= BRIGHTEST):
                drawable = False
            rec[m, 4 + j] = max(colour, 0.0)
        if not drawable:
            continue
        ids[m], xy[m, 0], xy[m, 1], depth[m] = g, mx, my, z
        rec[m, 0], rec[m, 1], rec[m, 2], rec[m, 3], rec[m, 7] = e, -e * b / c, h, lo, z
        m += 1
    sort_by_depth(depth[:m], order)
    return m


# ------------------------------------------------------------------------------------------------------- eight floats at a time


class Float8(types.Type):
    "Eight float32 in a vector register (two of them where registers have 128 bits)."

    def __init__(self):
        super().__init__(name="float8")


float8 = Float8()
V8, V8I = ir.VectorType(ir.FloatType(), 8), ir.VectorType(ir.IntType(32), 8)
FUSE = ("contract",)  # a product and a sum may become one instruction


@register_model(Float8)
class Float8Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, V8)


def constant(value, kind=V8):
    return ir.Constant(kind, [value] * 8)


def pointer(context, builder, signature, args):
    "Address of array[index] as a vector pointer."
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), V8.as_pointer())


@intrinsic
def read8(typing, array, index):
    "array[index : index + 8] of a contiguous float32 array."

    def code(context, builder, signature, args):
        return builder.load(pointer(context, builder, signature, args), align=4)

    return float8(array, index), code


@intrinsic
def write8(typing, array, index, value):
    "array[index : index + 8] = value"

    def code(context, builder, signature, args):
        builder.store(args[2], pointer(context, builder, signature, args), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), code


load8, store8 = read8, write8
if config.BOUNDSCHECK:

    @part
    def load8(array, index):
        "`read8` that refuses what lies outside the array."
        if not (index >= 0 and index + 8 <= len(array)):
            raise IndexError("load8: outside the array")
        return read8(array, index)

    @part
    def store8(array, index, value):
        "`write8` that refuses what lies outside the array."
        if not (index >= 0 and index + 8 <= len(array)):
            raise IndexError("store8: outside the array")
        write8(array, index, value)


@intrinsic
def splat8(typing, value):
    "One float32 in all eight places."

    def code(context, builder, signature, args):
        one = builder.insert_element(
            ir.Constant(V8, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0)
        )
        return builder.shuffle_vector(one, ir.Constant(V8, ir.Undefined), constant(0, V8I))

    return float8(types.float32), code


def arithmetic(op, name):
    "Teach the compiler `op` between two float8."

    @intrinsic
    def apply(typing, a, b):
        def code(context, builder, signature, args):
            return getattr(builder, name)(*args, flags=FUSE)

        return float8(a, b), code

    @overload(op)
    def implementation(a, b):
        if a is float8 and b is float8:
            return lambda a, b: apply(a, b)


for op, name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    arithmetic(op, name)


@intrinsic
def pick8(typing, a, b, yes, no):
    "yes where a >= b, else no"

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], args[3])

    return float8(a, b, yes, no), code


@intrinsic
def keep8(typing, a, b, value):
    "value where a >= b, else 0"

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], constant(0.0))

    return float8(a, b, value), code


@intrinsic
def least8(typing, a, b):
    "The smaller of the two."

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return float8(a, b), code


@intrinsic
def size8(typing, a):
    "|a|"

    def code(context, builder, signature, args):
        return builder.bitcast(
            builder.and_(builder.bitcast(args[0], V8I), constant(2**31 - 1, V8I)), V8
        )

    return float8(a), code


@intrinsic
def dead8(typing, a):
    "-|a|"

    def code(context, builder, signature, args):
        return builder.bitcast(
            builder.or_(builder.bitcast(args[0], V8I), constant(-(2**31), V8I)), V8
        )

    return float8(a), code


@intrinsic
def any_alive8(typing, a):
    "Is any of the eight without a minus sign?"

    def code(context, builder, signature, args):
        mask = builder.icmp_signed(">=", builder.bitcast(args[0], V8I), constant(0, V8I))
        return builder.icmp_unsigned(
            "!=", builder.bitcast(mask, ir.IntType(8)), ir.Constant(ir.IntType(8), 0)
        )

    return types.boolean(a), code


@intrinsic
def whole8(typing, a):
    "The whole part of a, towards zero."

    def code(context, builder, signature, args):
        return builder.sitofp(builder.fptosi(args[0], V8I), V8)

    return float8(a), code


@intrinsic
def scale8(typing, a, power):
    "a * 2^power for whole numbers in `power` that leave a normal number."

    def code(context, builder, signature, args):
        up = builder.shl(builder.fptosi(args[1], V8I), constant(23, V8I))
        return builder.bitcast(builder.add(up, builder.bitcast(args[0], V8I)), V8)

    return float8(a, power), code


def table():
    """Constants of the inner loops, eight of each, as an array: read from memory they cost no instruction of their own.

    Pixel centres of a tile row; 2^x on [-1, 0] (relative error 7.5e-8); the largest alpha, the log2 of the smallest, the least light, 1."""
    numbers = [*EXP2, ALPHA_MAX, -LOG2_255, np.nextafter(f32(T_MIN), f32(1)), 1.0]
    return np.concatenate([np.arange(TILE_W) + 0.5, np.repeat(numbers, 8)]).astype(np.float32)


@part
def exp2_8(a, C):
    "2^a for -126 < a <= 0: the whole part goes into the exponent, a polynomial gives the rest."
    n = whole8(a)
    x = a - n
    xx = x * x
    p = (load8(C, 48) * x + load8(C, 40)) * xx + (load8(C, 32) * x + load8(C, 24))
    return scale8(p * xx + (load8(C, 16) * x + load8(C, 8)), n)


# ------------------------------------------------------------------------------------------------------------------------- tiles


@part
def columns(mx, half, begin, end):
    "Tile columns first..last, within begin..end, that a Gaussian of this half width reaches."
    first, last = (mx - half - 0.5) / TILE_W, (mx + half - 0.5) / TILE_W
    if not (first <= end and last >= begin):
        return begin, begin
    return max(int(math.floor(max(first, -1.0))), begin), min(
        int(math.floor(min(last, float(end)))) + 1, end
    )


@kernel
def column_lists(m, xy, rec, order, begin, end, H):
    """For tile columns begin..end: which Gaussians reach it, front to back, and in which rows exactly.

    Returns starts, ends [columns] and entry [.. 2] = (index, first row and last row in 16 bits each)."""
    starts, ends, half = (
        np.zeros(end - begin + 1, np.int64),
        np.empty(end - begin, np.int64),
        np.empty(m),
    )
    for i in range(m):
        e, f, h = float(rec[i, 0]), float(rec[i, 1]), float(rec[i, 2])
        half[i] = math.sqrt((f * f + h * h) * (float(rec[i, 3]) + LOG2_255) * MARGIN) / (e * h)
        c0, c1 = columns(xy[i, 0], half[i], begin, end)
        for c in range(c0, c1):
            starts[c - begin + 1] += 1
    for c in range(end - begin):
        starts[c + 1] += starts[c]
    for c in range(end - begin):
        ends[c] = starts[c]
    entry = np.empty((starts[end - begin], 2), np.int32)
    for j in range(m):
        i = order[j]
        mx, my, wide = xy[i, 0], xy[i, 1], half[i]
        e, f, h = float(rec[i, 0]), float(rec[i, 1]), float(rec[i, 2])
        c0, c1 = columns(mx, wide, begin, end)
        if c0 >= c1:
            continue
        # the ellipse is f'h dy^2 + 2 e f dx dy + e^2 dx^2 = room; its top lies at dx = tip, its bottom at -tip
        fh = f * f + h * h
        slope, aspect = -e * f / fh, e * h / fh
        tip = -f * wide / math.sqrt(fh)
        for c in range(c0, c1):
            left, right = (
                max(c * TILE_W + 0.5 - mx, -wide),
                min(c * TILE_W + (TILE_W - 0.5) - mx, wide),
            )
            if left > right:
                continue
            lo, hi = min(max(-tip, left), right), min(max(tip, left), right)
            lo = my + slope * lo - aspect * math.sqrt(max(wide * wide - lo * lo, 0.0))
            hi = my + slope * hi + aspect * math.sqrt(max(wide * wide - hi * hi, 0.0))
            if not (lo <= H and hi >= 0.0):
                continue
            r0, r1 = (
                max(int(math.ceil(max(lo, 0.0) - 0.5)), 0),
                int(math.floor(min(hi, H + 1.0) - 0.5)) + 1,
            )
            r1 = min(r1, H)
            if r0 < r1:
                at = ends[c - begin]
                entry[at, 0], entry[at, 1] = i, r0 << 16 | r1
                ends[c - begin] = at + 1
    return starts, ends, entry


@part
def alive(buf, rows):
    "Does any pixel of the first rows of a tile still take light?"
    for y in range(rows):
        if any_alive8(load8(buf, y * ROW)):
            return True
    return False


@part
def blend(buf, at, rows, C, e, f, h, lo, k1, k2, r, g, b, z):
    "Add one Gaussian to some rows of a tile. A row of the buffer holds light, red, green, blue, depth, alpha of 8 pixels."
    y1, y2, f, h, lo = (
        splat8(e) * load8(C, 0) + splat8(k1),
        splat8(k2),
        splat8(f),
        splat8(h),
        splat8(lo),
    )
    r, g, b, z = splat8(r), splat8(g), splat8(b), splat8(z)
    for _ in range(rows):
        T = load8(buf, at)
        if any_alive8(T):
            q = lo - y1 * y1 - y2 * y2
            alpha = least8(exp2_8(q, C), load8(C, CAP))
            alpha = keep8(q, load8(C, FAINT), alpha)
            w = T * alpha
            left = T - w
            w = keep8(left, load8(C, DARK), w)
            store8(buf, at, pick8(left, load8(C, DARK), left, dead8(T)))
            store8(buf, at + 8, load8(buf, at + 8) + w * r)
            store8(buf, at + 16, load8(buf, at + 16) + w * g)
            store8(buf, at + 24, load8(buf, at + 24) + w * b)
            store8(buf, at + 32, load8(buf, at + 32) + w * z)
            store8(buf, at + 40, load8(buf, at + 40) + w)
        y1, y2, at = y1 + f, y2 + h, at + ROW


@kernel
def draw(C, xy, rec, starts, ends, entry, begin, end, back, rgb, alpha, depth, light):
    """Draw tile columns begins..end of one view, whose width must be a multiple of 8.

    Images are flat: rgb [3 h w]; alpha, depth and the light that is left, [h w]; size (H, W) comes from the shape of alpha."""
    H, W = alpha.shape
    rgb, alpha, depth, light = (
        rgb.reshape(-1),
        alpha.reshape(-1),
        depth.reshape(-1),
        light.reshape(-1),
    )
    back_r, back_g, back_b, tiny = splat8(back[0]), splat8(back[1]), splat8(back[2]), splat8(TINY)
    buf = np.empty(ROW * TILE_H, np.float32)
    for c in range(begin, end):
        x0 = c * TILE_W
        for y0 in range(0, H, TILE_H):
            y1, seen = min(y0 + TILE_H, H), 0
            for i in range(len(buf)):
                buf[i] = ZERO
            for y in range(y1 - y0):
                store8(buf, y * ROW, load8(C, LIGHT))
            for t in range(starts[c - begin], ends[c - begin]):
                r0, r1 = max(entry[t, 1] >> 16, y0), min(entry[t, 1] & 0xFFFF, y1)
                if r0 >= r1:
                    continue
                i = entry[t, 0]
                dx, dy = x0 - xy[i, 0], r0 + 0.5 - xy[i, 1]
                k1, k2 = f32(rec[i, 0] * dx + rec[i, 1] * dy), f32(rec[i, 2] * dy)
                blend(
                    buf,
                    (r0 - y0) * ROW,
                    r1 - r0,
                    C,
                    rec[i, 0],
                    rec[i, 1],
                    rec[i, 2],
                    rec[i, 3],
                    k1,
                    k2,
                    rec[i, 4],
                    rec[i, 5],
                    rec[i, 6],
                    rec[i, 7],
                )
                seen += 1
                if seen % CHECK == 0 and not alive(buf, y1 - y0):
                    break
            for y in range(y0, y1):
                p, at = (y - y0) * ROW, y * W + x0
                T, A = size8(load8(buf, p)), load8(buf, p + 40)
                store8(light, at, T)
                store8(alpha, at, A)
                store8(depth, at, load8(buf, p + 32) / pick8(A, tiny, A, tiny))
                store8(rgb, at, load8(buf, p + 8) + T * back_r)
                store8(rgb, at + H * W, load8(buf, p + 16) + T * back_g)
                store8(rgb, at + 2 * H * W, load8(buf, p + 24) + T * back_b)


# ------------------------------------------------------------------------------------------------------------------- backward


@part
def blend_backward(buf, at, rows, C, e, f, h, lo, k1, k2, r, g, b, z, lanes, own):
    """The same rows again, from the front. A row of the buffer holds light, what is still to come along the ray times its
    gradient, and the gradients of red, green, blue and depth. Adds to lanes[own : own + 80] ten sums, eight parts each:
    v, v y1, v y2, v y1^2, v y1 y2, v y2^2, with v = dL / d ln alpha, and weight times gradient of red, green, blue, depth.

    Within a column of pixels y1 = a + ratio * y2 with constant a, so three sums with v are enough until the end."""
    y1, y2, f, h, lo = (
        splat8(e) * load8(C, 0) + splat8(k1),
        splat8(k2),
        splat8(f),
        splat8(h),
        splat8(lo),
    )
    r, g, b, z, zero = splat8(r), splat8(g), splat8(b), splat8(z), splat8(ZERO)
    s, s2, s22, cr, cg, cb, cz = zero, zero, zero, zero, zero, zero, zero
    ratio = f / h
    a = y1 - ratio * y2
    for _ in range(rows):
        T = load8(buf, at)
        if any_alive8(T):
            q = lo - y1 * y1 - y2 * y2
            full = exp2_8(q, C)
            alpha = least8(full, load8(C, CAP))
            alpha = keep8(q, load8(C, FAINT), alpha)
            w = T * alpha
            left = T - w
            w = keep8(left, load8(C, DARK), w)
            store8(buf, at, pick8(left, load8(C, DARK), left, dead8(T)))
            gr, gg, gb, gz = (
                load8(buf, at + 16),
                load8(buf, at + 24),
                load8(buf, at + 32),
                load8(buf, at + 40),
            )
            mine = w * (gr * r + gg * g + gb * b + gz * z)
            rest = load8(buf, at + 8) - mine
            store8(buf, at + 8, rest)
            cr, cg, cb, cz = cr + w * gr, cg + w * gg, cb + w * gb, cz + w * gz
            v = mine - keep8(left, load8(C, DARK), rest * (alpha / (load8(C, LIGHT) - alpha)))
            v = keep8(load8(C, CAP), full, v)
            v2 = v * y2
            s, s2, s22 = s + v, s2 + v2, s22 + v2 * y2
        y1, y2, at = y1 + f, y2 + h, at + ROW
    s1, s12 = a * s + ratio * s2, a * s2 + ratio * s22
    s11 = a * s1 + ratio * s12
    store8(lanes, own, load8(lanes, own) + s)
    store8(lanes, own + 8, load8(lanes, own + 8) + s1)
    store8(lanes, own + 16, load8(lanes, own + 16) + s2)
    store8(lanes, own + 24, load8(lanes, own + 24) + s11)
    store8(lanes, own + 32, load8(lanes, own + 32) + s12)
    store8(lanes, own + 40, load8(lanes, own + 40) + s22)
    store8(lanes, own + 48, load8(lanes, own + 48) + cr)
    store8(lanes, own + 56, load8(lanes, own + 56) + cg)
    store8(lanes, own + 64, load8(lanes, own + 64) + cb)
    store8(lanes, own + 72, load8(lanes, own + 72) + cz)


@kernel
def draw_backward(
    C,
    xy,
    rec,
    starts,
    ends,
    entry,
    begin,
    end,
    rgb,
    alpha,
    depth,
    light,
    g_rgb,
    g_alpha,
    g_depth,
    sums,
    g_back,
):
    "Gradients of tile columns begin..end of one view: fills sums [m 10] of the 2-D Gaussians and g_back [3]."
    (H, W), m = alpha.shape, len(sums)
    rgb, alpha, depth, light = (
        rgb.reshape(-1),
        alpha.reshape(-1),
        depth.reshape(-1),
        light.reshape(-1),
    )
    g_rgb, g_alpha, g_depth = g_rgb.reshape(-1), g_alpha.reshape(-1), g_depth.reshape(-1)
    buf, lanes, ends8 = (
        np.empty(ROW * TILE_H, np.float32),
        np.zeros(m * 8 * N_SUM, np.float32),
        np.empty(24, np.float32),
    )
    back_r, back_g, back_b, tiny = splat8(ZERO), splat8(ZERO), splat8(ZERO), splat8(TINY)
    for c in range(begin, end):
        x0 = c * TILE_W
        for y0 in range(0, H, TILE_H):
            y1, seen = min(y0 + TILE_H, H), 0
            for y in range(y0, y1):
                p, at = (y - y0) * ROW, y * W + x0
                A, T, D = load8(alpha, at), load8(light, at), load8(depth, at)
                gr, gg, gb, gd = (
                    load8(g_rgb, at),
                    load8(g_rgb, at + H * W),
                    load8(g_rgb, at + 2 * H * W),
                    load8(g_depth, at),
                )
                gz = keep8(A, tiny, gd / pick8(A, tiny, A, tiny))
                rest = (
                    gr * load8(rgb, at)
                    + gg * load8(rgb, at + H * W)
                    + gb * load8(rgb, at + 2 * H * W)
                )
                store8(buf, p, load8(C, LIGHT))
                store8(buf, p + 8, rest + gz * D * A - T * (load8(g_alpha, at) - gz * D))
                store8(buf, p + 16, gr)
                store8(buf, p + 24, gg)
                store8(buf, p + 32, gb)
                store8(buf, p + 40, gz)
                back_r, back_g, back_b = back_r + gr * T, back_g + gg * T, back_b + gb * T
            for t in range(starts[c - begin], ends[c - begin]):
                r0, r1 = max(entry[t, 1] >> 16, y0), min(entry[t, 1] & 0xFFFF, y1)
                if r0 >= r1:
                    continue
                i = entry[t, 0]
                dx, dy = x0 - xy[i, 0], r0 + 0.5 - xy[i, 1]
                k1, k2 = f32(rec[i, 0] * dx + rec[i, 1] * dy), f32(rec[i, 2] * dy)
                blend_backward(
                    buf,
                    (r0 - y0) * ROW,
                    r1 - r0,
                    C,
                    rec[i, 0],
                    rec[i, 1],
                    rec[i, 2],
                    rec[i, 3],
                    k1,
                    k2,
                    rec[i, 4],
                    rec[i, 5],
                    rec[i, 6],
                    rec[i, 7],
                    lanes,
                    i * 8 * N_SUM,
                )
                seen += 1
                if seen % CHECK == 0 and not alive(buf, y1 - y0):
                    break
    store8(ends8, 0, back_r)
    store8(ends8, 8, back_g)
    store8(ends8, 16, back_b)
    for j in range(3):
        total = ZERO
        for o in range(8):
            total += ends8[8 * j + o]
        g_back[j] = total
    for i in range(m):
        for j in range(N_SUM):
            total = ZERO
            for o in range(8):
                total += lanes[(i * N_SUM + j) * 8 + o]
            sums[i, j] = total


@part
def root_gradient(e, f, h, y1, y2, got):
    "One column of dL/dQ for a narrow ellipse: (y1, y2) is the root (e f; 0 h) times that column of Q."
    k2 = LN4 * LN4
    z1, z2 = got[3] * y1 + got[4] * y2, got[4] * y1 + got[5] * y2
    return k2 * e * z1, k2 * (f * z1 + h * z2)


@kernel
def project_backward(
    first,
    last,
    view_first,
    view_last,
    mean,
    quat,
    scale,
    opacity,
    sh,
    cam,
    K,
    H,
    W,
    eps2d,
    antialiased,
    base,
    count,
    ids,
    rec,
    sums,
    g_mean,
    g_quat,
    g_scale,
    g_opacity,
    g_sh,
):
    """Gradients of Gaussians first..last of one cloud from the sums of its views view_first..view_last.

    `base[v]`, `count[v]` say where view v keeps its rows of `ids`, `rec` and `sums` [strips, rows, 10]. The gradients come in as
    zeros; those of a Gaussian that no view draws stay so.
    """
    k, n_views = sh.shape[1], view_last - view_first
    cursor, centre, Y, got = (
        np.empty(n_views, np.int64),
        np.empty((n_views, 3)),
        np.empty((16, 4)),
        np.empty(N_SUM),
    )
    acc_sh = np.empty((16, 3))
    for o in range(n_views):
        v = view_first + o
        lo, hi = base[v], base[v] + count[v]
        while lo < hi:
            mid = (lo + hi) // 2
            if ids[mid] < first:
                lo = mid + 1
            else:
                hi = mid
        cursor[o] = lo
        for j in range(3):
            centre[o, j] = -(
                cam[v, 0, j] * cam[v, 0, 3]
                + cam[v, 1, j] * cam[v, 1, 3]
                + cam[v, 2, j] * cam[v, 2, 3]
            )
    for g in range(first, last):
        drawn = False
        for o in range(n_views):
            at = cursor[o]
            if at < base[view_first + o] + count[view_first + o] and ids[at] == g:
                drawn = True
        if not drawn:
            continue  # and something of it may not be finite
        w, x, y, z, norm, a00, a01, a02, a10, a11, a12, a20, a21, a22 = rotation(quat, g)
        s0, s1, s2 = float(scale[g, 0]), float(scale[g, 1]), float(scale[g, 2])
        m00, m01, m02, m10, m11, m12 = a00 * s0, a01 * s1, a02 * s2, a10 * s0, a11 * s1, a12 * s2
        m20, m21, m22 = a20 * s0, a21 * s1, a22 * s2
        gm0, gm1, gm2, g_log = 0.0, 0.0, 0.0, 0.0
        d00, d01, d02, d10, d11, d12, d20, d21, d22 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(k):
            for j in range(3):
                acc_sh[i, j] = 0.0
        for o in range(n_views):
            v, at = view_first + o, cursor[o]
            if at >= base[v] + count[v] or ids[at] != g:
                continue
            cursor[o] = at + 1
            for j in range(N_SUM):
                total = 0.0
                for strip in range(sums.shape[0]):
                    total += sums[strip, at, j]
                got[j] = total
            e, f, h = float(rec[at, 0]), float(rec[at, 1]), float(rec[at, 2])
            g_log += got[0]

            # harmonics and the direction they are seen from
            dx, dy, dz = (
                float(mean[g, 0]) - centre[o, 0],
                float(mean[g, 1]) - centre[o, 1],
                float(mean[g, 2]) - centre[o, 2],
            )
            r = 1.0 / math.sqrt(dx * dx + dy * dy + dz * dz)
            dx, dy, dz = dx * r, dy * r, dz * r
            harmonics(Y, dx, dy, dz, k)
            hx, hy, hz = 0.0, 0.0, 0.0
            for j in range(3):
                if rec[at, 4 + j] > ZERO:
                    gc = got[6 + j]
                    for i in range(k):
                        acc_sh[i, j] += Y[i, 0] * gc
                        c = sh[g, i, j] * gc
                        hx += Y[i, 1] * c
                        hy += Y[i, 2] * c
                        hz += Y[i, 3] * c
            along = hx * dx + hy * dy + hz * dz
            gm0 += (hx - along * dx) * r
            gm1 += (hy - along * dy) * r
            gm2 += (hz - along * dz) * r

            # the forward projection once more
            X, Yc, Z = to_camera(mean, g, cam, v)
            fx, fy = K[v, 0, 0], K[v, 1, 1]
            u0, u1, v0, v1 = frustum(K, v, H, W)
            rz = 1.0 / Z
            tu, tv = min(max(X * rz, u0), u1), min(max(Yc * rz, v0), v1)
            jx, jy = fx * rz, fy * rz
            r00, r01, r02 = cam[v, 0, 0], cam[v, 0, 1], cam[v, 0, 2]
            r10, r11, r12 = cam[v, 1, 0], cam[v, 1, 1], cam[v, 1, 2]
            r20, r21, r22 = cam[v, 2, 0], cam[v, 2, 1], cam[v, 2, 2]
            p00, p01, p02 = jx * (r00 - tu * r20), jx * (r01 - tu * r21), jx * (r02 - tu * r22)
            p10, p11, p12 = jy * (r10 - tv * r20), jy * (r11 - tv * r21), jy * (r12 - tv * r22)
            q00, q10 = p00 * m00 + p01 * m10 + p02 * m20, p10 * m00 + p11 * m10 + p12 * m20
            q01, q11 = p00 * m01 + p01 * m11 + p02 * m21, p10 * m01 + p11 * m11 + p12 * m21
            q02, q12 = p00 * m02 + p01 * m12 + p02 * m22, p10 * m02 + p11 * m12 + p12 * m22

            # B = dL/dQ; the covariance is Q Q' with Q = P M, M = R diag(scale); then the centre in pixels
            k2 = 0.5 * LN4 * LN4
            g_mx, g_my = LN4 * e * got[1], LN4 * (f * got[1] + h * got[2])
            a, b, c = (
                q00 * q00 + q01 * q01 + q02 * q02,
                q00 * q10 + q01 * q11 + q02 * q12,
                q10 * q10 + q11 * q11 + q12 * q12,
            )
            det0 = a * c - b * b
            det = (a + eps2d) * (c + eps2d) - b * b
            if det > SAFE * (a + eps2d) * (c + eps2d):
                # G = dL/dcov (symmetric), B = 2 G Q
                G00 = k2 * e * e * got[3]
                G01 = k2 * e * (f * got[3] + h * got[4])
                G11 = k2 * (f * f * got[3] + 2 * f * h * got[4] + h * h * got[5])
                if antialiased:
                    if not det0 > SAFE * a * c:
                        n0, n1, n2 = normal_of(
                            p00,
                            p01,
                            p02,
                            p10,
                            p11,
                            p12,
                            a00,
                            a01,
                            a02,
                            a10,
                            a11,
                            a12,
                            a20,
                            a21,
                            a22,
                            s0,
                            s1,
                            s2,
                        )
                        det0 = n0 * n0 + n1 * n1 + n2 * n2
                    i0, i1 = 0.5 * got[0] / det0, 0.5 * got[0] / det
                    G00 += i0 * c - i1 * (c + eps2d)
                    G01 -= i0 * b - i1 * b
                    G11 += i0 * a - i1 * (a + eps2d)
                b00, b01, b02 = (
                    2 * (G00 * q00 + G01 * q10),
                    2 * (G00 * q01 + G01 * q11),
                    2 * (G00 * q02 + G01 * q12),
                )
                b10, b11, b12 = (
                    2 * (G01 * q00 + G11 * q10),
                    2 * (G01 * q01 + G11 * q11),
                    2 * (G01 * q02 + G11 * q12),
                )
            else:
                # much longer than wide: G Q would lose what is small in it. With n = q0 x q1 there is no difference:
                # c q0 - b q1 = q1 x n, and a q1 - b q0 = n x q0
                n0, n1, n2 = normal_of(
                    p00,
                    p01,
                    p02,
                    p10,
                    p11,
                    p12,
                    a00,
                    a01,
                    a02,
                    a10,
                    a11,
                    a12,
                    a20,
                    a21,
                    a22,
                    s0,
                    s1,
                    s2,
                )
                det0 = n0 * n0 + n1 * n1 + n2 * n2
                det = det0 + eps2d * (a + c + eps2d)
                top0, top1, top2 = cross(q10, q11, q12, n0, n1, n2)
                low0, low1, low2 = cross(n0, n1, n2, q00, q01, q02)
                c += eps2d
                e, h = math.sqrt(HALF_LOG2E * c / det), math.sqrt(HALF_LOG2E / c)
                f = -e * b / c
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
            t00, t01, t02 = (
                b00 * m00 + b01 * m01 + b02 * m02,
                b00 * m10 + b01 * m11 + b02 * m12,
                b00 * m20 + b01 * m21 + b02 * m22,
            )
            t10, t11, t12 = (
                b10 * m00 + b11 * m01 + b12 * m02,
                b10 * m10 + b11 * m11 + b12 * m12,
                b10 * m20 + b11 * m21 + b12 * m22,
            )

            # P = (fx/z)(row_x - u row_z), u = x/z held inside the frustum
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

        g_mean[g, 0], g_mean[g, 1], g_mean[g, 2] = to_float32(gm0), to_float32(gm1), to_float32(gm2)
        g_opacity[g] = to_float32(g_log / opacity[g])
        for i in range(k):
            for j in range(3):
                g_sh[g, i, j] = to_float32(acc_sh[i, j])
        g_scale[g, 0] = to_float32(d00 * a00 + d10 * a10 + d20 * a20)
        g_scale[g, 1] = to_float32(d01 * a01 + d11 * a11 + d21 * a21)
        g_scale[g, 2] = to_float32(d02 * a02 + d12 * a12 + d22 * a22)
        d00, d10, d20, d01, d11, d21, d02, d12, d22 = (
            d00 * s0,
            d10 * s0,
            d20 * s0,
            d01 * s1,
            d11 * s1,
            d21 * s1,
            d02 * s2,
            d12 * s2,
            d22 * s2,
        )
        gw = 2 * (-z * d01 + y * d02 + z * d10 - x * d12 - y * d20 + x * d21)
        gx = 2 * (y * (d01 + d10) + z * (d02 + d20) - 2 * x * (d11 + d22) + w * (d21 - d12))
        gy = 2 * (x * (d01 + d10) + z * (d12 + d21) - 2 * y * (d00 + d22) + w * (d02 - d20))
        gz = 2 * (x * (d02 + d20) + y * (d12 + d21) - 2 * z * (d00 + d11) + w * (d10 - d01))
        along = w * gw + x * gx + y * gy + z * gz
        g_quat[g, 0], g_quat[g, 1] = (
            to_float32((gw - along * w) * norm),
            to_float32((gx - along * x) * norm),
        )
        g_quat[g, 2], g_quat[g, 3] = (
            to_float32((gy - along * y) * norm),
            to_float32((gz - along * z) * norm),
        )
