"""Compact files: small, exact, whole or not at all."""

from __future__ import annotations

import builtins
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_sparsity import RigL
from lightning_sparsity.export import load_weights, save_compact
from lightning_sparsity.export.compact import _gaps, _places
from lightning_sparsity.testing import TinyModel, fit, tiny_net

safetensors = pytest.importorskip("safetensors.torch")

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def sparse(*shape: int, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values * (torch.rand(shape, generator=generator) < density)


def round_trip(state: Any, path: Path) -> dict[str, Tensor]:
    save_compact(state, path)
    return load_weights(path)


def assert_same(found: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name] + 0), bits(tensor + 0)), name  # -0 + 0 is +0


@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_bits_come_back(dtype: torch.dtype, density: float, tmp_path: Path) -> None:
    state = {"w": sparse(90, 70, density=density, dtype=dtype), "bias": torch.randn(3).to(dtype)}
    path = tmp_path / "w.safetensors"
    found = round_trip(state, path)
    for name in state:
        assert torch.equal(bits(found[name]), bits(state[name] + 0)), name
        assert found[name].is_contiguous()


@pytest.mark.parametrize(
    ("density", "bytes_per_weight", "kind"),
    [(0.01, 4 * 0.01 + 0.0108, "gaps"), (0.1, 0.5, "gaps"), (0.3, 1.2 + 1 / 8, "bitmask")],
)
def test_size_follows_the_density(
    density: float, bytes_per_weight: float, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "w"
    save_compact({"w": sparse(400, 500, density=density)}, path)
    assert path.stat().st_size < 1.02 * 200_000 * bytes_per_weight + 500
    with safetensors.safe_open(path, "pt") as file:
        assert f'"pattern": "{kind}"' in file.metadata()["tensors"]


def test_a_dense_tensor_costs_its_own_size(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    weight[0, :30] = 0
    save_compact({"w": weight}, tmp_path / "w")
    assert (tmp_path / "w").stat().st_size < weight.nbytes + 500


def test_not_a_number_infinity_and_zeros_below_zero(tmp_path: Path) -> None:
    weight = torch.zeros(100)
    weight[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45])
    weight[0] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)
    weight[50:] = -0.0
    dense = torch.tensor([-0.0, 1.0])
    found = round_trip({"w": weight, "dense": dense}, tmp_path / "w")
    assert torch.equal(bits(found["w"][:4]), bits(weight[:4]))
    assert not bits(found["w"][4:]).any()
    assert torch.equal(bits(found["dense"]), bits(dense))


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "empty too": torch.zeros(4, 0),
        "int": torch.arange(500) * (torch.arange(500) % 100 == 0),
        "bool": torch.zeros(500, dtype=torch.bool),
        "view": sparse(40, 60, density=0.05).T,
        "column": torch.randn(30, 30)[:, 3],
        "channels last": sparse(4, 8, 5, 5, density=0.1).to(memory_format=torch.channels_last),
    }
    assert_same(round_trip(state, tmp_path / "w"), state)


def test_a_lightning_module_and_its_checkpoint_give_the_same(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    result = fit(
        [RigL(density=0.1, update_interval=4), saver], max_epochs=1, enable_checkpointing=True
    )
    state = result.model.state_dict()
    assert_same(load_weights(tmp_path / "last.ckpt"), state)
    found = round_trip(result.model, tmp_path / "model.safetensors")
    assert_same(found, state)
    fresh = TinyModel()
    fresh.load_state_dict(found)
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(fresh.eval().net(x), result.model.eval().net(x))
    sizes = [(tmp_path / name).stat().st_size for name in ("last.ckpt", "model.safetensors")]
    assert sizes[1] < sizes[0] / 4


def test_a_state_dict_of_torch_is_read(tmp_path: Path) -> None:
    state = tiny_net().state_dict()
    torch.save(state, tmp_path / "w.pt")
    assert_same(load_weights(tmp_path / "w.pt"), state)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load_weights(str(tmp_path / "old.pt")), state)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(300, 20), nn.Linear(20, 300, bias=False))
    model[1].weight = model[0].weight
    found = round_trip(model, tmp_path / "w")
    assert (tmp_path / "w").stat().st_size < 1.1 * model[0].weight.nbytes
    assert found["0.weight"] is found["1.weight"]
    assert torch.equal(found["0.weight"], model[0].weight)


def test_tensors_that_share_only_memory_are_told_apart(tmp_path: Path) -> None:
    whole = torch.randn(6, 6)
    state = {"whole": whole, "part": whole[:2], "flat": whole.view(-1), "turned": whole.T}
    found = round_trip(state, tmp_path / "w")
    assert_same(found, state)
    found["whole"].zero_()
    assert found["part"].any()


def small_file(path: Path) -> bytes:
    save_compact({"w": sparse(20, 30, density=0.05), "bias": torch.ones(2)}, path)
    return path.read_bytes()


@pytest.mark.slow
def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = small_file(path)
    for place in range(len(whole)):
        for flip in (1, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="load_weights"):
                load_weights(path)


@pytest.mark.slow
def test_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w"
    whole = small_file(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="load_weights"):
            load_weights(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load_weights(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="was not written by save_compact"):
        load_weights(tmp_path / "plain")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="neither a checkpoint of Lightning nor a state dict"):
        load_weights(tmp_path / "list")
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, tmp_path / "class")
    with pytest.raises(ValueError, match=r"weights_only=True\) fails"):
        load_weights(tmp_path / "class")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="fails"):
        load_weights(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": 3}, "'w' is a int, and only tensors"),
        ({"w": torch.eye(2).to_sparse()}, "with layout torch.sparse_coo; make it dense"),
        ({"w": torch.zeros(2, device="meta")}, "is on the meta device"),
        ({"w": torch.zeros(2), "w:pattern": torch.zeros(2)}, "has a namesake 'w:pattern'"),
    ],
    ids=["number", "sparse", "meta", "name"],
)
def test_entries_that_cannot_be_saved_are_named(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_compact(state, tmp_path / "w")
    assert not any(tmp_path.iterdir())


def test_a_failed_write_leaves_the_file_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    whole = small_file(path)

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            save_compact({"w": torch.ones(3)}, path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["w"]
    assert torch.equal(round_trip({"w": torch.ones(3)}, path)["w"], torch.ones(3))


@pytest.mark.parametrize("function", ["save_compact", "load_weights"])
def test_without_the_extra_it_is_named(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_file(tmp_path / "w")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    call = partial(save_compact, {}) if function == "save_compact" else load_weights
    with pytest.raises(ImportError, match=rf"{function} needs .* lightning-sparsity\[compact\]"):
        call(tmp_path / "w")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1100), max_size=8), st.integers(0, 700))
def test_gaps_of_any_length(zeros: list[int], tail: int) -> None:
    pieces = [torch.zeros(n + 1, dtype=torch.bool) for n in zeros]
    for piece in pieces:
        piece[-1] = True
    live = torch.cat([*pieces, torch.zeros(tail, dtype=torch.bool)])
    gaps = _gaps(live)
    assert gaps.dtype == torch.uint8
    assert len(gaps) == sum(n // 255 + 1 for n in zeros)
    assert _places(gaps).tolist() == live.nonzero().view(-1).tolist()
