"""Numba's compiler and its cache without the work that loops and their parts have no use for.

A part is machine code only within the loops that call it. Numba emits and loads every function by itself, too, before it is
linked into its callers; a part is optimized and linked only. (Loops of parts that are optimized by the caller alone come out
slower, such as those that encode.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite.binding import Linkage
from numba import _dynfunc
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.runtime import rtsys

_UNUSED = {
    "WithLifting",
    "InlineClosureLikes",
    "RewriteDynamicRaises",
    "MakeFunctionToJitFunction",
    "InlineInlinables",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "LiteralPropagationSubPipelinePass",
    "InlineOverloads",
    "NopythonRewrites",  # of expressions of arrays
    "NoPythonSupportedFeatureValidation",
    "DumpParforDiagnostics",
}
"""Passes for what no loop has: closures, contexts, raised errors, arithmetic on whole arrays, functions inlined by Numba."""


class LoopCompiler(Compiler):
    """Compiles a loop."""

    def define_pipelines(self) -> list:
        """Numba's own pipeline without the unused passes; all of it where Numba's threads are wanted."""
        pipelines = super().define_pipelines()
        if not self.state.flags.auto_parallel.enabled:
            for pipeline in pipelines:
                pipeline.passes = [entry for entry in pipeline.passes if entry[0].__name__ not in _UNUSED]
        return pipelines


class LoopCache(FunctionCache):
    """Machine code on disk, as Numba keeps it."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """As Numba loads it, which first imports all that is there to compile with: NumPy's functions, containers, SciPy.

        Loops call nothing of that; a loop that has to be compiled imports it then.
        """
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


class _PartLibrary(JITCodeLibrary):
    """LLVM's code of a part and of what it calls, for the libraries of its callers."""

    def finalize(self) -> None:
        """Link the parts that this one calls, and optimize; what is here may from now on be linked into several callers."""
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._optimize_final_module()
        self._finalize_dynamic_globals()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.external:
                function.linkage = "linkonce_odr"
        self._shared_module = self._final_module
        self._finalized = True


class PartCompiler(LoopCompiler):
    """Compiles a part; it cannot be called from Python."""

    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        flags.no_compile = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)

    def compile_extra(self, func: Callable) -> Any:
        """What Numba's compiler returns, with the entry from Python that callers' lowering knows the part by."""
        made = super().compile_extra(func)
        described = made.fndesc
        module, name = described.lookup_module(), described.qualname.rpartition(".")[2]
        entry = _dynfunc.make_function(module, name, "part", 0, made.environment, (made.library,))
        self.state.targetctx.insert_user_function(entry, described, [made.library])
        return made._replace(entry_point=entry)

    def define_pipelines(self) -> list:
        """As of a loop, into a library of its own kind."""
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()
