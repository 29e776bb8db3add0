"""Kernels in C: equal to torch's products, and built only when asked for."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Pattern, product

needs_kernels = pytest.mark.usefixtures("kernels")
only_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="an option of compilers for x86"
)
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


@pytest.fixture(scope="module")
def kernels() -> None:
    if reason := native.unavailable():
        pytest.skip(f"no native kernels: {reason}")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(
    rows: int, inner: int, batch: int, density: float, dtype: torch.dtype = torch.float64
) -> tuple[Pattern, Tensor, Tensor, Tensor, Tensor]:
    """Pattern, values, dense (inner, batch), left (rows, batch), bias."""
    torch.manual_seed(0)
    pattern = Pattern(torch.rand(rows, inner) < density)
    return (
        pattern,
        torch.randn(pattern.nnz, dtype=dtype),
        torch.randn(inner, batch, dtype=dtype),
        torch.randn(rows, batch, dtype=dtype),
        torch.randn(rows, dtype=dtype),
    )


SHAPES = [
    pytest.param(0, 5, 3, 0.5, id="no rows"),
    pytest.param(5, 0, 3, 0.5, id="no columns"),
    pytest.param(5, 4, 0, 0.5, id="no batch"),
    pytest.param(5, 4, 3, 0.0, id="no entries"),
    pytest.param(1, 1, 1, 1.0, id="one number"),
    pytest.param(9, 1, 4, 0.5, id="one column"),
    pytest.param(1, 300, 7, 0.5, id="one row"),
    pytest.param(12, 10, 16, 1.0, id="full"),
    pytest.param(20, 30, 33, 0.3, id="batch no multiple of a vector"),
    pytest.param(20, 30, 64, 0.3, id="one panel"),
    pytest.param(20, 30, 192, 0.01, id="panels not copied"),
    pytest.param(200, 30, 300, 0.3, id="panels and a rest"),
    pytest.param(20, 5000, 129, 0.05, id="blocks of columns"),
    pytest.param(20, 30, 3000, 0.3, id="a long batch"),
]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "batch", "density"), SHAPES)
def test_multiply(
    rows: int, inner: int, batch: int, density: float, with_bias: bool, dtype: torch.dtype
) -> None:
    pattern, values, dense, _, bias = case(rows, inner, batch, density, dtype)
    out = native.multiply(pattern.matrix(values), dense, bias if with_bias else None)
    right = pattern.scatter(values) @ dense + (bias[:, None] if with_bias else 0)
    torch.testing.assert_close(out, right, **TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inner", "batch", "density"), SHAPES)
def test_sample(rows: int, inner: int, batch: int, density: float, dtype: torch.dtype) -> None:
    pattern, values, dense, left, _ = case(rows, inner, batch, density, dtype)
    out = native.sample(pattern.matrix(values), left, dense)
    tolerance = {key: value * 10 for key, value in TOLERANCE[dtype].items()}
    torch.testing.assert_close(out, pattern.gather(left @ dense.t()), **tolerance)


@needs_kernels
@pytest.mark.parametrize("batch", range(1, 140, 3))
def test_every_width_of_a_panel(batch: int) -> None:
    pattern, values, dense, left, bias = case(6, 8, batch, 0.6)
    matrix = pattern.matrix(values)
    weight = pattern.scatter(values)
    exact = TOLERANCE[torch.float64]
    torch.testing.assert_close(
        native.multiply(matrix, dense, bias), weight @ dense + bias[:, None], **exact
    )
    torch.testing.assert_close(
        native.sample(matrix, left, dense), pattern.gather(left @ dense.t()), **exact
    )


@needs_kernels
@pytest.mark.parametrize("pool", ["of torch", "of our own"])
@pytest.mark.parametrize(
    ("rows", "inner", "batch"), [(3, 5, 2), (100, 300, 70), (30, 2000, 300), (10, 40, 4000)]
)
def test_results_do_not_depend_on_threads(
    rows: int, inner: int, batch: int, pool: str, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_ENOUGH", 1)
    if pool == "of our own":
        monkeypatch.setattr(native, "_openmp", lambda: None)
    pattern, values, dense, left, bias = case(rows, inner, batch, 0.3, torch.float32)
    matrix = pattern.matrix(values)
    torch.set_num_threads(1)
    right = native.multiply(matrix, dense, bias), native.sample(matrix, left, dense)
    for number in (2, 3, 7):
        torch.set_num_threads(number)
        for _ in range(3):
            assert torch.equal(native.multiply(matrix, dense, bias), right[0])
            assert torch.equal(native.sample(matrix, left, dense), right[1])


@needs_kernels
def test_rows_of_very_different_length(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ENOUGH", 1)
    torch.set_num_threads(4)
    mask = torch.zeros(50, 400, dtype=torch.bool)
    mask[17] = True
    mask[40:, ::7] = True
    pattern = Pattern(mask)
    values, dense = torch.randn(pattern.nnz).double(), torch.randn(400, 20).double()
    out = native.multiply(pattern.matrix(values), dense)
    torch.testing.assert_close(out, pattern.scatter(values) @ dense, **TOLERANCE[torch.float64])


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads on Linux")
def test_torch_and_kernels_have_the_same_threads() -> None:
    code = """
import os, torch
from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Pattern
torch.set_num_threads(3)
big = torch.rand(2000, 2000) + 1
pattern = Pattern(torch.rand(500, 500) < 0.5)
before = len(os.listdir("/proc/self/task"))
native.multiply(pattern.matrix(torch.ones(pattern.nnz)), torch.ones(500, 128))
print(before, len(os.listdir("/proc/self/task")), native._openmp() is not None)
"""
    before, after, shared = run(code).split()
    if shared == "False":
        pytest.skip("torch runs on threads that cannot be shared")
    assert before == after


def run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


# ------------------------------------------------------------------- as torch computes


@needs_kernels
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["values", "dense", "left"])
def test_what_is_not_finite_spreads_as_in_torch(special: float, where: str) -> None:
    pattern, values, dense, left, bias = case(20, 30, 37, 0.3)
    {"values": values, "dense": dense, "left": left}[where].view(-1)[40] = special
    matrix = pattern.matrix(values)
    right = torch.sparse.sampled_addmm(pattern.matrix(torch.zeros_like(values)), left, dense.t())
    assert right.values().isfinite().all() == (where == "values")
    same = {**TOLERANCE[torch.float64], "equal_nan": True}
    torch.testing.assert_close(native.multiply(matrix, dense), matrix @ dense, **same)
    torch.testing.assert_close(native.sample(matrix, left, dense), right.values(), **same)


@needs_kernels
def test_infinity_minus_infinity_and_zero_times_infinity_are_nan() -> None:
    inf = float("inf")
    pattern = Pattern(torch.ones(1, 2, dtype=torch.bool))
    dense = torch.tensor([[inf, 1.0], [inf, inf]])
    out = native.multiply(pattern.matrix(torch.tensor([1.0, -1.0])), dense)
    assert out[0, 0].isnan()
    assert out[0, 1] == -inf
    out = native.multiply(pattern.matrix(torch.tensor([0.0, 1.0])), dense)
    assert out[0, 0].isnan()
    assert out[0, 1] == inf


@needs_kernels
def test_columns_without_entries_are_not_read() -> None:
    pattern = Pattern(torch.tensor([[True, False, True]]))
    dense = torch.tensor([[1.0], [float("nan")], [2.0]])
    out = native.multiply(pattern.matrix(torch.tensor([3.0, 4.0])), dense)
    assert out.tolist() == [[11.0]]


@needs_kernels
def test_tiny_and_huge_numbers_are_not_flushed() -> None:
    pattern = Pattern(torch.ones(1, 1, dtype=torch.bool))
    for number in (1e-310, 1.7e308):
        dense = torch.tensor([[number]], dtype=torch.float64)
        out = native.multiply(pattern.matrix(torch.ones(1, dtype=torch.float64)), dense)
        assert out.item() == number


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_gradients_are_right(batch: int) -> None:
    pattern, values, dense, _, bias = case(6, 7, batch, 0.4)
    given = [dense.t(), values, bias]
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(
        lambda inputs, values, bias: product(inputs, values, pattern, bias, kernels="native"), given
    )


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_that_of_torch(dtype: torch.dtype) -> None:
    pattern, values, dense, left, bias = case(50, 70, 40, 0.2, dtype)
    results = []
    for kernels in ("torch", "native"):
        given = [tensor.clone().requires_grad_() for tensor in (dense.t(), values, bias)]
        seen: list[Tensor] = []
        out = product(given[0], given[1], pattern, given[2], lambda *x: seen.extend(x), kernels)  # type: ignore[arg-type]  # noqa: B023
        out.backward(left.t())
        results.append([out.detach(), *(tensor.grad for tensor in given), *seen])
    for mine, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, right, **TOLERANCE[dtype])
    assert results[1][0].t().is_contiguous()


# --------------------------------------------------------------------------- arguments


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    pattern = Pattern(torch.ones(2, 3, dtype=torch.bool))
    matrix = pattern.matrix(torch.ones(6, dtype=dtype))
    dense = torch.ones(3, 4, dtype=dtype)
    with pytest.raises(TypeError, match="float32 and float64"):
        native.multiply(matrix, dense)
    with pytest.raises(TypeError, match="float32 and float64"):
        native.sample(matrix, torch.ones(2, 4, dtype=dtype), dense)


@needs_kernels
def test_wrong_tensors_are_refused() -> None:
    pattern, values, dense, left, bias = case(4, 5, 6, 0.5)
    matrix = pattern.matrix(values)
    with pytest.raises(TypeError, match="layout"):
        native.multiply(pattern.scatter(values), dense)
    with pytest.raises(TypeError, match=r"dense: torch\.float32"):
        native.multiply(matrix, dense.float())
    with pytest.raises(TypeError, match="bias"):
        native.multiply(matrix, dense, bias.float())
    with pytest.raises(ValueError, match="bias: of shape"):
        native.multiply(matrix, dense, bias[1:])
    with pytest.raises(ValueError, match="dense: of shape"):
        native.multiply(matrix, dense[1:])
    with pytest.raises(ValueError, match="dense of shape"):
        native.multiply(matrix, dense[0])
    with pytest.raises(ValueError, match="dense: not contiguous"):
        native.multiply(matrix, dense[:, ::2])
    with pytest.raises(ValueError, match="left: of shape"):
        native.sample(matrix, left[:, 1:], dense)
    with pytest.raises(ValueError, match="left: on meta"):
        native.sample(matrix, left.to("meta"), dense)
    wide = torch.sparse_csr_tensor(pattern.starts.long(), pattern.columns.long(), values, (4, 5))
    with pytest.raises(TypeError, match=r"torch\.int64, but torch\.int32"):
        native.multiply(wide, dense)


def test_other_kernels_are_refused() -> None:
    pattern, values, dense, *_ = case(4, 5, 6, 0.5)
    with pytest.raises(ValueError, match=r"product\(kernels='fast'\)"):
        product(dense.t(), values, pattern, kernels="fast")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- building


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; returns where it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "lightning_sparsity"


def fresh() -> object:
    """The library, or the reason that there is none, as in a new process."""
    return native._library.__wrapped__()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_torch_kernels_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(native, "_library", fail)
    pattern, values, dense, *_ = case(4, 5, 6, 0.5)
    product(dense.t(), values.requires_grad_(), pattern).sum().backward()


def test_without_a_compiler_the_reason_says_what_to_do(
    build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = fresh()
    assert isinstance(reason, str)
    assert "no C compiler" in reason
    assert "CC" in reason
    monkeypatch.setattr(native, "_library", lambda: reason)
    assert native.unavailable() == reason
    pattern, values, dense, *_ = case(4, 5, 6, 0.5)
    with pytest.raises(RuntimeError, match="native kernels cannot be used: there is no C compiler"):
        product(dense.t(), values, pattern, kernels="native")


def test_a_compiler_that_is_named_and_not_there(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "nocc -m64")
    assert "'nocc', which the environment variable CC names" in str(fresh())


def test_the_reason_holds_what_the_compiler_said(
    build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "badcc", "echo 'no more space' >&2; exit 1"))
    assert "no more space" in str(fresh())
    assert not list(build.glob("*"))


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "this is win32" in str(fresh())


@pytest.fixture
def counted(build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that works; returns where it writes a line each time that it compiles."""
    real = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    log = tmp_path / "log"
    lines = f'case "$*" in *--version*) ;; *) echo "$@" >> {log};; esac\nexec {real} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "mycc", lines))
    monkeypatch.setattr(native, "_FLAGS", ("-O0", "-fPIC", "-shared"))  # fast
    return log


@needs_kernels
def test_it_is_compiled_once(counted: Path, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(fresh(), str)
    assert not isinstance(fresh(), str)
    assert len(counted.read_text().splitlines()) == 1
    assert [path.suffix for path in build.iterdir()] == [".so"]
    assert not build.stat().st_mode & 0o077
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    fresh()
    assert len(counted.read_text().splitlines()) == 2
    assert len(list(build.iterdir())) == 2


@needs_kernels
def test_a_damaged_file_is_made_anew(
    counted: Path, build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh()
    (made,) = build.iterdir()
    other = tmp_path / "other" / "lightning_sparsity"
    other.mkdir(parents=True, mode=0o700)
    (other / made.name).write_text("half of it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    assert not isinstance(fresh(), str)
    assert len(counted.read_text().splitlines()) == 2
    assert (other / made.name).stat().st_size > 1000


@needs_kernels
def test_a_cache_of_somebody_else_is_not_used(counted: Path, build: Path) -> None:
    build.mkdir()
    build.chmod(0o777)
    assert not isinstance(fresh(), str)
    assert not list(build.iterdir())


@needs_kernels
def test_without_a_cache_directory(
    counted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not isinstance(fresh(), str)


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        pytest.param("*=native*) echo unknown >&2; exit 1", id="no tuning"),
        pytest.param('*=native*) set -- -mno-avx512f "$@"', id="no AVX-512", marks=only_x86),
        pytest.param('*=native*) set -- -mno-avx "$@"', id="no AVX", marks=only_x86),
    ],
)
def test_vectors_of_other_widths(
    change: str, build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    lines = f'case "$*" in {change};; esac\nexec {real} "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "othercc", lines))
    monkeypatch.setattr(native, "_FLAGS", ("-O1", "-fPIC", "-shared"))
    library = fresh()
    assert not isinstance(library, str)
    monkeypatch.setattr(native, "_library", lambda: library)
    for dtype in native.DTYPES:
        for batch in (1, 37, 130):
            pattern, values, dense, left, bias = case(20, 30, batch, 0.3, dtype)
            matrix = pattern.matrix(values)
            torch.testing.assert_close(
                native.multiply(matrix, dense, bias),
                matrix @ dense + bias[:, None],
                **TOLERANCE[dtype],
            )
            torch.testing.assert_close(
                native.sample(matrix, left, dense),
                pattern.gather(left @ dense.t()),
                **TOLERANCE[dtype],
            )


@needs_kernels
@pytest.mark.slow
def test_processes_may_compile_at_the_same_time(build: Path, tmp_path: Path) -> None:
    code = """
import torch
from lightning_sparsity.ops import native
from lightning_sparsity.ops.compressed import Pattern
pattern = Pattern(torch.tensor([[True, True]]))
print(native.multiply(pattern.matrix(torch.tensor([1.0, 2.0])), torch.tensor([[3.0], [4.0]])))
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in started]
    assert outputs == ["tensor([[11.]])"] * 3
    assert [path.suffix for path in build.iterdir()] == [".so"]
