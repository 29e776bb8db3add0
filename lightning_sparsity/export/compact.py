"""Compact files: a state dict in which every sparse tensor takes little more than its live values.

The file is in `safetensors <https://github.com/huggingface/safetensors>`_ format. A tensor of
which enough is zero is stored as its live values, in row-major order, and beside them, as
``<name>:pattern`` (uint8), where they belong:

- ``bitmask``: one bit per entry, as :func:`lightning_sparsity.ops.packing.pack` makes it;
- ``gaps``: for every live entry the number of zeros before it, one byte each. 255 stands for as
  many zeros with no live entry after them.

The metadata names every tensor in order, its shape and its pattern, and holds a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparsity.ops.packing import pack, unpack

_FORMAT = "lightning-sparsity compact 1"
_PATTERN = ":pattern"
_SKIP = 255
_OVERHEAD = 128  # bytes that one more tensor takes in the header
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_compact(weights: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write the weights of a model to a file in which zeros take next to no space.

    In 32 bits a tensor takes an eighth of its dense size at density 0.1, and a twentieth at
    0.04. Everything else is stored as it is. Tied tensors are stored once. The file
    appears as a whole or not at all.

    Needs the package safetensors: ``pip install safetensors``, or the extra ``compact``.

    Args:
        weights: A model, of which the ``state_dict`` is taken, or a state dict of tensors. Any
            dtype that safetensors knows; zeros are left out of floating-point tensors of 16
            bits and more.
        path: Of the file; ``.safetensors`` is usual. One that exists is replaced.

    Raises:
        ValueError: If an entry is no ordinary tensor.
        ImportError: If safetensors is not installed.

    Read back, every weight that is not zero has the same bits; zeros are +0 where they were
    left out, also if they were -0.

    Example::

        save_compact(model, "model.safetensors")
        model.load_state_dict(load_weights("model.safetensors"))
    """
    library = _safetensors("save_compact")
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    names: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        _check(name, tensor, state)
        first = names.setdefault(_identity(tensor) or name, name)
        if first != name:
            entries.append({"name": name, "same_as": first})
            continue
        whole = tensor.detach().cpu().contiguous()
        packed = _packed(whole)
        if packed is None:
            entries.append({"name": name})
            place = whole.untyped_storage().data_ptr()
            tensors[name] = whole.clone() if place in storages else whole
            storages.add(place)
        else:
            values, kind, pattern = packed
            entries.append({"name": name, "shape": list(tensor.shape), "pattern": kind})
            tensors[name], tensors[name + _PATTERN] = values, pattern
    contents = json.dumps(entries)
    metadata = {
        "format": _FORMAT,
        "tensors": contents,
        "sha256": _checksum(contents, tensors),
    }
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        library.torch.save_file(tensors, unfinished, metadata=metadata)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The dense weights in a file of :func:`save_compact`, of Lightning or of ``torch.save``.

    Args:
        path: A compact file; or a Lightning checkpoint, of which the model's weights are
            taken, or a saved state dict. Files of torch are read with ``weights_only=True``.

    Returns:
        Name to dense tensor on the CPU, in the order in which they were saved; tied tensors are
        one object.

    Raises:
        ValueError: If a compact file is damaged in any byte, if torch cannot read the file, or
            if it is of another kind.
        ImportError: If it is a compact file, and safetensors is not installed.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(9)
    read = _read_compact if start[8:] == b"{" else _read_torch
    return read(path)


def _read_compact(path: Path) -> dict[str, Tensor]:
    library = _safetensors("load_weights")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _unreadable(path, f"it is damaged ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise _unreadable(path, "it was not written by save_compact, or not by this version")
    contents = metadata.get("tensors", "")
    if metadata.get("sha256") != _checksum(contents, tensors):
        raise _unreadable(path, "it is damaged (its checksum is another)")
    state: dict[str, Tensor] = {}
    for entry in json.loads(contents):
        name = entry["name"]
        if "same_as" in entry:
            state[name] = state[entry["same_as"]]
        elif "pattern" in entry:
            pattern = tensors[name + _PATTERN]
            state[name] = _unpacked(tensors[name], entry["pattern"], pattern, entry["shape"])
        else:
            state[name] = tensors[name]
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise _unreadable(path, f"torch.load(weights_only=True) fails: {why}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        return dict(found["state_dict"])
    if not (isinstance(found, dict) and all(isinstance(v, Tensor) for v in found.values())):
        raise _unreadable(path, "it is neither a checkpoint of Lightning nor a state dict")
    return dict(found)


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"load_weights({str(path)!r}): {why}.")


def _check(name: str, tensor: object, state: Mapping[str, Tensor]) -> None:
    problem = ""
    if not isinstance(tensor, Tensor):
        problem = f"is a {type(tensor).__name__}, and only tensors can be saved"
    elif type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        kind = f"is a {type(tensor).__name__} with layout {tensor.layout}"
        problem = f"{kind}; make it dense (a DTensor by full_tensor())"
    elif tensor.is_meta:
        problem = "is on the meta device and has no values"
    elif name + _PATTERN in state:
        problem = f"has a namesake {name + _PATTERN!r}, a name that the file needs"
    if problem:
        raise ValueError(f"save_compact: {name!r} {problem}; leave it out, or change it first.")


def _identity(tensor: Tensor) -> Any:
    """What tied tensors have in common; None for those without data."""
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _packed(tensor: Tensor) -> tuple[Tensor, str, Tensor] | None:
    """Values, kind of pattern and pattern of a tensor; None if that would not be smaller."""
    if tensor.dtype not in _DTYPES:
        return None
    flat = tensor.view(-1)
    live = flat != 0
    count = int(live.sum())
    room = (len(flat) - count) * tensor.element_size() - _OVERHEAD
    if room <= min(count, len(flat) // 8):
        return None
    mask, gaps = pack(live), _gaps(live)
    kind, pattern = ("gaps", gaps) if len(gaps) < len(mask) else ("bitmask", mask)
    return (flat[live], kind, pattern) if room > len(pattern) else None


def _unpacked(values: Tensor, kind: str, pattern: Tensor, shape: Sequence[int]) -> Tensor:
    out = values.new_zeros(shape)
    where = unpack(pattern, shape).view(-1) if kind == "bitmask" else _places(pattern)
    out.view(-1)[where] = values
    return out


def _gaps(live: Tensor) -> Tensor:
    """A 1-D mask as numbers of zeros before its live entries, uint8.

    Example:
        >>> mask = torch.zeros(600, dtype=torch.bool)
        >>> mask[[2, 3, 599]] = True
        >>> _gaps(mask)
        tensor([  2,   0, 255, 255,  85], dtype=torch.uint8)
        >>> _places(_gaps(mask))
        tensor([  2,   3, 599])
    """
    places = live.nonzero().squeeze(1)
    zeros = places.diff(prepend=places.new_tensor([-1])) - 1
    skips = zeros // _SKIP
    at = torch.arange(len(places)) + skips.cumsum(0)
    gaps = torch.full((len(places) + int(skips.sum()),), _SKIP, dtype=torch.uint8)
    gaps[at] = (zeros % _SKIP).to(torch.uint8)
    return gaps


def _places(gaps: Tensor) -> Tensor:
    """Undo :func:`_gaps`: where the live entries are, int64."""
    is_live = gaps != _SKIP
    return ((gaps.long() + is_live).cumsum(0) - 1)[is_live]


def _checksum(contents: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(contents.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors(caller: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{caller} needs the package safetensors: pip install safetensors, or install "
            "lightning-sparsity with its extra: lightning-sparsity[compact]."
        ) from error
    return safetensors
