"""What each contract test shows: of which method, and of which feature.

``python tests/contract/compatibility.py`` runs the tests that show something and makes
``docs/compatibility.md`` of how they ended. A test compares that page with what the tests would
show, so that it cannot fall behind them. With ``pytest --compatibility FILE`` any run writes down
what it has shown, and ``python tests/contract/compatibility.py FILE ...`` makes the page of these.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from methods import APART, METHODS, SINGLE_WEIGHTS, public_methods

import lightning_sparsity
from lightning_sparsity import NM, Block, Columns, Rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
TABLES: dict[str, dict[str, str]] = {
    "Stepping": {
        "32-true": "32",
        "bf16-mixed": "bf16-mixed",
        "bf16-true": "bf16-true",
        "16-mixed": "16-mixed",
        "accumulation": "accumulated gradients",
        "norm": "clipping by norm",
        "value": "clipping by value",
        "manual": "manual optimization",
        "several": "several optimizers",
    },
    "Training": {
        "epoch": "resume at the end of an epoch",
        "middle": "resume in mid-epoch",
        "compile": "torch.compile",
        "ema": "EMA",
        "swa": "SWA",
        "adapters": "adapters",
    },
    "Two processes": {
        "ddp": "DDP",
        "fsdp": "FSDP2",
        "tp": "tensor parallelism",
    },
    "Searches and limits": {
        "lr": "LR finder",
        "batch": "batch-size finder",
        "limit": "limit_train_batches",
        "overfit": "overfit_batches",
        "stopping": "early stopping",
        "time": "max_time",
    },
    "Structures and storage": {
        "rows": "rows",
        "columns": "columns",
        "block": "blocks",
        "nm": "N:M",
        "csr": "compressed storage",
    },
}
INTRODUCTION = """\
# Compatibility

What the tests show of every method, and nothing else: this page is made from their results.
✓ is tested; "refused" is tested to be refused, with an error that says what to do; "dense" is
tested to leave the weights in dense storage, and to say why; – has no test here, which says neither
that it works nor that it does not; n/a is not applicable, as the method has no such argument.

All tests run on the CPU, with a small network of a convolution and two linear layers. 16-mixed is
mixed precision with a gradient scaler, one of whose steps is skipped. Clipping, accumulation,
precisions and five optimizers are combined in pairs, for some methods in full. Resuming gives the
bits of the training that was not interrupted. Manual optimization has two optimizers. EMA is
`EMAWeightAveraging` and SWA `StochasticWeightAveraging` of Lightning; torch.compile is that of an
inner network. Adapters are pairs of small linear layers that `exclude=` leaves dense: around
sparse layers, around layers that are frozen with the masks they have, and added between two calls
of `fit`, where no method is with phases that fill the training.

Under DDP the masks of both processes are equal after every batch, and the weights; with weights in
parts, under FSDP2 and tensor parallelism, they are those of one process.

The training after a batch-size finder has the bits of one that began with that size, if the
model draws no random numbers; limited batches give those of a data set of that length. Up to where
early stopping or `max_time` ends a training, its masks are those of one that goes on, and if
`max_time` ended it in mid-epoch, resuming gives the bits of that one. Where the density was not
reached, the method says so. Without `max_epochs` and `max_steps` windows must be in steps;
fractions of a training without an end are refused.

"RigL, compressed" is `RigL` with `SparseCompute("csr")`. Weights whose masks are learned are
compressed when these are final, so their methods are tested with an `update_end`; until then they
are dense. `Powerpropagation` makes no masks of its own and is not listed.
"""
Verdict = Literal["tested", "refused", "dense"]
SIGNS = {
    "tested": "✓",
    "refused": "refused",
    "dense": "dense",
    None: "–",
    "not applicable": "n/a",
}


@dataclass(frozen=True)
class Claim:
    """What a test shows when it passes.

    Args:
        method: Name of the method, as a row of the page has it.
        feature: Key of a column.
        verdict: What it shows.
    """

    method: str
    feature: str
    verdict: Verdict = "tested"


Parameters = Mapping[str, Any]


def _precision(row: Mapping[str, Any], key: str) -> list[str]:
    return {"scaler": ["16-mixed"], "raw": []}.get(row[key], [row[key]])


def _automatic(given: Parameters) -> list[str]:
    row = given["row"]
    steps = ["accumulation"] * (row["accumulate"] > 1) + [row["clip"]] * (row["clip"] is not None)
    return _precision(row, "precision") + steps


def _manual(given: Parameters) -> list[str]:
    steps = ["accumulation"] * (given["row"]["accumulate"] > 1)
    return [*_precision(given["row"], "way"), "manual", "several", *steps]


def _resumed(given: Parameters) -> list[str]:
    return ["middle" if given.get("step") == 12 else "epoch"]


def _always(*features: str) -> Callable[[Parameters], list[str]]:
    return lambda given: list(features)


def _structure(given: Parameters) -> list[str]:
    kinds = {Rows: "rows", Columns: "columns", Block: "block", NM: "nm"}
    return [kinds.get(type(given["structure"]), given["structure"])]


_STEPPING = {
    "accumulation": "accumulation",
    "clipping by norm": "norm",
    "clipping by value": "value",
    "bf16": "bf16-mixed",
}
SHOWS: dict[str, Callable[[Parameters], list[str]]] = {
    "test_matrix.py::test_automatic": _automatic,
    "test_matrix.py::test_manual": _manual,
    "test_core_contracts.py::test_resume_equals_not_stopping": _resumed,
    "test_core_contracts.py::test_budget_is_exact_in_units": _structure,
    "test_scenarios.py::test_averaged_weights_are_sparse_too": _always("ema"),
    "test_scenarios.py::test_stochastic_weight_averaging": _always("swa"),
    "test_scenarios.py::test_compiled_inner_network": _always("compile"),
    "test_scenarios.py::test_learning_rate_finder_leaves_the_masks_alone": _always("lr"),
    "test_learned_contracts.py::test_something_is_pruned_and_the_probe_sees_zeros": _always(
        "32-true"
    ),
    "test_learned_contracts.py::test_resume_equals_not_stopping": _always("epoch", "middle"),
    "test_learned_contracts.py::test_every_way_of_stepping": lambda given: [
        _STEPPING[given["way"]]
    ],
    "test_compatibility.py::test_bf16_true": _always("bf16-true"),
    "test_compatibility.py::test_a_scaler": _always("16-mixed"),
    "test_compatibility.py::test_manual_optimization_of_two_optimizers": _always(
        "manual", "several"
    ),
    "test_compatibility.py::test_averaged_weights": _always("ema"),
    "test_compatibility.py::test_stochastic_weight_averaging": _always("swa"),
    "test_compatibility.py::test_compiled": _always("compile"),
    "test_compatibility.py::test_learning_rate_finder": _always("lr"),
    "test_compatibility.py::test_structures_that_are_refused": _structure,
    "test_compatibility.py::test_structures": _structure,
    "test_compatibility.py::test_structures_before_the_dense_end": _structure,
    "test_compatibility.py::test_two_processes_agree": _always("ddp"),
    "test_loops.py::test_batch_size_finder": _always("batch"),
    "test_loops.py::test_part_of_the_data_is_less_data": lambda given: [
        {"limit_train_batches": "limit", "overfit_batches": "overfit"}[given["argument"]]
    ],
    "test_loops.py::test_limited_batches_resume": _always("limit"),
    "test_loops.py::test_early_stopping": _always("stopping"),
    "test_loops.py::test_a_training_that_ran_out_of_time_is_resumed": _always("time"),
    "test_loops.py::test_adapters_stay_dense": _always("adapters"),
    "test_loops.py::test_adapters_around_layers_that_are_sparse_already": _always("adapters"),
    "test_loops.py::test_adapters_added_after_a_first_fit": _always("adapters"),
    "test_loops.py::test_learned_masks_are_compressed_when_they_are_final": _always("csr"),
    "test_sharded_methods.py::test_parts_train_as_the_whole": lambda given: [given["cut"]],
    "test_sharded_methods.py::test_compressed_storage_is_refused": lambda given: [given["cut"]],
    "test_ddp.py::test_masks_agree_on_two_ranks": _always("ddp"),
    "test_sparse_compute.py::test_structures_are_those_of_dense_storage": _structure,
    "test_sparse_compute_ddp.py::test_two_ranks_train_as_with_dense_storage": _always("ddp"),
}
PLACES = sorted(
    path
    for name in {key.partition("::")[0] for key in SHOWS}
    for path in ROOT.glob(f"tests/*/{name}")
)


def verdict(where: str, name: str, storage: str, feature: str) -> Verdict:
    """What a test shows that passes."""
    if storage == "csr" and feature == "bf16-true":
        return "dense"
    return "refused" if is_refused(where, name, storage, feature) else "tested"


def is_refused(where: str, name: str, storage: str, feature: str) -> bool:
    """Whether a test shows that something is refused; the same conditions as in the tests."""
    if "test_scenarios" in where and storage == "csr":
        return feature in ("ema", "swa", "compile")
    if feature in ("fsdp", "tp"):
        method = EVERY[name]()
        looks = feature == "tp" and bool(method.statistics)
        return storage == "csr" or looks or isinstance(method, lightning_sparsity.LearnedMask)
    if feature == "compile":
        return name in METHODS and bool(METHODS[name]().statistics)
    if feature in ("manual", "several"):
        return name.startswith("ESPN")
    if feature == "swa":
        return name == "ESPNFinetune"
    structural = feature in TABLES["Structures and storage"] and feature != "csr"
    return structural and storage == "dense" and refuses(name, feature)


def takes_structures(name: str) -> bool:
    """Whether a method has such an argument at all."""
    return "structure" in inspect.signature(getattr(lightning_sparsity, name)).parameters


def refuses(name: str, structure: str) -> bool:
    """Whether a method refuses a structure when it is made."""
    alone = name in SINGLE_WEIGHTS or name == "VariationalDropout"
    return alone or (name in ("L0", "SoftMovementPruning") and structure == "nm")


def claims(where: str, given: Parameters) -> list[Claim]:
    """What a test shows.

    Args:
        where: File and function, such as ``test_matrix.py::test_manual``.
        given: Its parameters.
    """
    if where not in SHOWS:
        return []
    name = given["name"] if "name" in given else getattr(given.get("method"), "__name__", "RigL")
    storage = given.get("storage", "csr" if "test_sparse_compute" in where else "dense")
    features = SHOWS[where](given)
    if storage == "dense":
        rows = [(name, feature) for feature in features]
    else:  # of one method all of it is tested compressed; of the others that they can be resumed
        rows = [("RigL, compressed", feature) for feature in features if name == "RigL"]
        rows += [(name, "csr")] if name != "RigL" or "epoch" in features else []
    return [Claim(row, of, verdict(where, name, storage, of)) for row, of in rows]


def claims_of(item: pytest.Item) -> list[Claim]:
    """What a collected test shows."""
    if not isinstance(item, pytest.Function):
        return []
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return claims(f"{item.path.name}::{item.originalname}", given)


def page(found: Iterable[tuple[Sequence[Claim], bool]]) -> str:
    """The page.

    Args:
        found: What each test shows, and whether it passed.

    Raises:
        ValueError: If two tests contradict each other.
    """
    cells: dict[tuple[str, str], set[str]] = {}
    failed: set[tuple[str, str]] = set()
    for many, passed in found:
        for claim in many:
            cells.setdefault((claim.method, claim.feature), set()).add(claim.verdict)
            if not passed:
                failed.add((claim.method, claim.feature))
    if mixed := [cell for cell, verdicts in cells.items() if len(verdicts) > 1]:
        raise ValueError(f"tests say both of two things about {mixed}")
    rows = sorted(public_methods() - {"Powerpropagation"}, key=str.lower)
    rows.insert(rows.index("RigL") + 1, "RigL, compressed")
    parts = [INTRODUCTION]
    for title, columns in TABLES.items():
        lines = [f"## {title}", "", "| method | " + " | ".join(columns.values()) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            signs = [SIGNS[_verdict(cells, failed, row, feature)] for feature in columns]
            lines.append(f"| {_title(row)} | " + " | ".join(signs) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _verdict(
    cells: Mapping[tuple[str, str], set[str]],
    failed: set[tuple[str, str]],
    row: str,
    feature: str,
) -> str | None:
    if (row, feature) in cells and (row, feature) not in failed:
        return next(iter(cells[row, feature]))
    structural = feature in TABLES["Structures and storage"] and feature != "csr"
    if structural and row in EVERY and not takes_structures(row):
        return "not applicable"
    return "not applicable" if (row, feature) == ("RigL, compressed", "csr") else None


EVERY = {**METHODS, **APART}


def _title(row: str) -> str:
    method, _, rest = row.partition(",")
    return f"`{method}`{',' if rest else ''}{rest}"


# ------------------------------------------------------------------------ the pytest option


class Recorder:
    """Notes what the collected tests show, and how they ended.

    Args:
        file: Where that is written to.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.claims: dict[str, list[Claim]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.claims = {item.nodeid: many for item in items if (many := claims_of(item))}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.claims and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        tests = {
            node: {
                "outcome": self.outcomes.get(node, "not run"),
                "claims": [asdict(claim) for claim in many],
            }
            for node, many in self.claims.items()
        }
        self.file.write_text(json.dumps(tests, indent=1))


def load(file: Path) -> dict[str, tuple[list[Claim], str]]:
    """What :class:`Recorder` wrote: claims and outcome by test."""
    return {
        node: ([Claim(**claim) for claim in test["claims"]], test["outcome"])
        for node, test in json.loads(file.read_text()).items()
    }


def main(files: Sequence[str]) -> None:
    """Write the page.

    Args:
        files: Results of runs, of which the latest of each test counts; none: run the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not files:
            files = [f"{folder}/results.json"]
            names = "|".join(sorted({key.partition("::")[2] for key in SHOWS}))
            chosen = [*map(str, PLACES), "-k", names.replace("|", " or ")]
            command = [sys.executable, "-m", "pytest", "-q", "--compatibility", *files, *chosen]
            subprocess.run(command, cwd=ROOT)
        results: dict[str, tuple[list[Claim], str]] = {}
        for file in files:
            for node, test in load(Path(file)).items():
                if test[1] != "not run" or node not in results:
                    results[node] = test
    passed = sum(outcome == "passed" for _, outcome in results.values())
    PAGE.write_text(page((many, outcome == "passed") for many, outcome in results.values()))
    print(f"{PAGE.relative_to(ROOT)}: of {len(results)} tests, {passed} passed")


if __name__ == "__main__":
    main(sys.argv[1:])
