"""Products of the small matrices that kernels keep in the cache.

A BLAS copies both matrices into an order of its own before it multiplies, which for 64 tokens costs as much as a third
of the product. Here the sums of a tile of the result stay in registers while rows of y and single numbers of x stream
by from where they are; only a turned y is copied.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from remanence.ops.compiled import gemm as blas
from remanence.ops.compiled import jit


def _vector_bytes() -> int:
    try:
        has = llvm.get_host_cpu_features()
    except RuntimeError:  # not every system tells
        return 16
    return 64 if has.get("avx512f") else 32 if has.get("avx") else 16


BYTES = _vector_bytes()
"""Of a vector register."""
FASTER = BYTES == 64 and llvm.get_host_cpu_name().startswith("znver")
"""Whether tiles are faster than PyTorch's BLAS for large matrices, too: of AMD's processors it gets three quarters."""
ROWS = 4 if BYTES == 32 else 8
"""Of a tile that is two vectors wide: its sums, a row of y and a number of x fit into 16 registers, or into 32."""


def _tile_of(rows: int) -> Any:
    @intrinsic
    def tile(typing, x, x_at, x_row, x_step, y, y_at, y_step, out, out_at, out_row, depth, sign, keep):
        """out = keep · out + sign · x y, of `rows` rows and two vectors; x_ip is at x_at + i x_row + p x_step."""
        n, real = numba.types.intp, out.dtype

        def generate(context, builder, signature, arguments):
            x, x_at, x_row, x_step, y, y_at, y_step, out, out_at, out_row, depth, sign, keep = arguments
            number = context.get_value_type(real)
            lanes = 8 * BYTES // real.bitwidth
            vector = ir.VectorType(number, lanes)
            size, flags = ir.Constant(ir.IntType(64), lanes), ("contract",)

            def data(array, kind):
                return context.make_array(kind)(context, builder, value=array).data

            def at(start, *offsets):
                for offset in offsets:
                    start = builder.gep(start, [offset])
                return start

            def load(place):
                return builder.load(builder.bitcast(place, vector.as_pointer()), align=real.bitwidth // 8, typ=vector)

            def spread(value):
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)

            x_from, y_from = at(data(x, signature.args[0]), x_at), at(data(y, signature.args[4]), y_at)
            to = at(data(out, signature.args[7]), out_at)
            zero = ir.Constant(vector, [ir.Constant(number, 0.0)] * lanes)
            none, one = ir.Constant(depth.type, 0), ir.Constant(depth.type, 1)
            before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.cbranch(builder.icmp_signed(">", depth, none), loop, after)

            builder.position_at_end(loop)
            p = builder.phi(depth.type)
            p.add_incoming(none, before)
            sums = [[builder.phi(vector) for _ in range(2)] for _ in range(rows)]
            row = at(y_from, builder.mul(p, y_step))
            ys = load(row), load(at(row, size))
            column, i_row, after_sums = at(x_from, builder.mul(p, x_step)), none, []
            for pair in sums:
                a = spread(builder.load(at(column, i_row), typ=number))
                i_row = builder.add(i_row, x_row)
                products = [builder.fmul(a, b, flags=flags) for b in ys]
                after_sums.append([builder.fadd(s, ab, flags=flags) for s, ab in zip(pair, products, strict=True)])
            following = builder.add(p, one)
            p.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
            for pair, grown in zip(sums, after_sums, strict=True):
                for s, g in zip(pair, grown, strict=True):
                    s.add_incoming(zero, before)
                    s.add_incoming(g, loop)

            builder.position_at_end(after)
            found = []
            for grown in after_sums:
                found.append([builder.phi(vector) for _ in grown])
                for f, g in zip(found[-1], grown, strict=True):
                    f.add_incoming(zero, before)
                    f.add_incoming(g, loop)
            sign_of, keep_of = spread(sign), spread(keep)
            kept = builder.fcmp_unordered("!=", keep, ir.Constant(number, 0.0))
            place = to
            for pair in found:
                for v, f in enumerate(pair):
                    here = at(place, size) if v else place
                    value = builder.fmul(sign_of, f)
                    with builder.if_else(kept) as (then, otherwise):
                        with then:
                            old = builder.fmul(keep_of, load(here), flags=flags)
                            total, added = builder.fadd(old, value, flags=flags), builder.block
                        with otherwise:
                            alone = builder.block
                    result = builder.phi(vector)
                    result.add_incoming(total, added)
                    result.add_incoming(value, alone)
                    where = builder.bitcast(here, vector.as_pointer())
                    builder.store(result, where, align=real.bitwidth // 8)
                place = at(place, out_row)
            return context.get_dummy_value()

        return numba.types.void(x, n, n, n, y, n, n, out, n, n, n, real, real), generate

    return tile


_tile, _half, _pair, _line = _tile_of(ROWS), _tile_of(4), _tile_of(2), _tile_of(1)


@intrinsic
def _block(typing, y, at, step, panel, to, width):
    """As many rows of y as a vector has numbers, from `at` on, as columns of the panel from `to` on."""
    n, real = numba.types.intp, panel.dtype

    def generate(context, builder, signature, arguments):
        y, at, step, panel, to, width = arguments
        lanes = 8 * BYTES // real.bitwidth
        vector = ir.VectorType(context.get_value_type(real), lanes)

        def places(array, kind, first, apart):
            place = builder.gep(context.make_array(kind)(context, builder, value=array).data, [first])
            for _ in range(lanes):
                yield builder.bitcast(place, vector.as_pointer())
                place = builder.gep(place, [apart])

        def mixed(a, b, order):
            index = ir.Constant(ir.VectorType(ir.IntType(32), lanes), order)
            return builder.shuffle_vector(a, b, index)

        align = real.bitwidth // 8
        v = [builder.load(place, align=align, typ=vector) for place in places(y, signature.args[0], at, step)]
        half = 1
        while half < lanes:  # swap what stands off the diagonal in squares of twice the half
            low = [d if not d & half else lanes + d - half for d in range(lanes)]
            high = [d + half if not d & half else lanes + d for d in range(lanes)]
            for i in range(lanes):
                if not i & half:
                    v[i], v[i + half] = mixed(v[i], v[i + half], low), mixed(v[i], v[i + half], high)
            half *= 2
        for row, place in zip(v, places(panel, signature.args[3], to, width), strict=True):
            builder.store(row, place, align=align)
        return context.get_dummy_value()

    return numba.types.void(y, n, n, panel, n, n), generate


@jit
def turn(y, first, panel):
    """Rows of y from `first` on as the columns of a panel."""
    depth, width = panel.shape
    lanes, step, to = BYTES // panel.itemsize, y.strides[0] // panel.itemsize, panel.strides[0] // panel.itemsize
    deep, wide = depth - depth % lanes, width - width % lanes
    for j in range(0, wide, lanes):
        for p in range(0, deep, lanes):
            _block(y, (first + j) * step + p, step, panel, p * to + j, to)  # type: ignore[call-arg]
    for j in range(width):
        row = y[first + j]
        for p in range(deep if j < wide else 0, depth):
            panel[p, j] = row[p]


@jit
def tiles(x, x_row, x_step, y, y_at, y_step, out, out_at, out_row, rows, depth, sign, keep):
    """Two vectors' columns of the result."""
    for i in range(0, rows - ROWS + 1, ROWS):
        _tile(x, i * x_row, x_row, x_step, y, y_at, y_step, out, out_at + i * out_row, out_row, depth, sign, keep)
    i = rows - rows % ROWS
    if rows - i >= 4:
        _half(x, i * x_row, x_row, x_step, y, y_at, y_step, out, out_at + i * out_row, out_row, depth, sign, keep)
        i += 4
    if rows - i >= 2:
        _pair(x, i * x_row, x_row, x_step, y, y_at, y_step, out, out_at + i * out_row, out_row, depth, sign, keep)
        i += 2
    if rows - i:
        _line(x, i * x_row, x_row, x_step, y, y_at, y_step, out, out_at + i * out_row, out_row, depth, sign, keep)


@jit
def gemm(sign, x, x_turned, y, y_turned, keep, out):
    """`compiled.gemm`, by tiles where the columns are a whole number of them."""
    size, real = out.itemsize, out.dtype.type
    rows, columns = out.shape
    depth, width = x.shape[0] if x_turned else x.shape[1], 2 * BYTES // size
    if columns % width:
        blas(sign, x, x_turned, y, y_turned, keep, out)
        return
    x_row, x_step, y_step, out_row = x.strides[0] // size, 1, y.strides[0] // size, out.strides[0] // size
    if x_turned:
        x_row, x_step = x_step, x_row
    sign, keep = real(sign), real(keep)
    panel = np.empty((depth if y_turned else 0, width), out.dtype)
    for j in range(0, columns, width):
        if y_turned:
            turn(y, j, panel)
            tiles(x, x_row, x_step, panel, 0, width, out, j, out_row, rows, depth, sign, keep)
        else:
            tiles(x, x_row, x_step, y, j, y_step, out, j, out_row, rows, depth, sign, keep)
