"""Products with compressed rows by kernels in C, which the user's compiler builds when asked for.

The source is ``csr.c``, beside this file. It is compiled at the first use, for the processor at
hand, and kept in the user's cache directory; the reference, and what is used unless somebody asks
for these kernels, are torch's products in :mod:`lightning_sparsity.ops.compressed`. Kernels run on
the threads of torch, as many as ``torch.get_num_threads()``; what they compute depends on neither
the number of threads nor on chance.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
"""Dtypes that the kernels compute in."""

_SOURCE = Path(__file__).with_name("csr.c")
_FLAGS = ("-O3", "-fPIC", "-shared")
_TUNINGS = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to use all that the processor can; the first that works is taken."""


class _Job(ctypes.Structure):
    """``struct job`` of the source."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("is_double", "is_sample", "rows", "inner", "batch")],
        *[
            (name, ctypes.c_void_p)
            for name in ("starts", "columns", "values", "dense", "left", "out")
        ],
        *[(name, ctypes.c_int64) for name in ("groups", "slabs", "next", "failed")],
    ]


def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine; None if they can.

    The first call compiles them, unless they are in the cache already, which takes seconds.
    """
    found = _library()
    return found if isinstance(found, str) else None


def multiply(matrix: Tensor, dense: Tensor, bias: Tensor | None = None) -> Tensor:
    """``matrix @ dense + bias[:, None]``.

    Args:
        matrix: ``(rows, inner)`` in torch's CSR layout, with int32 indices; float32 or float64.
            Its indices are not checked: columns must ascend in each row and be below ``inner``.
        dense: ``(inner, batch)``, contiguous, of the same dtype.
        bias: ``(rows,)`` of the same dtype, or None.

    Returns:
        ``(rows, batch)``.

    Raises:
        TypeError: If a layout or a dtype is another one.
        ValueError: If a tensor is not on the CPU, not contiguous, or has another shape.
        RuntimeError: If the kernels cannot be used on this machine; see :func:`unavailable`.
    """
    job, nnz, keep = _job(matrix, dense)
    out = dense.new_empty((job.rows, job.batch))
    if bias is not None:
        _expect("bias", bias, dense.dtype, (job.rows,))
        job.left = bias.data_ptr()
    if not nnz or not out.numel():
        return out.zero_() if bias is None else out.copy_(bias[:, None])
    values = matrix.values()
    _expect("values", values, dense.dtype, (nnz,))
    job.values, job.out = values.data_ptr(), out.data_ptr()
    job.slabs = -(-job.batch // _panel(dense))
    _run(job, nnz)
    del keep
    return out


def sample(matrix: Tensor, left: Tensor, dense: Tensor) -> Tensor:
    """For every entry (i, j) of a matrix the dot product of ``left[i]`` and ``dense[j]``.

    Args:
        matrix: As for :func:`multiply`; its values are not read.
        left: ``(rows, batch)``, contiguous, of the same dtype.
        dense: ``(inner, batch)``, contiguous, of the same dtype.

    Returns:
        ``(nnz,)``, in the order of the entries.

    Raises:
        TypeError: If a layout or a dtype is another one.
        ValueError: If a tensor is not on the CPU, not contiguous, or has another shape.
        RuntimeError: If the kernels cannot be used on this machine; see :func:`unavailable`.
    """
    job, nnz, keep = _job(matrix, dense)
    _expect("left", left, dense.dtype, (job.rows, job.batch))
    if not nnz or not job.batch:
        return dense.new_zeros(nnz)
    # With a long batch a part is a piece of the batch, so that rows are read from the cache. The
    # pieces' sums take no more memory than the dense matrix, and follow from the shapes alone.
    width = _panel(dense)
    long = nnz < 4 * width * job.inner
    out = dense.new_empty((max(1, min(16, -(-job.batch // width) // 4)) if long else 1, nnz))
    job.is_sample, job.slabs = True, len(out)
    job.left, job.out = left.data_ptr(), out.data_ptr()
    _run(job, nnz)
    del keep
    if len(out) == 1:
        return out[0]
    total = out[0].clone()
    for part in out[1:]:
        total += part
    return total


def _job(matrix: Tensor, dense: Tensor) -> tuple[_Job, int, tuple[Tensor, Tensor]]:
    """What both jobs have in common; number of entries; index tensors to keep alive meanwhile."""
    if matrix.layout != torch.sparse_csr:
        raise TypeError(f"matrix has the layout {matrix.layout}: must be torch.sparse_csr.")
    if matrix.dtype not in DTYPES:
        raise TypeError(f"matrix is {matrix.dtype}: the kernels compute in float32 and float64.")
    rows, inner = matrix.shape
    nnz = matrix._nnz()
    if dense.ndim != 2:
        raise ValueError(f"dense of shape {tuple(dense.shape)}: must be ({inner}, batch).")
    starts, columns = matrix.crow_indices(), matrix.col_indices()
    _expect("crow_indices of the matrix", starts, torch.int32, (rows + 1,))
    _expect("col_indices of the matrix", columns, torch.int32, (nnz,))
    _expect("dense", dense, matrix.dtype, (inner, dense.shape[1]))
    job = _Job(
        is_double=matrix.dtype == torch.float64,
        rows=rows,
        inner=inner,
        batch=dense.shape[1],
        starts=starts.data_ptr(),
        columns=columns.data_ptr(),
        dense=dense.data_ptr(),
    )
    return job, nnz, (starts, columns)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: {tensor.dtype}, but {dtype} is needed.")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: on {tensor.device}, but the kernels are for the CPU.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: of shape {tuple(tensor.shape)}, but {shape} is needed.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous; pass a contiguous copy.")


# ------------------------------------------------------------------------------- running


_ENOUGH = 2**17
"""Products and sums that are worth another thread."""


def _run(job: _Job, nnz: int) -> None:
    """Cut a job into parts and do it."""
    library = _loaded()
    threads = min(torch.get_num_threads(), nnz * job.batch // _ENOUGH)
    if threads < 2:
        job.groups = 1
        library.work(ctypes.byref(job))
    else:
        # Some parts for each thread, so that none waits long; but each part copies a panel of
        # the dense matrix, which should be read often.
        wanted, least = (-(-n * threads // job.slabs) for n in (4, 1))
        job.groups = max(least, min(wanted, nnz // (16 * job.inner)))
        if together := _openmp():
            library.work_together(ctypes.byref(job), together, threads)
        else:
            others = [_pool().submit(library.work, ctypes.byref(job)) for _ in range(threads - 1)]
            try:
                library.work(ctypes.byref(job))
            finally:
                wait(others)
    if job.failed:
        raise MemoryError("The kernels got no memory for a copy of half the second level cache.")


@cache
def _openmp() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP library that torch itself runs on, if it has it.

    Its threads are those that torch has anyway, so that no two pools compete for the processor.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="csr")


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork takes no threads along


def _panel(dense: Tensor) -> int:
    """Numbers of the batch that the kernels take at a time."""
    return int(_loaded().panel(dense.dtype == torch.float64))


# ------------------------------------------------------------------------------ building


def _loaded() -> ctypes.CDLL:
    found = _library()
    if isinstance(found, str):
        raise RuntimeError(f"The native kernels cannot be used: {found}")
    return found


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels; or why there are none."""
    if sys.platform not in ("linux", "darwin"):
        return f"they are for Linux and macOS, and this is {sys.platform}."
    compiler = _compiler()
    if isinstance(compiler, str):
        return compiler
    reasons = []
    for tuning in _TUNINGS:
        try:
            return _load([*compiler, *_FLAGS, *tuning])
        except subprocess.CalledProcessError as error:
            reasons.append(f"{shlex.join(error.cmd)}\n{error.stderr.strip()}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(str(error))
    return f"{_SOURCE.name} was not compiled or not loaded.\n{reasons[0]}"


def _compiler() -> list[str] | str:
    """The command of a C compiler; or why there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        if shutil.which(named[0]) is None:
            return f"there is no compiler {named[0]!r}, which the environment variable CC names."
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return [name]
    return (
        "there is no C compiler (cc, gcc or clang). Install one, such as the package gcc, or name "
        "one in the environment variable CC."
    )


def _load(command: Sequence[str]) -> ctypes.CDLL:
    """Load what the command makes of the source, from the cache if it is there."""
    version = _call([*command, "--version"])
    parts = (_SOURCE.read_text(), shlex.join(command), version, _processor())
    name = f"csr-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"
    folder = _folder()
    if folder is None:  # a loaded library needs no file
        with tempfile.TemporaryDirectory() as own:
            return _open(_compile(command, Path(own) / name))
    kept = folder / name
    if kept.exists():
        try:
            return _open(kept)
        except (OSError, AttributeError):
            pass  # damaged: made anew
    return _open(_compile(command, kept))


def _call(command: Sequence[str]) -> str:
    """What a command prints; an error if it fails or takes minutes."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=True,
    ).stdout


def _compile(command: Sequence[str], target: Path) -> Path:
    """Make the library; other processes see it when it is whole."""
    descriptor, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(descriptor)
    try:
        _call([*command, str(_SOURCE), "-o", unfinished])
        os.replace(unfinished, target)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.panel.argtypes = [ctypes.c_int64]
    library.panel.restype = ctypes.c_int64
    library.work.argtypes = [ctypes.c_void_p]
    library.work.restype = None
    library.work_together.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    library.work_together.restype = None
    return library


def _folder() -> Path | None:
    """The cache directory, if it can be written to and belongs to nobody else."""
    try:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home) / "lightning_sparsity"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_mine = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_mine and os.access(folder, os.W_OK | os.X_OK) else None


def _processor() -> str:
    """The model of the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        wanted = ("model name", "flags", "features", "cpu implementer", "cpu part")
        return "\n".join(line for line in lines if line.lower().startswith(wanted))
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.release()}"
