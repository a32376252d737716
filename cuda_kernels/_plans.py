"""What the core of an operator does on a GPU, watched once and done again.

Some cores do nothing but make new arrays and launch kernels, and which follows from how their arguments lie, not from
where they begin or what they hold. To find it out takes Python longer than the kernels run. So the first call of its
kind is watched, and what it did is done again, with other memory, for every call like it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from ttr_np.notation import ARRAYS

from ._calls import Launch, start, watching

__all__ = ["Plan", "replayed"]

MOST = 1024  # plans of a machine
STATE = ("a field of the state",) * 4
MAY_BE_ARRAYS = frozenset({*ARRAYS, "mask", *STATE})


class Lying(NamedTuple):
    """How an argument of a kernel lies, without its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Plan(NamedTuple):
    """Arrays are counted: first those of the call, then those of its state, then those made."""

    made: list[Callable[..., Any]]  # what makes each, from the machine and an array whose container is wanted
    launches: list[tuple[Launch, list[tuple[int, int]]]]  # without memory; and which places are whose memory
    answer: int
    state: list[int | None]

    def __call__(self, machine: Any, arrays: list[Any], kind: type) -> tuple[Any, Any]:
        """Do it again."""
        arrays, like = [*arrays, *[make(machine, arrays[0]) for make in self.made]], machine.like
        for (_, what, lying, more), places in self.launches:
            arguments = lying.copy()
            for place, i in places:
                arguments[place] = like(lying[place], arrays[i])
            start(machine, what, arguments, more)
        return arrays[self.answer], kind(*[None if i is None else arrays[i] for i in self.state])


@cache
def replayed(machine_of: Callable[[], Any], core: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """A core that is watched once for all calls that are alike.

    Parameters
    ----------
    machine_of
        Gives the machine; it keeps the plans.
    core
        The core. Beside launches and new arrays of its launcher it must do nothing to the arrays it is given. If it
        launches with other arrays, computed from them, every call remains a call of the core.
    """
    return partial(done, machine_of, core)


def done(
    machine_of: Callable[[], Any], core: Callable[..., tuple[Any, Any]], *, state: Any, **every: Any
) -> tuple[Any, Any]:
    """A call of a core, by its plan if there is one."""
    machine, arrays, kinds = machine_of(), [], []
    for name, x in [*every.items(), *zip(STATE, state, strict=False)]:
        if x is not None and name in MAY_BE_ARRAYS:
            arrays.append(x)
            x = (x.shape, x.strides, x.dtype)
        kinds.append(x)
    if not all(map(machine.has, arrays)):
        return core(**every, state=state)
    key = (core, machine.place(), *kinds)
    try:
        plan = machine.plans.get(key)
    except TypeError:  # an option that cannot be looked up
        return core(**every, state=state)
    if plan is None:
        return watched(machine, core, key, arrays, every, state)
    return plan(machine, arrays, type(state)) if plan else core(**every, state=state)


def watched(machine: Any, core: Any, key: Any, arrays: list[Any], every: Mapping[str, Any], state: Any) -> Any:
    """A call of a core whose plan is kept, if its arrays can be told apart by where they begin."""
    begins = [machine.address(x) for x in arrays if x.size]
    if len(set(begins)) < len(begins):
        return core(**every, state=state)
    with watching() as watch:
        o, end = core(**every, state=state)
    if len(machine.plans) >= MOST:
        machine.plans.pop(next(iter(machine.plans)))
    machine.plans[key] = plan_of(machine, watch, arrays, o, end)
    return o, end


def plan_of(machine: Any, watch: Any, arrays: list[Any], o: Any, state: Any) -> Plan | tuple[()]:
    """What was watched; an empty tuple if arrays came up of which nobody knows whence."""
    arrays = [*arrays, *[x for x, _ in watch.made]]
    begins, fixed = {machine.address(x): i for i, x in enumerate(arrays) if x.size}, {id(x) for x in watch.fixed}
    launches = []
    for launch in watch.launches:
        bare, places = launch.arguments.copy(), []
        for place, x in enumerate(launch.arguments):
            if x is None or isinstance(x, np.generic) or id(x) in fixed:
                continue
            if machine.address(x) not in begins:
                return ()
            bare[place] = Lying(x.shape, x.strides)
            places.append((place, begins[machine.address(x)]))
        launches.append((launch._replace(machine=None, arguments=bare), places))
    same = {id(x): i for i, x in enumerate(arrays)}
    ends = [None if x is None else same.get(id(x), -1) for x in (o, *state)]
    return () if -1 in ends else Plan([maker for _, maker in watch.made], launches, ends[0], ends[1:])
