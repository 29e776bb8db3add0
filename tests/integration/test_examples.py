"""The examples run, on small data and for a few epochs."""

import gzip
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_sparsity import (
    Block,
    MaskCallback,
    RigL,
    Rows,
    cosine,
    cubic,
    epochs,
    erk_power,
    last_layer,
    linear,
    sigmoid,
    uniform,
)
from lightning_sparsity.scores import drawn_by, momentum, nearby, random

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., dict[str, Any]]
# As an error, this warning would change what jsonargparse saves: users get the warning.
pytestmark = pytest.mark.filterwarnings(r"ignore:[\s\S]*Unable to serialize")
# The resumed run writes where the one that stopped has written.
EXISTS = pytest.mark.filterwarnings("ignore:Checkpoint directory")


@pytest.fixture(autouse=True)
def _lightning_2_6_calls_what_jsonargparse_4_49_deprecates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run an example as a script, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def idx(tensor: torch.Tensor) -> bytes:
    """A uint8 tensor in the IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.ndim]) + sizes + bytes(tensor.flatten().tolist())


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A data set in the form of MNIST: 240 pictures to train, 40 to test; some files packed."""
    directory = tmp_path / "digits"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 240), ("t10k", 40)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        (directory / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        (directory / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    return directory


@EXISTS
def test_quickstart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("quickstart.py", "--epochs", 2, "--density", 0.2)
    printed = capsys.readouterr().out
    assert "uninterrupted one: True" in printed
    assert "16896 of 84480" in printed
    assert "density 0.2000" in printed


@pytest.mark.filterwarnings("ignore:GMP goes to its density in a single update")
@pytest.mark.filterwarnings("ignore:RigL makes no update")
@pytest.mark.parametrize("method", ["rigl", "set", "static", "gmp", "magnitude", "dense"])
def test_mnist(run: Run, digits: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    run("mnist_rigl.py", "--data-dir", digits, "--method", method, "--epochs", 2)
    live = int(re.search(r"(\d+) of 266200", capsys.readouterr().out)[1])
    budget = 266200 if method == "dense" else 13310
    assert 0.9 * budget < live <= budget  # some weights that grew had no gradient yet


@pytest.mark.filterwarnings("ignore:GMP goes to its density in a single update")
@pytest.mark.filterwarnings(r"ignore:[\s\S]*factors are above epsilon")
def test_learned_masks(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("learned_masks.py", "--density", 0.1, "--epochs", 4, "--output", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("8448 live weights (0.1000)") == 4
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5


def test_lottery_ticket(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--density", 0.1, "--rounds", 2, "--epochs", 2, "--output", tmp_path / "runs")
    run("lottery_ticket.py", *arguments)
    printed = capsys.readouterr().out
    assert re.findall(r"(\d+) live weights", printed) == ["84480", "26715", "8448"]
    assert printed.count("test accuracy") == 5
    run("lottery_ticket.py", *arguments)  # only the controls are trained again
    assert capsys.readouterr().out == printed


@EXISTS
def test_mnist_resumes(run: Run, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("mnist_rigl.py", "--data-dir", digits, "--method", "static")
    run(*arguments, "--epochs", 1)
    run(*arguments, "--epochs", 2, "--resume")
    printed = capsys.readouterr()
    assert printed.out.count("13310 of 266200") == 2
    assert "Epoch 0" not in printed.out.rpartition("13310 of 266200")[0].partition("13310")[2]


def test_mnist_says_what_is_missing(
    run: Run, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit):
        run("mnist_rigl.py", "--data-dir", digits)
    assert "t10k-labels-idx1-ubyte is absent" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("mnist_rigl.py", "--data-dir", digits, "--resume")
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x0d\x01\0\0\0\x01", "starts with 00000d01"),
        (b"<html>", "is it another file"),
        (b"\0\0\x08\x03\0\0\0\x01", "ends inside its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "3 bytes of data, and its header promises 5"),
        (b"\0\0\x08\x01\0\0\0\x02abc", "3 bytes of data, and its header promises 2"),
    ],
)
def test_reader_refuses_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    read_idx = runpy.run_path(str(EXAMPLES / "mnist_rigl.py"))["read_idx"]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_reader_refuses_broken_gzip(tmp_path: Path) -> None:
    read_idx = runpy.run_path(str(EXAMPLES / "mnist_rigl.py"))["read_idx"]
    whole = gzip.compress(idx(torch.zeros(50, dtype=torch.uint8)))
    for content in (whole[:-5], b"no gzip at all"):
        (tmp_path / "file.gz").write_bytes(content)
        with pytest.raises(ValueError, match="download it again"):
            read_idx(tmp_path / "file")


def test_reader_reads_what_was_written(tmp_path: Path) -> None:
    read_idx = runpy.run_path(str(EXAMPLES / "mnist_rigl.py"))["read_idx"]
    tensor = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(idx(tensor))
    assert torch.equal(read_idx(tmp_path / "file"), tensor)


def test_cli(run: Run) -> None:
    config = EXAMPLES / "rigl.yaml"
    run("cli.py", "fit", "--config", config, "--trainer.max_epochs", 2)
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    live = sum(int(weights[f"net.{i}.weight"].count_nonzero()) for i in (0, 2))
    assert live == round(0.1 * (64 * 256 + 256 * 256))
    assert weights["net.4.weight"].all()
    (saved,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]["init_args"] == {
        **yaml.safe_load(config.read_text())["trainer"]["callbacks"][0]["init_args"],
        "drop_fraction": 0.3,
        "growth": "lightning_sparsity.scores.gradient",
        "update_start": 0,
        "include": "lightning_sparsity.linear_and_conv",
        "structure": None,
        "weight_init": None,
        "seed": None,
    }


class Model(LightningModule):
    pass


@pytest.fixture
def from_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, Any]], MaskCallback]:
    """Makes the callback of a configuration: written to a file, read, saved, and read again."""
    path = tmp_path / "config.yaml"
    monkeypatch.setattr(sys, "argv", ["cli", "--config", str(path)])

    def from_config(callback: str, arguments: dict[str, Any]) -> MaskCallback:
        entry = {"class_path": f"lightning_sparsity.{callback}", "init_args": arguments}
        path.write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": [entry]}}))
        saved = LightningCLI(Model, run=False, save_config_callback=None)
        path.write_text(saved.parser.dump(saved.config))
        again = LightningCLI(Model, run=False, save_config_callback=None)
        return next(c for c in again.trainer.callbacks if isinstance(c, MaskCallback))

    return from_config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, RigL(density=0.1)),
        ({"density": 0.5, "update_end": 0.75}, RigL(density=0.5, update_end=0.75)),
        ({"update_start": 10, "update_end": 200}, RigL(0.1, update_start=10, update_end=200)),
        ({"update_interval": "epoch"}, RigL(0.1, update_interval="epoch")),
        ({"update_interval": {"number": 5}}, RigL(0.1, update_interval=epochs(5))),
        (
            {
                "update_interval": {
                    "class_path": "lightning_sparsity.epochs",
                    "init_args": {"number": 5},
                }
            },
            RigL(0.1, update_interval=epochs(5)),
        ),
        ({"distribution": "lightning_sparsity.uniform"}, RigL(0.1, distribution=uniform)),
        (
            {
                "distribution": {
                    "class_path": "lightning_sparsity.erk_power",
                    "init_args": {"power": 0.5},
                }
            },
            RigL(0.1, distribution=erk_power(0.5)),
        ),
        ({"distribution": {"fc*": 0.5}}, RigL(0.1, distribution={"fc*": 0.5})),
        (
            {
                "structure": {
                    "class_path": "lightning_sparsity.Block",
                    "init_args": {"rows": 2, "columns": 4},
                }
            },
            RigL(0.1, structure=Block(2, 4)),
        ),
        ({"structure": "lightning_sparsity.Rows"}, RigL(0.1, structure=Rows())),
        ({"growth": "lightning_sparsity.scores.random"}, RigL(0.1, growth=random)),
        (
            {
                "growth": {
                    "class_path": "lightning_sparsity.scores.momentum",
                    "init_args": {"beta": 0.8},
                }
            },
            RigL(0.1, growth=momentum(0.8)),
        ),
        (
            {
                "growth": {
                    "class_path": "lightning_sparsity.scores.drawn_by",
                    "init_args": {
                        "score": {"class_path": "lightning_sparsity.scores.nearby"},
                        "power": 2.0,
                    },
                }
            },
            RigL(0.1, growth=drawn_by(nearby(0.1), power=2)),
        ),
        ({"drop_fraction": 0.4}, RigL(0.1, drop_fraction=0.4)),
        (
            {
                "drop_fraction": {
                    "class_path": "lightning_sparsity.cosine",
                    "init_args": {"start": 0.5, "end": 0.005},
                }
            },
            RigL(0.1, drop_fraction=cosine(0.5, 0.005)),
        ),
        ({"include": "fc*"}, RigL(0.1, include="fc*")),
        ({"include": "torch.nn.Linear"}, RigL(0.1, include=nn.Linear)),
        ({"exclude": "lightning_sparsity.last_layer"}, RigL(0.1, exclude=last_layer)),
        (
            {"exclude": ["lightning_sparsity.last_layer", "fc"]},
            RigL(0.1, exclude=[last_layer, "fc"]),
        ),
    ],
)
def test_config_means_what_code_does(
    from_config: Any, arguments: dict[str, Any], expected: MaskCallback
) -> None:
    made = from_config("RigL", {"density": 0.1, **arguments})
    for name in ("density", "distribution", "rule", "window", "structure", "include"):
        assert getattr(made, name) == getattr(expected, name)
    assert made.exclude == expected.exclude or (not made.exclude and not expected.exclude)


@pytest.mark.parametrize(
    ("ramp", "halfway"),
    [
        (None, cubic(1.0, 0.1)(0.5)),
        ("lightning_sparsity.linear", linear(1.0, 0.1)(0.5)),
        (
            {"class_path": "lightning_sparsity.sigmoid", "init_args": {"steepness": 4}},
            sigmoid(1.0, 0.1, steepness=4)(0.5),
        ),
    ],
)
def test_config_gives_a_ramp(from_config: Any, ramp: Any, halfway: float) -> None:
    made = from_config("GMP", {"density": 0.1} | ({"ramp": ramp} if ramp else {}))
    assert made.ramp is not None
    assert made.ramp(1.0, 0.1)(0.5) == halfway


def test_sparse_compute_tells_time_and_memory(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("sparse_compute.py", "--hidden", 96, "--epochs", 3, "--density", 0.2)
    told = capsys.readouterr().out
    for name in ("dense", "sparse, stored densely", "sparse, compressed"):
        assert re.search(rf"{name}: [\d.]+ ms per step, \d+ MiB", told), told
    live = float(re.search(r"live: ([\d.]+)", told)[1])
    assert 0 < live < 0.3
