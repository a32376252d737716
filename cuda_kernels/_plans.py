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

from ._calls import Launch, begin, watching

__all__ = ["Plan", "replayed"]

MOST = 1024  # plans of a machine


class Plan(NamedTuple):
    """Arrays are counted: first those of the call, then those of its state, then those made."""

    made: list[partial[Any]]  # each takes the machine and an array whose container is wanted
    launches: list[tuple[Launch, list[tuple[int, int]]]]  # with no arrays; and which array takes which place
    answer: int
    state: list[int | None]

    def __call__(self, machine: Any, arrays: list[Any], kind: type) -> tuple[Any, Any]:
        """Do it again."""
        arrays = [*arrays, *[make(machine, like=arrays[0]) for make in self.made]]
        for launch, places in self.launches:
            arguments = launch.arguments.copy()
            for place, i in places:
                arguments[place] = arrays[i]
            begin(launch._replace(machine=machine, arguments=arguments))
        return arrays[self.answer], kind(*[None if i is None else arrays[i] for i in self.state])


@cache
def replayed(machine_of: Callable[[], Any], core: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """A core that is watched once for all calls that are alike.

    Parameters
    ----------
    machine_of
        Gives the machine; it keeps the plans.
    core
        The core. Beside launches and new arrays of its launcher it must do nothing to the arrays it is given: what else
        it computes from them is noticed, and then every call is a call of the core.
    """
    return partial(done, machine_of, core)


def done(
    machine_of: Callable[[], Any], core: Callable[..., tuple[Any, Any]], *, state: Any, **every: Any
) -> tuple[Any, Any]:
    """A call of a core, by its plan if there is one."""
    machine = machine_of()
    named = [(name in ARRAYS or name == "mask", x) for name, x in every.items()]
    arrays = [x for is_array, x in named if is_array and x is not None] + [x for x in state if x is not None]
    kinds = [x if not is_array or x is None else (x.shape, x.strides, x.dtype) for is_array, x in named]
    kinds += [None if x is None else (x.shape, x.strides, x.dtype) for x in state]
    if len({id(x) for x in arrays}) < len(arrays) or not all(map(machine.has, arrays)):
        return core(**every, state=state)  # a plan could not tell them apart, or they must be sent
    key = (core, machine.place(), *kinds)
    try:
        plan = machine.plans.get(key)
    except TypeError:  # an option that cannot be looked up
        return core(**every, state=state)
    if plan is None:
        return watched(machine, core, key, arrays, every, state)
    return plan(machine, arrays, type(state)) if plan else core(**every, state=state)


def watched(machine: Any, core: Any, key: Any, arrays: list[Any], every: Mapping[str, Any], state: Any) -> Any:
    """A call of a core whose plan is kept."""
    with watching() as watch:
        o, end = core(**every, state=state)
    if len(machine.plans) >= MOST:
        machine.plans.pop(next(iter(machine.plans)))
    machine.plans[key] = plan_of(watch, arrays, o, end)
    return o, end


def plan_of(watch: Any, arrays: list[Any], o: Any, state: Any) -> Plan | tuple[()]:
    """What was watched; an empty tuple if arrays came up of which nobody knows whence."""
    known = {id(x): i for i, x in enumerate([*arrays, *[x for x, _ in watch.made]])}
    fixed = {id(x) for x in watch.fixed}
    launches = []
    for launch in watch.launches:
        places = [(i, known[id(x)]) for i, x in enumerate(launch.arguments) if id(x) in known]
        bare = [None if id(x) in known else x for x in launch.arguments]
        if not all(x is None or isinstance(x, np.generic) or id(x) in fixed for x in bare):
            return ()
        launches.append((launch._replace(machine=None, arguments=bare), places))
    ends = [None if x is None else known.get(id(x), -1) for x in (o, *state)]
    return () if -1 in ends else Plan([make for _, make in watch.made], launches, ends[0], ends[1:])
