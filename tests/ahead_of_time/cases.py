"""Demands on every kernel compiled ahead of time. Collected by ``test_ahead_of_time.py`` in a process of its own."""

from __future__ import annotations

import importlib
import math
import os
import pkgutil

import pytest

from tests.ahead_of_time import compiler

# Bytes that a compiler may set aside over a kernel's main loop to fit one more program on a multiprocessor: an address or two
SET_ASIDE = 16
LEAST_SHARED = 99 * 1024  # bytes a program may use on sm_86, sm_89 and sm_120, the smallest of all


@pytest.fixture(scope="module")
def kernels():
    full = os.environ.get("DYRATE_AOT") == "full"
    made, failed = compiler.compile_all(compiler.all_cases(full))
    assert not failed, "\n".join(failed)
    return made


def describe(kernel):
    return f"{kernel.kernel} in {kernel.case}"


def main(kernels):
    """Those of the configurations that matter most."""
    cases = [*compiler.occupancy_cases(), *compiler.paged_cases()]
    return [k for k in kernels if k.case in cases or k.case in compiler.main_cases(k.case.architecture)]


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    from dyrate_kernels import triton_kernels

    modules = [
        importlib.import_module(f"{triton_kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    launched = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert len(launched) >= 15
    full = os.environ.get("DYRATE_AOT") == "full"
    for architecture in compiler.ARCHITECTURES:
        here = [k for k in kernels if k.case.architecture == architecture]
        assert {k.kernel for k in here} == launched
        assert {k.case.dim for k in here} == set(compiler.HEAD_DIMS) and {"bfloat16", "float16", "float32"} <= {k.case.dtype for k in here}
        if full or architecture == 90:
            wanted = compiler.matrix("append", architecture) if full else compiler.some_of_matrix(architecture)
            assert {k.case for k in here} >= set(wanted)
            assert {(case.dtype, case.dim) for case in wanted} == {(dtype, dim) for dtype in compiler.DTYPES for dim in compiler.HEAD_DIMS}


def test_as_many_programs_fit_on_a_multiprocessor_as_the_grid_is_made_for(kernels):
    """Counted from registers and shared memory of what a model launches: with a new row. One that fits less often makes a wave of programs
    take two, and leaves the last one of several nearly idle."""
    from dyrate_kernels.triton_kernels import plan

    seen = {}
    for kernel in kernels:
        case = kernel.case
        if case in compiler.occupancy_cases() and kernel.kernel == "decode_attention_kernel":
            seen[case.operator, case.group, case.batch] = kernel
    assert len(seen) == len(compiler.occupancy_cases())
    for kernel in seen.values():
        least = plan.heuristic(kernel.case.group, 128, 2).programs_per_sm
        fits = kernel.programs_per_sm()
        assert fits >= least, f"{describe(kernel)}: {fits} a multiprocessor ({kernel.registers} registers), expected {least}"
        programs, wave = math.prod(kernel.grid), least * compiler.MULTIPROCESSORS
        assert programs <= wave or programs / (-(-programs // wave) * wave) > 0.9, f"{describe(kernel)}: a grid of {kernel.grid}"


def test_other_forms_of_the_main_loop_leave_room_for_their_programs(kernels):
    """Warps with rows of their own meet for the copies of a block alone (twice, in Triton 3.4 up to four times), those
    that share rows 7 to 9 times."""
    found = [k for k in kernels if k.case in compiler.form_cases() and k.kernel == "decode_attention_kernel"]
    assert len(found) == len(compiler.form_cases())
    for kernel in found:
        own, listed = ("warp_rows", True) in kernel.case.chosen, kernel.case.operator == "list"
        assert kernel.async_copies and not kernel.spills_in_loops, describe(kernel)
        assert (kernel.loop_barriers <= 4) == own, f"{describe(kernel)}: {kernel.loop_barriers}"
        if kernel.case.architecture == 90:
            least = (2 if listed and compiler.version_before(3, 6) else 3) if own else 4  # 225 registers in Triton 3.4
            assert kernel.programs_per_sm() >= least, f"{describe(kernel)}: {kernel.registers} registers, {kernel.programs_per_sm()}"


def test_every_group_is_compiled_with_some_head_dim_without_spills_in_its_loop(kernels):
    wanted = compiler.group_cases(os.environ.get("DYRATE_AOT") == "full")
    assert {case.group for case in wanted} == set(compiler.GROUPS) and {case.dim for case in wanted} == set(compiler.GROUPED_DIMS)
    found = [k for k in kernels if k.case in wanted and k.kernel == "decode_attention_kernel"]
    assert len(found) == len(wanted)
    for kernel in found:
        assert kernel.async_copies and (kernel.case.dtype == "float32" or not kernel.spills_in_loops), describe(kernel)


def test_main_configurations_do_not_spill(kernels):
    assert main(kernels)
    for kernel in main(kernels):
        assert kernel.stack + kernel.local <= SET_ASIDE, f"{describe(kernel)}: {kernel.stack + kernel.local} bytes"
        assert not kernel.spills_in_loops, f"{describe(kernel)}: {kernel.spills_in_loops}"


def test_products_with_few_rows_are_pipelined_and_take_the_widest_tensor_cores(kernels):
    """Weights come in asynchronous copies; two programs at once hide each other's beginning and end."""
    products = [k for k in kernels if k.case in compiler.product_cases()]
    assert len(products) == 2 * len(compiler.product_cases())
    for kernel in products:
        groups, warps = kernel.tensor_products
        assert kernel.async_copies and (groups if kernel.case.architecture == 90 else warps), describe(kernel)
        assert not kernel.stack + kernel.local, describe(kernel)
        if kernel.case.architecture == 90:
            assert not warps and kernel.programs_per_sm() >= 2, f"{describe(kernel)}: {kernel.registers} registers, {kernel.shared} bytes"


def test_main_loops_are_pipelined(kernels):
    attention = [k for k in main(kernels) if k.kernel == "decode_attention_kernel"]
    assert attention
    assert not [describe(k) for k in attention if k.async_copies == 0]


def test_keys_of_paged_rows_are_under_way_while_others_are_used(kernels):
    """Two buffers of keys and of values, though their addresses wait for one load or two; and as many programs at once as hide the rest."""
    paged = [k for k in kernels if k.case in compiler.paged_cases() and k.kernel == "decode_attention_kernel"]
    assert len(paged) == len(compiler.paged_cases())
    for kernel in paged:
        assert kernel.shared >= 2 * 2 * 32 * 128 * 2, f"{describe(kernel)}: {kernel.shared} bytes shared"
        least = 4 if kernel.case.operator == "paged" else 3
        if kernel.case.architecture == 90:
            assert kernel.programs_per_sm() >= least, f"{describe(kernel)}: {kernel.registers} registers, {kernel.shared} bytes"


def test_a_barrier_stands_before_every_release(kernels):
    assert not [f"{describe(k)}: {k.unguarded}" for k in kernels if k.unguarded]


def test_every_kernel_waits_before_it_touches_what_earlier_launches_wrote(kernels):
    dependent = [k for k in kernels if k.case.dependent]
    assert {k.kernel for k in dependent} == {k.kernel for k in kernels}
    assert not [f"{describe(k)}: {k.early}" for k in dependent if not k.waits or k.early]
    assert not [describe(k) for k in kernels if k.waits and not k.case.dependent]  # off: nothing of it is there


def test_shared_memory_fits_the_smallest_device(kernels):
    assert not [f"{describe(k)}: {k.shared}" for k in kernels if k.shared > LEAST_SHARED]


def test_the_barrier_check_sees_a_missing_barrier():
    ptx = "st.global.b32 [%rd1], %r1;\n{0}\natom.global.gpu.acq_rel.add.u32 %r2, [%rd2], 1;"
    assert compiler.unguarded_atomics(ptx.format("bar.sync 0;")) == ()
    assert len(compiler.unguarded_atomics(ptx.format("mov.u32 %r3, %r4;"))) == 1


def test_the_check_of_the_wait_sees_memory_touched_before_it():
    ptx = "ld.param.b64 %rd1, [f_param_0];\nld.shared.b32 %r1, [%r2];\nprefetch.global.L2 [%rd1];\n{0}\n"
    ptx += "griddepcontrol.wait;\nld.global.b32 %r3, [%rd1];"
    assert compiler.before_the_wait(ptx.format("mov.u32 %r3, %r4;")) == ()
    for touching in ("@%p1 ld.global.v4.b32 {%r1}, [%rd1];", "st.b32 [%rd1], %r1;", "cp.async.cg.shared.global [%r1], [%rd1], 16;",
                     "atom.global.gpu.acq_rel.add.u32 %r2, [%rd2], 1;", "ld.relaxed.gpu.global.b32 %r1, [%rd1];"):  # fmt: skip
        assert compiler.before_the_wait(ptx.replace("{0}", touching)) == (touching,)


def test_the_spill_check_sees_a_loop():
    sass = "STL [R1], R2 ;\n.L_x_1:\n{0}\n@P0 BRA `(.L_x_1) ;\nLDL R2, [R1] ;\n"
    assert compiler.spills_in_loops(sass.format("FADD R1, R1, R2 ;")) == ()
    assert compiler.spills_in_loops(sass.format("LDL R3, [R1+0x4] ;")) == ("LDL R3, [R1+0x4] ;",)
