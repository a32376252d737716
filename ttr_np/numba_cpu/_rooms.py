"""The panels of one thread by their names, as kernels hand them on: one pointer to the table of all of them.

A tuple of thirty panels is ninety numbers. Numba would take it apart and put it together again wherever one function
calls another, which is most of the code of a kernel of small functions, and of the time to compile it.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, get_type_hints

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from ._panels import Matrix

__all__ = ["panels_by_name"]

NUMBERS = {int: types.intp, float: types.float64}
PLACE = 2  # numbers of a panel in a table: its address, and how many numbers further the next row is


class Room(types.Type):
    """A table whose panels are the fields of a named tuple, in their order.

    A field may be such a tuple itself. Of a panel of whole numbers (``int``), or of double precision whatever the dtype
    (``float``), only the place is known.
    """

    def __init__(self, form: type, number: types.Float) -> None:
        hints = get_type_hints(form)
        self.fields = {name: kind_of(hints[name], number) for name in form._fields}
        self.places = dict(zip(form._fields, accumulate(map(size_of, hints.values()), initial=0), strict=False))
        super().__init__(f"Room({form.__module__}.{form.__qualname__}, {number})")


def kind_of(form: type, number: types.Float) -> types.Type:
    """Type of a field."""
    if form in NUMBERS:
        return types.CPointer(NUMBERS[form])
    if form is Matrix:
        return types.NamedTuple([types.CPointer(number), types.intp, types.intp], Matrix)
    return Room(form, number)


def size_of(form: type) -> int:
    """How many panels a field has."""
    return 1 if form in (*NUMBERS, Matrix) else sum(map(size_of, get_type_hints(form).values()))


@register_model(Room)
class Table(models.PrimitiveModel):
    """A pointer to the first number of the table."""

    def __init__(self, dmm: Any, fe_type: Room) -> None:
        super().__init__(dmm, fe_type, ir.IntType(64).as_pointer())


@infer_getattr
class Fields(AttributeTemplate):
    """The panels of a room are its attributes."""

    key = Room

    def generic_resolve(self, room: Room, name: str) -> types.Type | None:
        """Type of one of them."""
        return room.fields.get(name)


@lower_getattr_generic(Room)
def field_of(context: Any, builder: Any, room: Room, table: Any, name: str) -> Any:
    """Read one of them from the table."""
    kind, start = room.fields[name], builder.gep(table, [ir.IntType(64)(PLACE * room.places[name])])
    if isinstance(kind, Room):
        return start
    data = lasting(builder, start)
    if isinstance(kind, types.CPointer):
        return builder.inttoptr(data, context.get_data_type(kind))
    step = lasting(builder, builder.gep(start, [ir.IntType(64)(1)]))
    data = builder.inttoptr(data, context.get_data_type(kind.types[0]))
    return context.make_tuple(builder, kind, [data, step, ir.IntType(64)(1)])


def lasting(builder: Any, place: Any) -> Any:
    """A number that nothing in a kernel changes, so that it need not be read again after every store."""
    number = builder.load(place)
    number.set_metadata("invariant.load", builder.module.add_metadata([]))
    return number


def panels_by_name(form: type) -> Any:
    """``f(table, like)`` for kernels: the panels of a table, numbers like one, by the names of a form's fields."""

    @intrinsic
    def named(typingctx: Any, table: Any, like: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, args[0])
            return builder.bitcast(array.data, ir.IntType(64).as_pointer())

        return Room(form, like)(table, like), codegen

    return named
