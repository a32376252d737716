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

__all__ = ["room_of"]

PLACE = 2  # numbers of a panel in a table: its address, and how many numbers further the next row is


class Room(types.Type):
    """A table whose panels are the fields of a named tuple, in their order; a field may be a tuple of panels itself."""

    def __init__(self, form: type, number: types.Float) -> None:
        hints = get_type_hints(form)
        self.fields = {name: of_panels(hints[name], number) for name in form._fields}
        ends = accumulate(1 if kind is Matrix else len(kind._fields) for kind in hints.values())
        self.places = dict(zip(form._fields, [0, *ends], strict=False))
        super().__init__(f"Room({form.__module__}.{form.__qualname__}, {number})")


def of_panels(form: type, number: types.Float) -> types.NamedTuple:
    """Type of a panel, or of a tuple of panels."""
    if form is not Matrix:
        return types.NamedTuple([of_panels(Matrix, number)] * len(form._fields), form)
    return types.NamedTuple([types.CPointer(number), types.intp, types.intp], Matrix)


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
    start = builder.gep(table, [ir.IntType(64)(PLACE * room.places[name])])
    return read(context, builder, room.fields[name], start)


def read(context: Any, builder: Any, kind: types.NamedTuple, table: Any) -> Any:
    """A panel, or a tuple of panels, from its place on."""

    def number_at(i: int) -> Any:
        return lasting(builder, builder.gep(table, [ir.IntType(64)(i)]))

    if kind.instance_class is Matrix:
        data = builder.inttoptr(number_at(0), context.get_data_type(kind.types[0]))
        return context.make_tuple(builder, kind, [data, number_at(1), ir.IntType(64)(1)])
    starts = (builder.gep(table, [ir.IntType(64)(PLACE * i)]) for i in range(len(kind)))
    parts = [read(context, builder, own, start) for own, start in zip(kind.types, starts, strict=True)]
    return context.make_tuple(builder, kind, parts)


def lasting(builder: Any, place: Any) -> Any:
    """A number that nothing in a kernel changes, so that it need not be read again after every store."""
    number = builder.load(place)
    number.set_metadata("invariant.load", builder.module.add_metadata([]))
    return number


def room_of(form: type) -> Any:
    """``f(table, like)`` for kernels: the panels of a table, numbers like one, by the names of a form's fields."""

    @intrinsic
    def named(typingctx: Any, table: Any, like: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, args[0])
            return builder.bitcast(array.data, ir.IntType(64).as_pointer())

        return Room(form, like)(table, like), codegen

    return named
