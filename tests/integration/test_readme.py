"""The README keeps what it says: its code runs, its commands are those of CI."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_sparsity
from lightning_sparsity.distributions import apportion
from lightning_sparsity.testing import fit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 8)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.head(self.fc(inputs).relu()), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def loader() -> DataLoader:
    data = TensorDataset(torch.randn(80, 20), torch.randint(0, 3, (80,)))
    return DataLoader(data, batch_size=8)


def bare_net() -> nn.Module:
    return nn.Sequential(OrderedDict(fc=nn.Linear(20, 8), head=nn.Linear(8, 3)))


def test_code_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, bare, arguments, combined = blocks("python")
    names: dict[str, object] = {"model": Classifier(), "train_loader": loader()}

    exec(first, names)
    trainer, model = names["trainer"], names["model"]
    live = sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "weight" in n)
    assert live == round(0.1 * (20 * 8 + 8 * 3))

    trainer.save_checkpoint("last.ckpt")
    names["net"] = bare_net()
    exec(bare, names)
    assert torch.equal(names["net"].fc.weight, model.fc.weight)

    exec(arguments, names)
    exec(combined, names)
    names["trainer"].fit(Classifier(), loader())


def test_config_names_what_exists() -> None:
    (config,) = blocks("yaml")
    (callback,) = yaml.safe_load(config)["trainer"]["callbacks"]
    arguments = callback["init_args"]
    package, _, distribution = arguments["distribution"].rpartition(".")
    assert package == "lightning_sparsity"
    arguments["distribution"] = getattr(lightning_sparsity, distribution)
    getattr(lightning_sparsity, callback["class_path"].rpartition(".")[2])(**arguments)


@pytest.mark.parametrize(
    "page", ["combining", "custom", "distributions", "metrics", "parameters", "schedules"]
)
def test_code_of_the_documentation_runs(page: str) -> None:
    names: dict[str, object] = {"nn": nn, "apportion": apportion}
    exec("from lightning_sparsity import *", names)
    found = blocks("python", (ROOT / "docs" / f"{page}.md").read_text())
    assert found
    for block in found:
        exec(block, names)


@pytest.mark.parametrize("name", ["BySaliency", "ByMomentum"])
def test_methods_of_the_documentation_train(name: str) -> None:
    names: dict[str, object] = {}
    for block in blocks("python", (ROOT / "docs" / "custom.md").read_text()):
        exec(block, names)
    method = names[name](0.25, update_interval=4)
    result = fit([method])
    assert result.changes > 1
    assert result.live == round(0.25 * sum(mask.numel() for mask in result.masks.values()))


def test_ci_runs_the_second_command() -> None:
    quickstart, tests = (block.strip() for block in blocks("bash"))
    assert quickstart.endswith("python examples/quickstart.py")
    assert tests.endswith("pytest -n auto --dist loadfile")
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


def test_installing_is_always_constrained() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for command in re.findall(r"pip install [^`\n]*(?:-e|CLONE)[^`\n]*", page.read_text()):
            assert "-c constraints.txt" in command, f"{page}: {command}"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
