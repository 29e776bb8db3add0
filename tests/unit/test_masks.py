"""Masks: what a commit writes, and what it leaves alone."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_sparsity.core.filters import candidates
from lightning_sparsity.core.masks import Masks, optimizer_state
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.randomness import generator
from lightning_sparsity.structures import Rows, Unstructured
from lightning_sparsity.testing import assert_zero_off_masks

OLD = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0]]).bool()
NEW = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]).bool()

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
}


def trained(mask, make, dtype=torch.float32, steps=3):
    """A linear layer trained under a mask, with its Masks and its optimizer."""
    torch.manual_seed(0)
    module = nn.Linear(mask.shape[1], mask.shape[0], dtype=dtype)
    masks = Masks([SparseParameter(candidates(module)[0], Unstructured())])
    kept = masks["weight"]
    optimizer = make(module.parameters())
    masks.commit([dataclasses.replace(view(kept), mask=mask.clone())], [optimizer])
    for _ in range(steps):
        module(torch.randn(4, mask.shape[1], dtype=dtype)).square().sum().backward()
        masks.enforce_gradients([kept])
        optimizer.step()
        optimizer.zero_grad()
    assert_zero_off_masks(masks, [optimizer])
    return masks, kept, optimizer


def view(kept):
    return kept.layer(None, generator(0))


# Commit


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_keep_their_bits_and_all_others_are_zero(name):
    masks, kept, optimizer = trained(OLD, OPTIMIZERS[name])
    weight, bias = kept.parameter.detach().clone(), list(optimizer.param_groups[0]["params"])[1]
    state = [t.clone() for t in optimizer_state(kept, optimizer)]
    others = {k: v.clone() for k, v in optimizer.state[bias].items() if torch.is_tensor(v)}
    step = optimizer.state[kept.parameter].get("step")
    assert len(state) == {"momentum": 1, "adam": 2, "amsgrad": 3, "rmsprop": 3}[name]
    assert all((t[OLD] != 0).all() for t in (weight, *state))

    masks.commit([dataclasses.replace(view(kept), mask=NEW.clone())], [optimizer])

    survivors = OLD & NEW
    for before, after in zip(
        (weight, *state), (kept.parameter, *optimizer_state(kept, optimizer)), strict=True
    ):
        assert torch.equal(after.detach()[survivors], before[survivors])
        assert not after.detach()[~survivors].any()
        assert not torch.signbit(after.detach()[~NEW]).any(), "plus zero"
    assert optimizer.state[kept.parameter].get("step") is step
    for key, before in others.items():
        assert torch.equal(optimizer.state[bias][key], before)


def test_new_values_are_written_where_the_mask_lives():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    layer = dataclasses.replace(view(kept), mask=NEW.clone(), weight=torch.full((2, 5), 7.0))
    before = [t.clone() for t in optimizer_state(kept, optimizer)]
    masks.commit([layer], [optimizer])
    assert torch.equal(kept.parameter.detach(), 7.0 * NEW)
    for old, new in zip(before, optimizer_state(kept, optimizer), strict=True):
        assert torch.equal(new, old * (OLD & NEW))


def test_new_values_under_the_old_mask():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    before = [t.clone() for t in optimizer_state(kept, optimizer)]
    masks.commit([dataclasses.replace(view(kept), weight=torch.full((2, 5), 7.0))], [optimizer])
    assert torch.equal(kept.parameter.detach(), 7.0 * OLD)
    for old, new in zip(before, optimizer_state(kept, optimizer), strict=True):
        assert torch.equal(new, old)


def test_values_that_are_not_numbers_do_not_stay_off_the_mask():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["momentum"])
    weight = kept.parameter.detach().clone()
    weight[~NEW] = float("nan")
    masks.commit([dataclasses.replace(view(kept), mask=NEW.clone(), weight=weight)], [optimizer])
    assert_zero_off_masks(masks, [optimizer])
    assert torch.isfinite(kept.parameter).all()


def test_committing_what_is_there_changes_no_bit():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["amsgrad"])
    weight = kept.parameter.detach().clone()
    state = [t.clone() for t in optimizer_state(kept, optimizer)]
    for layer in (view(kept), dataclasses.replace(view(kept), mask=OLD.clone())):
        masks.commit([layer], [optimizer])
        assert torch.equal(kept.parameter.detach(), weight)
        assert torch.equal(kept.mask, OLD)
        assert all(
            torch.equal(a, b) for a, b in zip(state, optimizer_state(kept, optimizer), strict=True)
        )


def test_identities_never_change():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    before = kept.mask, kept.mask.data_ptr(), kept.parameter, kept.parameter.data_ptr()
    pointers = [t.data_ptr() for t in optimizer_state(kept, optimizer)]
    for mask in (NEW, OLD, torch.ones_like(OLD), NEW):
        masks.commit([dataclasses.replace(view(kept), mask=mask.clone())], [optimizer])
        assert torch.equal(kept.mask, mask)
    after = kept.mask, kept.mask.data_ptr(), kept.parameter, kept.parameter.data_ptr()
    assert all(a is b or a == b for a, b in zip(before[1::2], after[1::2], strict=True))
    assert after[0] is before[0]
    assert after[2] is before[2]
    assert [t.data_ptr() for t in optimizer_state(kept, optimizer)] == pointers


def test_a_committed_mask_is_a_copy():
    masks, kept, _ = trained(OLD, OPTIMIZERS["adam"])
    mask = NEW.clone()
    masks.commit([dataclasses.replace(view(kept), mask=mask)])
    mask.zero_()
    assert torch.equal(kept.mask, NEW)


def test_counts_follow_the_mask():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    assert (kept.live, kept.density, kept.is_dense) == (5, 0.5, False)
    assert (masks.live, masks.numel, masks.density) == (5, 10, 0.5)
    masks.commit([dataclasses.replace(view(kept), mask=torch.ones_like(OLD))], [optimizer])
    assert (kept.live, kept.density, kept.is_dense) == (10, 1.0, True)
    masks.commit([dataclasses.replace(view(kept), mask=OLD & NEW)], [optimizer])
    assert (masks.live, masks.density) == (3, 0.3)


def test_commits_are_counted():
    masks, kept, _ = trained(OLD, OPTIMIZERS["adam"])
    before = masks.changes
    masks.commit([view(kept)])
    masks.commit([])
    assert masks.changes == before + 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"], dtype)
    weight = kept.parameter.detach().clone()
    masks.commit([dataclasses.replace(view(kept), mask=NEW.clone())], [optimizer])
    assert torch.equal(kept.parameter.detach(), weight * (OLD & NEW))
    assert_zero_off_masks(masks, [optimizer])


def test_state_of_another_dtype_than_the_weight():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"], torch.bfloat16)
    state = optimizer.state[kept.parameter]
    state["exp_avg"] = state["exp_avg"].float()
    before = state["exp_avg"].clone()
    masks.commit([dataclasses.replace(view(kept), mask=NEW.clone())], [optimizer])
    assert torch.equal(state["exp_avg"], before * (OLD & NEW))


def test_channels_last_weights():
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    masks = Masks([SparseParameter(candidates(module)[0], Rows())])
    kept = masks["weight"]
    assert kept.mask.stride() == module.weight.stride()
    assert kept.gate.stride() == module.weight.stride()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.randn(2, 4, 5, 5)).sum().backward()
    optimizer.step()
    before = module.weight.detach().clone()
    momentum = optimizer.state[module.weight]["momentum_buffer"].clone()
    live = torch.tensor([True, False, True, True, False, True])
    masks.commit([view(kept).with_units(live)], [optimizer])
    expected = live.view(6, 1, 1, 1).expand(6, 4, 3, 3)
    assert torch.equal(kept.mask, expected)
    assert torch.equal(module.weight.detach(), before * expected)
    assert torch.equal(optimizer.state[module.weight]["momentum_buffer"], momentum * expected)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert kept.mask.stride() == module.weight.stride()
    # Gradients come in either format.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        grad = torch.randn(6, 4, 3, 3).contiguous(memory_format=memory_format)
        module.weight.grad = grad.clone(memory_format=torch.preserve_format)
        masks.enforce_gradients(masks)
        assert torch.equal(module.weight.grad, grad * expected)


def test_only_committed_layers_are_written():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pool = [c for c in candidates(net) if c.name.endswith("weight")]
    masks = Masks([SparseParameter(c, Unstructured()) for c in pool])
    other = masks["1.weight"].parameter.detach().clone()
    mask = torch.eye(3).bool()
    masks.commit([dataclasses.replace(view(masks["0.weight"]), mask=mask)])
    assert torch.equal(masks["0.weight"].mask, mask)
    assert masks["1.weight"].is_dense
    assert torch.equal(masks["1.weight"].parameter.detach(), other)


def test_biases_are_written_in_place():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    bias, before = kept.bias, kept.bias.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[bias].items()}
    layer = view(kept)
    assert torch.equal(layer.bias, bias)
    assert not layer.bias.requires_grad
    masks.commit([layer], [optimizer])
    masks.commit([dataclasses.replace(layer, mask=NEW.clone())], [optimizer])
    assert torch.equal(bias, before), "a bias that nobody changed"
    pointer = bias.data_ptr()
    masks.commit([dataclasses.replace(layer, bias=torch.tensor([3.0, -4.0]))], [optimizer])
    assert kept.bias is bias
    assert bias.data_ptr() == pointer
    assert bias.requires_grad
    assert bias.tolist() == [3.0, -4.0]
    for key, tensor in state.items():
        assert torch.equal(optimizer.state[bias][key], tensor)
    masks.commit([dataclasses.replace(layer, bias=None)], [optimizer])
    assert bias.tolist() == [3.0, -4.0]


def test_layers_without_a_bias_of_their_own():
    plain = nn.Linear(3, 2, bias=False)
    (found,) = candidates(plain)
    masks = Masks([SparseParameter(found, Unstructured())])
    layer = view(masks["weight"])
    assert layer.bias is None
    masks.commit([dataclasses.replace(layer, bias=torch.ones(2))])
    assert plain.bias is None
    # The bias of a cell belongs to another of its weights, or to none.
    cell = nn.ParameterDict({"w": torch.ones(2, 3), "bias": torch.ones(2)})
    found = next(c for c in candidates(cell) if c.name == "w")
    assert SparseParameter(found, Unstructured()).bias is None


def test_slots_are_written_when_a_rule_replaces_them():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["adam"])
    first, weight = torch.tensor(0.5), kept.parameter.detach().clone()
    masks.commit([dataclasses.replace(view(kept), slots={"threshold": first})], [optimizer])
    assert kept.slots.keys() == {"threshold"}
    assert kept.slots["threshold"] is first
    held = kept.slots
    masks.commit([dataclasses.replace(view(kept), mask=NEW.clone())], [optimizer])
    assert kept.slots is held, "left alone by rules that leave them alone"
    given = {**view(kept).slots, "sign": torch.ones(2, 5)}
    masks.commit([dataclasses.replace(view(kept), slots=given)], [optimizer])
    given.clear()
    assert kept.slots.keys() == {"threshold", "sign"}, "a dictionary of its own"
    masks.commit([dataclasses.replace(view(kept), slots={})], [optimizer])
    assert kept.slots == {}
    assert torch.equal(kept.parameter.detach(), weight * (OLD & NEW))


# Enforce


def test_enforcing_zeroes_weights_and_state_off_the_mask():
    masks, kept, optimizer = trained(OLD, OPTIMIZERS["amsgrad"])
    tensors = [kept.parameter.detach(), *optimizer_state(kept, optimizer)]
    before = [t.clone() for t in tensors]
    for t in tensors:
        t[~OLD] = float("nan")
    masks.enforce([kept], optimizer)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    kept.parameter.detach()[~OLD] = 3.0
    optimizer_state(kept, optimizer)[0][~OLD] = 3.0
    masks.enforce([kept])
    assert torch.equal(kept.parameter.detach(), before[0])
    assert optimizer_state(kept, optimizer)[0][~OLD].eq(3.0).all(), "no optimizer was given"


def test_enforcing_gradients():
    masks, kept, _ = trained(OLD, OPTIMIZERS["adam"])
    masks.enforce_gradients(masks)
    assert kept.parameter.grad is None
    kept.parameter.grad = torch.full((2, 5), float("inf"))
    kept.parameter.grad[OLD] = 2.0
    masks.enforce_gradients(masks)
    assert torch.equal(kept.parameter.grad, 2.0 * OLD)


def test_optimizer_state_is_what_has_the_shape_of_the_weight():
    _, kept, optimizer = trained(OLD, OPTIMIZERS["amsgrad"])
    state = optimizer.state[kept.parameter]
    keys = {
        key for key, t in state.items() if any(t is s for s in optimizer_state(kept, optimizer))
    }
    assert keys == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert optimizer_state(kept, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)) == []


# Looking


def test_masks_are_a_mapping_by_plain_name():
    masks, kept, _ = trained(OLD, OPTIMIZERS["adam"])
    assert list(masks) == [kept]
    assert len(masks) == 1
    assert "weight" in masks
    assert "bias" not in masks
    assert masks["weight"] is kept
    with pytest.raises(KeyError):
        masks["bias"]
    assert repr(kept) == "SparseParameter(weight, (2, 5), density=0.5)"


def test_digests_are_equal_exactly_when_the_masks_are():
    first, kept, _ = trained(OLD, OPTIMIZERS["adam"])
    second, _, _ = trained(OLD, OPTIMIZERS["momentum"])
    assert first.digest() == second.digest()
    for row in range(2):
        for column in range(5):
            mask = OLD.clone()
            mask[row, column] ^= True
            first.commit([dataclasses.replace(view(kept), mask=mask)])
            assert first.digest() != second.digest()
    first.commit([dataclasses.replace(view(kept), mask=OLD.clone())])
    assert first.digest() == second.digest()


def test_digests_do_not_depend_on_the_memory_format():
    module = nn.Conv2d(4, 6, 3)
    mask = torch.rand(6, 4, 3, 3) < 0.5
    digests = set()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module.to(memory_format=memory_format)
        masks = Masks([SparseParameter(candidates(module)[0], Unstructured())])
        masks.commit([dataclasses.replace(view(masks["weight"]), mask=mask)])
        digests.add(masks.digest())
    assert len(digests) == 1
