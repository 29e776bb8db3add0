"""Schedules against the numbers of public reference programs."""

import json
from pathlib import Path

import pytest

from lightning_sparsity.schedules import cosine, cubic, linear

HERE = Path(__file__).parent
DYNAMIC = {case["kind"]: case for case in json.loads((HERE / "dynamic.json").read_text())["cases"]}
PRUNING = {case["name"]: case for case in json.loads((HERE / "pruning.json").read_text())["cases"]}


def test_rigl_cosine():
    case = DYNAMIC["schedule_cosine"]
    schedule = cosine(case["inputs"]["alpha"])
    for step, fraction in case["expected"]["fraction"].items():
        progress = int(step) / case["inputs"]["t_end"]
        assert schedule(progress) == pytest.approx(fraction, abs=1e-6)


def test_granet_cosine_with_floor():
    case = DYNAMIC["schedule_cosine_etamin"]
    schedule = cosine(case["inputs"]["initial"], case["inputs"]["eta_min"])
    for step, fraction in case["expected"]["fraction"].items():
        progress = int(step) / case["inputs"]["t_max"]
        assert schedule(progress) == pytest.approx(fraction, abs=1e-6)


def test_snfs_linear():
    case = DYNAMIC["schedule_linear"]
    schedule = linear(case["inputs"]["initial"])
    for step, fraction in case["expected"]["fraction"].items():
        progress = int(step) / case["inputs"]["t_max"]
        assert schedule(progress) == pytest.approx(fraction, abs=1e-6)


def test_gmp_cubic_from_a_step_to_a_step():
    case = DYNAMIC["schedule_cubic"]
    given = case["inputs"]
    schedule = cubic(1 - given["s_init"], 1 - given["s_final"])
    for step, sparsity in case["expected"]["sparsity"].items():
        progress = (int(step) - given["t_start"]) / (given["t_end"] - given["t_start"])
        assert 1 - schedule(progress) == pytest.approx(sparsity, abs=1e-6)


def test_gmp_cubic_of_the_paper():
    case = PRUNING["gmp_cubic_a"]
    given = case["inputs"]
    schedule = cubic(1 - given["s_initial"], 1 - given["s_final"])
    for step, sparsity in zip(given["steps"], case["expected"], strict=True):
        progress = (step - given["t0"]) / (given["n_steps"] * given["delta_t"])
        assert 1 - schedule(progress) == pytest.approx(sparsity, rel=case["rtol"])
