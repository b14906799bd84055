"""Every kernel against its reference, without a GPU: numbers and memory in the interpreter, machine code by compiling.

On a machine with a GPU the numbers come from the GPU.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra `triton`")
from kernel_checks import faults, interpreter, load
from triton.runtime.errors import InterpreterError

from zimage import kernels
from zimage.kernels import backend, decode_scaled, specs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
COARSE = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # results that are levels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAPABILITIES = [89]  # the RTX 4090's
OTHERS = [pytest.param(capability, marks=pytest.mark.full) for capability in (75, 80, 86, 90, 120)]
MATRIX = {  # tensor cores' instructions; those of fp16 that add in fp16, too
    "int8_product": r"(IMMA|IGMMA)\b",
    "fp8_product": r"(QMMA|QGMMA)\b",
    "fp16_product": r"(HMMA|HGMMA)\.\w+\.F16\b",
}
SPECS = {spec.name: spec for spec in specs()}
off_gpu = pytest.mark.skipif(ON_GPU, reason="the interpreter was not chosen: there is a GPU")


@pytest.fixture(scope="module", autouse=True)
def trustworthy_interpreter():
    if not ON_GPU:
        interpreter.install()


def arguments(spec, sizes, dtype, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    return spec.inputs(lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(DEVICE), **sizes)


def clones(args: tuple) -> tuple:
    """Copies that keep the strides, so that views of packed tensors stay views."""
    memory: dict[int, Tensor] = {}

    def clone(value):
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        copy = memory.setdefault(storage.data_ptr(), storage.clone())
        return torch.empty(0, dtype=value.dtype, device=value.device).set_(
            copy, value.storage_offset(), value.shape, value.stride()
        )

    return tuple(map(clone, args))


def results(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def bits(values: Tensor) -> Tensor:
    """As bytes: fp8 cannot be compared."""
    return values.contiguous().view(torch.uint8)


def stored(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's storage: NaN is NaN."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@pytest.fixture
def nan_filled(monkeypatch):
    """Every new tensor starts as NaN (or the largest integer), so that a value never written is seen."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch before 2.10 refuses products on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def widened(argument, dtype):
    """An argument of the reference in float64; codes stay codes."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return torch.float64 if argument is dtype else argument


def agree(launched, spec, args, dtype) -> None:
    """The reference's bits, if the spec says so; else as near to float64 as the reference is, overall, and no element
    off by more than two roundings.
    """
    if spec.exact:
        for ours, theirs in zip(results(launched), results(spec.reference(*clones(args))), strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), "not the reference's bits"
        return
    wide = tuple(widened(a, dtype) for a in clones(args))
    expected, truths = results(spec.reference(*clones(args))), results(spec.reference(*wide))
    for ours, theirs, truth in zip(results(launched), expected, truths, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if not ours.numel():
            continue
        if ours.dtype in COARSE:
            apart = (ours.view(torch.int8).short() - theirs.view(torch.int8).short()).abs()
            assert apart.max() <= spec.levels_of_a_sum
            assert apart.float().mean() <= 1e-3
            continue
        error, own = ((value.double() - truth).abs() for value in (ours, theirs))
        assert not error.isnan().any()
        size = truth.square().mean().sqrt()
        assert rms(error) <= 1.1 * rms(own) + 5e-7 * size, f"{rms(error):.2e}, the reference's {rms(own):.2e}"
        rounded = dtype if spec.of_rounded else ours.dtype
        unit = torch.finfo(rounded).eps if spec.rounds_once and rounded.itemsize == 2 else 5e-7
        assert (error <= unit * (truth.abs() + size)).all(), f"{float((error / (truth.abs() + size)).max()):.1e}"


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


CASES = [pytest.param(name, i, id=f"{name}-{i}") for name, spec in SPECS.items() for i in range(len(spec.cases))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_numbers_and_memory(name, case, dtype, nan_filled):
    """As the reference, every element written, nothing touched outside the tensors, no two programs in conflict."""
    spec = SPECS[name]
    if ON_GPU and spec.half_only and dtype is torch.float32:
        pytest.skip("the op launches it in half precision only")
    args = arguments(spec, spec.cases[case], dtype)
    given = clones(args)
    if ON_GPU:
        launched = spec.launch(*given)
    else:
        with interpreter.watch():
            launched = spec.launch(*given)
    agree(launched, spec, args, dtype)
    for i, (before, after) in enumerate(zip(args, given, strict=True)):
        if isinstance(before, Tensor) and i not in spec.in_place:
            assert torch.equal(stored(before), stored(after)), f"argument {i} was changed"


def test_off_a_cpu_all_numbers_of_a_group_norm_have_one_dtype(monkeypatch):
    """cuDNN refuses others, as where this kernel's own test computes in float64 on a GPU."""
    seen = []
    monkeypatch.setattr(torch.nn.functional, "batch_norm", lambda x, *rest, eps: seen.append((x, *rest)) or x)
    for dtype, inside in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        x, channels = torch.empty(1, 8, 2, 2, dtype=dtype, device="meta"), torch.empty(8, dtype=dtype, device="meta")
        SPECS["group_norm_silu"].reference(x, channels[:4].view(2, 2).to(inside), channels, channels, 1e-6, x)
        assert {tensor.dtype for tensor in seen.pop()} == {inside}


BY_TOKENS = [name for name, spec in SPECS.items() if hasattr(inspect.getmodule(spec.launch), "tokens_per_program")]


@off_gpu
@pytest.mark.parametrize("name", BY_TOKENS)
def test_the_tokens_of_a_program_change_no_bit(name, monkeypatch, nan_filled):
    """Whichever number a kernel takes of a text's length, so that a short text keeps all of a GPU busy."""
    spec, grids, found = SPECS[name], [], []
    args = arguments(spec, spec.cases[0], torch.bfloat16)
    for rows in (1, 4, 16):
        monkeypatch.setattr(inspect.getmodule(spec.launch), "tokens_per_program", lambda tokens, rows=rows: rows)
        with interpreter.watch() as seen:
            found.append(results(spec.launch(*clones(args))))
        grids += seen.grids
    agree(found[0], spec, args, torch.bfloat16)
    assert all(torch.equal(bits(x), bits(y)) for each in found for x, y in zip(each, found[0], strict=True))
    assert [grid[0] for grid in grids] == [17, 5, 2]


def test_a_program_for_every_multiprocessor_from_128_tokens_on():
    rows = {tokens: backend.tokens_per_program(tokens) for tokens in range(1, 5000)}
    assert set(rows.values()) == {1, 4, 16}
    assert all(-(-tokens // r) >= min(tokens, 128) for tokens, r in rows.items())
    assert rows[4128] == 16


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_every_code_is_its_number(kind, out):
    """Also infinities, NaN and the smallest, with a scale that makes some of them overflow or vanish."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(kind).reshape(2, 128)
    for scale in (1.0, -300.0, 2e-7):
        arguments = codes, torch.tensor(scale, device=DEVICE), 0, out
        ours, theirs = (run(*arguments).float() for run in (decode_scaled.launch, decode_scaled.reference))
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("op", ["quantise", "rms_norm_scale", "swiglu"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_row_with_nan_is_not_quantised_to_numbers(op, kind):
    """Integers cannot hold NaN, so the scale does: without it a picture of rubbish would be saved."""
    spec = SPECS[f"{op}_{kind}"]
    args = arguments(spec, spec.cases[0], torch.bfloat16)
    args[0].flatten(0, -2)[1, 3] = torch.nan
    _, scale = spec.launch(*args)
    assert scale.flatten().isnan().nonzero().tolist() == [[1]]


@off_gpu
@pytest.mark.parametrize("name", SPECS)
def test_traffic_is_compulsory(name):
    """Bytes of one program times the grid, at the published sizes, within a tenth of what must move.

    Programs of a product read what others read, from the cache: 660 TOP/s in int8, or 330 TFLOP/s in fp16, take about
    6 TB/s of a 4090's at most.
    """
    spec = SPECS[name]
    args = spec.inputs(lambda *shape: torch.zeros(shape, dtype=torch.bfloat16), **spec.model)
    with interpreter.watch(only=1, races=False) as seen:
        spec.launch(*args)
    (grid,) = seen.grids
    programs = torch.tensor(grid).prod().item()
    moved = programs * (seen.traffic.loaded + seen.traffic.stored)
    least = spec.least_bytes(*args)
    print(f"{name}: {moved / 1e6:.1f} MB moved, {least / 1e6:.1f} MB compulsory, ratio {moved / least:.3f}")
    if spec.flops:
        assert spec.flops(*args) / moved >= 110 / args[0].element_size()
    else:
        assert 0.999 <= moved / least <= 1.1


LARGE = {"input": (2_100_000, 16, 1040), "results": (2_100_000, 1040, 16)}  # more than 2³¹ of them


def last_program(spec, M: int, N: int, K: int) -> None:
    """Run the last program of a product on memory that nothing else touches."""
    x, weight = (torch.empty(n, K, dtype=torch.int8) for n in (M, N))
    scales = torch.empty(M, 1), torch.empty(1, N)
    programs = -(-M // 128) * -(-N // 128)
    with interpreter.watch(only=1, races=False, first=programs - 1):
        spec.launch(x, scales[0], weight, scales[1], None, torch.bfloat16)


@off_gpu
@pytest.mark.parametrize("which", LARGE)
def test_products_of_more_values_than_32_bits_count(which, tmp_path):
    last_program(SPECS["int8_product"], *LARGE[which])
    wide = {"input": "(row % M).to(tl.int64)", "results": "row.to(tl.int64)"}[which]
    fault = load(broken(tmp_path, "scaled_product", wide, wide.replace(".to(tl.int64)", "")))
    with pytest.raises(InterpreterError, match="outside"):
        last_program(fault.INT8_SPEC, *LARGE[which])


@off_gpu
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.variants])
def test_variants_give_the_same_bits(name):
    """So that a choice by the clock changes no picture."""
    spec = SPECS[name]
    for sizes in spec.cases:
        args = arguments(spec, sizes, torch.bfloat16)
        expected = spec.launch(*args)
        for variant in spec.variants:
            with interpreter.watch():
                assert torch.equal(variant(*args), expected)


@pytest.mark.parametrize("file", sorted(Path(kernels.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_inductor_can_write_a_kernel_anew(file):
    """It copies a kernel's source into a file with `triton` and `tl`, and takes along what the body names, but nothing
    that only the signature names: `--compile` on a GPU once ended in "name 'constexpr' is not defined".
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    launched = [f for f in tree.body if isinstance(f, ast.FunctionDef) and "jit" in map(ast.unparse, f.decorator_list)]
    for kernel in launched:
        arguments = [*kernel.args.posonlyargs, *kernel.args.args, *kernel.args.kwonlyargs]
        signature = [*(a.annotation for a in arguments if a.annotation), *kernel.args.defaults]
        names = {n.id for part in signature for n in ast.walk(part) if isinstance(n, ast.Name)}
        assert names <= {"tl", "triton"}, f"{file.name}: {kernel.name} names {names} in its signature"


@pytest.mark.parametrize("name", SPECS)
def test_fractions_are_constants_of_a_kernel(name, monkeypatch):
    """Inductor types any other Python float as fp64, so that under `--compile` whole rows were computed in fp64 (a 64th
    of the speed on a consumer card), and what takes fp32 only did not compile.
    """
    spec, seen = SPECS[name], []

    class Recorder:
        def __init__(self, kernel):
            self.signature = inspect.signature(kernel.fn)

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append(self.signature.bind(*arguments).arguments)

    module = inspect.getmodule(spec.launch)
    kernels_of = [name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")]
    constants = {}
    for kernel in kernels_of:
        recorder = Recorder(getattr(module, kernel))
        constants |= {p.name: "constexpr" in str(p.annotation) for p in recorder.signature.parameters.values()}
        monkeypatch.setattr(module, kernel, recorder)
    spec.launch(*arguments(spec, spec.cases[0], torch.bfloat16))
    assert seen
    for given in seen:
        assert not [n for n, value in given.items() if isinstance(value, float) and not constants[n]], name


def run_alone(module: str, *arguments: object, **variables: str) -> list[dict]:
    """The lines of JSON of a module of kernel_checks, from a process of its own that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"kernel_checks.{module}", *map(str, arguments)],
        cwd=Path(__file__).parent,
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_compiler_takes_a_block_with_its_kernels_in_one_graph():
    """Each input is quantised once there, too: by the norms and SwiGLU, and on its own before to_out."""
    plain = {"norm": 2, "qk_norm_rope": 1, "gated_residual": 2, "swiglu": 1}
    quantised = {"quantise": 1, "scaled_product": 7}
    rotated = {"rotate": 4, "quantise": 4, "scaled_product": 7}
    expected = {"bf16": {"linear": 7}, "int8": quantised, "fp8": quantised, "rotated": rotated}
    for report in run_alone("traced", *expected):
        assert (report["graphs"], report["breaks"]) == (1, 0)
        assert report["kernels"] == plain | expected[report["kind"]]


def test_the_compiler_widens_a_packed_matrix_by_one_kernel():
    """Pieces would be unrolled into as many kernels and products."""
    kinds = {"mxfp8": "decode_scaled", "int4 ConvRot": "rotate", "nvfp4": "decode_nvfp4"}
    kinds |= {"Q5_1": "decode_blocks", "Q6_K": "decode_k_blocks"}
    for report in run_alone("traced", *kinds):
        assert (report["graphs"], report["breaks"]) == (1, 0)
        assert (report["kernels"]["linear"], report["kernels"][kinds[report["kind"]]]) == (7, 7)


# ------------------------------------------------------------------ machine code


def compiled(cache: Path, capability: int, *files: Path) -> list[dict]:
    """What kernel_checks.compiled says."""
    return run_alone("compiled", capability, *files, TRITON_CACHE_DIR=str(cache))


@pytest.mark.parametrize("capability", [*CAPABILITIES, *OTHERS])
def test_machine_code(tmp_path, capability):
    """No spills, no local memory, wide accesses, shared memory and occupancy that a 4090 has."""
    reports = compiled(tmp_path, capability)
    assert {r["op"] for r in reports} == {n for n, s in SPECS.items() if s.least_capability <= capability}
    for report in reports:
        print(
            f"{report['op']:20} {report['target']:8} {report['registers']:4} registers, {report['shared']:6} B shared, "
            f"occupancy {report['occupancy']:.0%}, {report['memory']} {report['matrix']}"
        )
        fault = unfit(report, SPECS[report["op"]])
        assert fault is None, f"{report['op']} on {report['target']}: {fault}"


def unfit(report: dict, spec: backend.Spec) -> str | None:
    """What is wrong with a kernel's machine code, or None.

    Products hide the time of their loads by loading ahead, so for them one program on a multiprocessor is enough.
    """
    memory = report["memory"]
    if report["stack"] or report["spills"] or any(kind.startswith(("LDL", "STL")) for kind in memory):
        return "spills or local memory"
    wide = [kind for kind in memory if ".128" in kind]
    needed = ["LDG"] * (not spec.narrow_loads) + ["STG"] * (not spec.stores_little)
    if not all(any(kind.startswith(access) for kind in wide) for access in needed):
        return f"no 128-bit accesses: {memory}"
    if report["shared"] > 99 * 1024:
        return "too much shared memory"
    if report["occupancy"] < (1 / 12 if spec.flops else 1 / 3):
        return f"occupancy {report['occupancy']:.0%}"
    if spec.flops and not any(re.match(MATRIX[spec.name], kind) for kind in report["matrix"]):
        return f"no products of its dtype on tensor cores: {report['matrix']}"
    return None


# ------------------------------------------------------------------ the checks themselves


def broken(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A copy of a kernel's file with a fault planted in it."""
    source = (Path(kernels.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    assert source.count(old) >= 1, f"{old!r} is no longer in {name}.py"
    file = tmp_path / f"broken_{name}.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    return file


@off_gpu
@pytest.mark.parametrize("fault", faults.NUMBERS)
def test_a_planted_fault_is_found(fault, tmp_path, nan_filled):
    file, old, new, says = faults.NUMBERS[fault]
    module = load(broken(tmp_path, file, old, new))
    module.tokens_per_program = lambda tokens: 16  # more than one, so that a program can reach into another's
    with pytest.raises((AssertionError, InterpreterError, TypeError), match=says):
        check_specs(module)


def check_specs(module) -> None:
    """The numbers of every case of a file's specs in bf16, against the references of the file without a fault."""
    for spec in kernels.specs_in(module):
        for sizes in spec.cases:
            args = arguments(spec, sizes, torch.bfloat16)
            with interpreter.watch():
                launched = spec.launch(*clones(args))
            agree(launched, SPECS[spec.name], args, torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("fault", faults.MACHINE)
def test_a_fault_in_the_machine_code_is_found(fault, tmp_path):
    file, old, new, _ = faults.MACHINE[fault]
    reports = compiled(tmp_path, 89, broken(tmp_path, file, old, new))
    assert any(unfit(report, SPECS[report["op"]]) for report in reports)


DIFFERENTIABLE = [
    *("rms_norm_scale", "rms_norm", "add_rms_norm", "gated_residual"),
    *("swiglu", "qk_norm_rope", "qk_norm_rope_halves"),
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_references_differentiate_in_half_precision_and_agree_when_compiled(name):
    """They take other passes in bf16 than in fp32, write over their intermediate maps, and turn pairs differently."""
    spec = SPECS[name]
    exact, half = (arguments(spec, spec.cases[0], dtype) for dtype in (torch.float32, torch.bfloat16))

    def gradients(args: tuple, run) -> list[Tensor]:
        leaves = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.dtype != torch.bool else a for a in args]
        outputs = results(run(*leaves))
        sum((out.float() ** 2).sum() for out in outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves if isinstance(leaf, Tensor))]

    wanted = gradients(exact, spec.reference)
    compiled = torch.compile(spec.reference, backend="aot_eager", fullgraph=True)
    for run, args, allowed in ((spec.reference, half, 0.03), (compiled, half, 0.03), (compiled, exact, 1e-5)):
        for found, want in zip(gradients(args, run), wanted, strict=True):
            assert (found.float() - want).norm() <= allowed * want.norm()
