"""Randomness: generators that stay the same between versions, states that come back."""

import hashlib
import io
import random

import numpy as np
import pytest
import torch

from lightning_sparsity.core.randomness import default_seed, generator, rng_state, set_rng_state


@pytest.fixture(autouse=True)
def _the_generators_of_the_process():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


# These numbers must never change: masks of old runs could not be drawn again.
@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((7, "net.0.weight", 3), 6968716724866518503),
        ((0,), 4246866556266386882),
        ((1, "RigL", "net.0.weight", 0), 7307560428247302017),
        ((-1, "SET[1]", "a", 12), 2067676963139988348),
    ],
)
def test_seeds_never_change(key, seed):
    assert generator(*key).initial_seed() == seed
    text = "/".join(map(str, key)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    assert seed == int.from_bytes(digest, "little") // 2


def test_draws_never_change():
    drawn = torch.rand(3, dtype=torch.float64, generator=generator(7, "net.0.weight", 3))
    expected = [0.4358498684139219, 0.0047902895302960324, 0.09984446568118677]
    assert drawn.tolist() == pytest.approx(expected, abs=1e-12)


def test_every_part_of_the_key_counts():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a"), (0, "a", 0, 0), (10, "a")]
    assert len({generator(*key).initial_seed() for key in keys}) == len(keys)
    assert generator(0, "a", 1).initial_seed() == generator(0, "a", 1).initial_seed()


def test_generators_leave_the_global_one_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=generator(3, "a"))
    assert torch.equal(torch.get_rng_state(), before)
    assert generator(3).device == torch.device("cpu")


def draw():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist()


def test_states_come_back():
    random.gauss(0, 1)  # leaves a second number behind, which belongs to the state
    np.random.standard_normal()
    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_taking_the_state_draws_nothing():
    set_rng_state(rng_state())
    state = rng_state()
    first = draw()
    set_rng_state(state)
    rng_state()
    assert draw() == first


def test_states_survive_a_safe_file():
    state = rng_state()
    first = draw()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert draw() == first


def test_the_seed_of_lightning_comes_first(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1234")
    assert default_seed() == 1234
    monkeypatch.delenv("PL_GLOBAL_SEED")
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert default_seed() == 77
    assert torch.equal(torch.get_rng_state(), before)
