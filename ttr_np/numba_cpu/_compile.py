"""How kernels are compiled: small functions that call each other, translated once for each kernel that calls them.

Numba makes machine code of every function, and again of all it calls: for kernels of sixty small functions half of the
time to the first result. Functions that only kernels call stop here before that, as intermediate code, and become
machine code as a part of the kernel.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc, njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes
from numba.extending import intrinsic

__all__ = ["OPTIONS", "apart", "inner", "spliced"]

# Never the finite-math flags: NaN and infinity have their meaning. A division by zero is one of them, no exception.
OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc"}, "error_model": "numpy"}


class Part(JITCodeLibrary):
    """Code of a function that only kernels call: neither optimised nor made executable by itself."""

    def _optimize_final_module(self) -> None:
        """Leave it to the kernel."""

    def _finalize_final_module(self) -> None:
        """Ready to be linked into a kernel."""
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class PartLowering(NativeLowering):
    """Numba's own translation, but into a ``Part``, and without an address to call from Python."""

    _name = "ttr_np_part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Translate one function."""
        state.library = Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        made = state.cr
        name = made.fndesc.qualname.split(".")[-1]  # nobody calls it at this address; it names the function to Numba
        entry = _dynfunc.make_function(made.fndesc.lookup_module(), name, "", 0, made.env, (state.library,))
        state.targetctx.insert_user_function(entry, made.fndesc, [state.library])
        state.cr = made._replace(cfunc=entry)
        return True


SPARED = (InlineClosureLikes, NopythonRewrites)  # a part holds no closure, comprehension or array expression


class PartCompiler(CompilerBase):
    """Numba's passes, the last of them exchanged, and without those that would find nothing in a part."""

    def define_pipelines(self) -> list[Any]:
        """The passes in their order."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        kept = [(step, why) for step, why in passes.passes if step not in SPARED]
        passes.passes = [(PartLowering if step is NativeLowering else step, why) for step, why in kept]
        passes.finalize()
        return [passes]


def inner(function: Any) -> Any:
    """Compile a function for kernels to call: once per dtype, not once more for every constant among its arguments."""
    options = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = njit(pipeline_class=PartCompiler, **options)(function)
    template = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: template(tuple(types.unliteral(arg) for arg in args), kws)
    return compiled


spliced = njit(inline="always", error_model="numpy")  # for what a kernel calls in one place


@intrinsic
def apart(typingctx: Any) -> Any:
    """Keep the function that says this apart from its callers: compiled once, not once more into each of them."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen
