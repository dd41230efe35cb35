"""Vector registers for compiled kernels whose loops the compiler does not vectorise by itself: loads, stores, sums.

A vector holds `lanes` numbers, as many as a register of this processor. Arrays are given whole, with the place of the
first number counted from their beginning; they are contiguous, and nothing checks that a place lies inside.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.extending import intrinsic, overload

from remanence.ops.product_kernels import BYTES

_FLAGS = ("contract", "reassoc", "nsz")
_operation: Any = intrinsic


def _lanes(real: Any) -> int:
    return 8 * BYTES // real.bitwidth


class Vector(types.Type):
    """A register of float32 or float64."""

    def __init__(self, real: Any):
        self.real = real
        super().__init__(name=f"Vector({real}, {_lanes(real)})")


@register_default(Vector)
class _Model(PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector):
        number = ir.FloatType() if kind.real == types.float32 else ir.DoubleType()
        super().__init__(manager, kind, ir.VectorType(number, _lanes(kind.real)))


def lanes(x: Any) -> int:
    """How many numbers such as those of an array a vector holds."""
    raise TypeError("lanes is for compiled code.")


@overload(lanes, inline="always")
def _lanes_of(x):
    n = _lanes(x.dtype)
    return lambda x: n


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [at])


def _spread(builder: Any, vector: Any, number: Any) -> Any:
    none, index = ir.Constant(vector, ir.Undefined), ir.IntType(32)
    one = builder.insert_element(none, number, ir.Constant(index, 0))
    return builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(index, vector.count), [0] * vector.count))


@_operation
def load(typing, array, at):
    """The vector that begins at a place of an array."""

    def generate(context, builder, signature, arguments):
        kind = signature.return_type
        place = _place(context, builder, signature.args[0], *arguments)
        vector = context.get_value_type(kind)
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=kind.real.bitwidth // 8, typ=vector)

    return Vector(array.dtype)(array, types.intp), generate


@_operation
def store(typing, array, at, x):
    """Put a vector at a place of an array."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], *arguments[:2])
        vector = context.get_value_type(signature.args[2])
        builder.store(
            arguments[2], builder.bitcast(place, vector.as_pointer()), align=signature.args[2].real.bitwidth // 8
        )

    return types.void(array, types.intp, x), generate


@_operation
def spread(typing, array, at):
    """A vector of the number at a place of an array, as often as it has lanes."""

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(signature.return_type)
        return _spread(builder, vector, builder.load(_place(context, builder, signature.args[0], *arguments)))

    return Vector(array.dtype)(array, types.intp), generate


@_operation
def fully(typing, number):
    """A vector of one number, as often as it has lanes."""

    def generate(context, builder, signature, arguments):
        return _spread(builder, context.get_value_type(signature.return_type), arguments[0])

    return Vector(number)(number), generate


@_operation
def times(typing, x, y):
    """x ⊙ y."""

    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments, flags=_FLAGS)

    return x(x, y), generate


@_operation
def minus(typing, x, y):
    """x − y."""

    def generate(context, builder, signature, arguments):
        return builder.fsub(*arguments, flags=_FLAGS)

    return x(x, y), generate


@_operation
def plus_product(typing, total, x, y):
    """total + x ⊙ y."""

    def generate(context, builder, signature, arguments):
        total, x, y = arguments
        return builder.fadd(total, builder.fmul(x, y, flags=_FLAGS), flags=_FLAGS)

    return total(total, x, y), generate


@_operation
def total(typing, x):
    """The sum of a vector's numbers, halves upon halves."""

    def generate(context, builder, signature, arguments):
        left, index, n = arguments[0], ir.IntType(32), _lanes(x.real)
        while n > 1:
            n //= 2
            none = ir.Constant(left.type, ir.Undefined)
            low, high = (ir.Constant(ir.VectorType(index, n), [first + i for i in range(n)]) for first in (0, n))
            left = builder.fadd(
                builder.shuffle_vector(left, none, low), builder.shuffle_vector(left, none, high), flags=_FLAGS
            )
        return builder.extract_element(left, ir.Constant(index, 0))

    return x.real(x), generate


@_operation
def put_totals(typing, array, at, a, b, c, d, e, f, g, h):
    """Put the totals of eight vectors at a place of an array: together they take a third of the steps."""
    n = _lanes(a.real)

    def generate(context, builder, signature, arguments):
        parts, part = list(arguments[2:]), n  # a part: numbers of a vector that have one total still

        def added(x, y, count):
            kind, parts_at = ir.VectorType(ir.IntType(32), count), range(0, 2 * count, part)
            first = [i + j for i in parts_at for j in range(part // 2)]
            halves = first, [i + part // 2 for i in first]
            return builder.fadd(
                *(builder.shuffle_vector(x, y, ir.Constant(kind, half)) for half in halves), flags=_FLAGS
            )

        while part > 1:
            if len(parts) > 1:
                parts = [added(x, y, n) for x, y in zip(parts[::2], parts[1::2], strict=True)]
            else:
                count = parts[0].type.count // 2
                parts = [added(parts[0], ir.Constant(parts[0].type, ir.Undefined), count)]
            part //= 2
        place, kind = _place(context, builder, signature.args[0], *arguments[:2]), signature.args[2].real
        for i, x in enumerate(parts):
            here = builder.gep(place, [ir.Constant(ir.IntType(64), i * x.type.count)])
            builder.store(x, builder.bitcast(here, x.type.as_pointer()), align=kind.bitwidth // 8)

    return types.void(array, types.intp, a, b, c, d, e, f, g, h), generate


@_operation
def expect_soon(typing, array, at):
    """Begin to fetch the line of the cache in which a place of an array lies, even past its end."""

    def generate(context, builder, signature, arguments):
        place, byte, number = _place(context, builder, signature.args[0], *arguments), ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte.as_pointer()], kind)
        how = [ir.Constant(number, i) for i in (0, 2, 1)]  # to read, into the second cache, data
        builder.call(fetch, [builder.bitcast(place, byte.as_pointer()), *how])

    return types.void(array, types.intp), generate
