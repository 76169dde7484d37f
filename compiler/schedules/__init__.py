"""CPU schedules for TVM that need no tuning: a Relax module in, fast loops out.

The steps of `lower_with_report`:
 (1) the graph is made canonical: constants folded, detours of exporters removed (`canonical`);
 (2) convolutions and what lies between them are laid out channels last (`layout`);
 (3) operators become kernels of ours, their weights packed to the order of access, or Relax's own loops (`legalize`);
 (4) what follows a kernel element by element is fused into it;
 (5) each function is scheduled by the first rule that takes it (`rules`): one file per kind of kernel.

Nothing here measures or searches: tiles follow from the shapes and the target's vector unit (`machine`, `tiles`).
"""

from __future__ import annotations

from typing import Any

from compiler.schedules.rules import LoweringReport

__all__ = ["LoweringReport", "fuse", "lower", "lower_with_report"]


def lower(module: Any, target: Any) -> Any:
    """Return a Relax module, as an importer makes it, as scheduled loops, ready for `tvm.relax.build(module, target)`.

    Args:
        module: A `tvm.IRModule` with Relax functions whose weights are constants; shapes but the batch are fixed.
        target: A `tvm.target.Target` of kind llvm; its features decide vector widths.
    """
    return lower_with_report(module, target)[0]


def lower_with_report(module: Any, target: Any) -> tuple[Any, LoweringReport]:
    """Do what `lower` does, and say which rule scheduled each function."""
    from compiler.schedules.machine import Machine
    from compiler.schedules.rules import apply_rules

    report = LoweringReport()
    fused = fuse(module, target)
    with target:
        # (5)
        return apply_rules(fused, Machine.of(target), report), report


def fuse(module: Any, target: Any) -> Any:
    """Return the module with its functions fused and not scheduled yet: steps (1) to (4)."""
    from tvm import ir, relax

    from compiler.schedules.canonical import canonicalize
    from compiler.schedules.layout import channels_last
    from compiler.schedules.legalize import mathematics, use_kernels
    from compiler.schedules.machine import Machine

    machine = Machine.of(target)
    with target:
        # (1)
        module = relax.transform.DecomposeOpsForInference()(module)
        module = canonicalize(module)
        # (2)
        module = channels_last(module)
        module = canonicalize(module)
        # (3)
        module = use_kernels(module, machine)
        module = relax.transform.LegalizeOps(mathematics())(module)
        # (4)
        fusion = [
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.EliminateCommonSubexpr(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
        return ir.transform.Sequential(fusion)(module)
