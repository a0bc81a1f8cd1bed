import pytest
import torch
from torch import nn

from infusion.deltas import (
    Difference,
    LowRank,
    Whole,
    as_edits,
    attach,
    detach,
    find_layers,
    merge,
    outputs_changed,
    weights_edited,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3))


def test_edits_add_up_and_come_off(model):
    base, x = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.randn(2, 4)
    before = model(x)
    difference, down, up = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    with weights_edited(model, {"0.weight": [Difference(difference, 0.5), LowRank(down, up, alpha=6.0, strength=2.0)]}):
        expected = base["0.weight"] + 0.5 * difference + 2.0 * 6.0 / 2 * up @ down
        torch.testing.assert_close(model[0].weight, expected)
    assert torch.equal(model(x), before) and type(model[0]) is nn.Linear
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_strength_zero_is_the_base_to_the_bit(model):
    weight = model[0].weight.clone()
    with weights_edited(model, {"0.weight": [Difference(torch.randn(3, 4), 0.0)]}):
        assert torch.equal(model[0].weight, weight)


def test_gradients_reach_parameters_and_not_the_base(model):
    learned = nn.Parameter(torch.zeros(3, 4))
    model.requires_grad_(False)
    attach(model, {"0.weight": [Difference(learned)]})
    model(torch.randn(2, 4)).square().sum().backward()
    assert learned.grad.abs().max() > 0
    assert [p for p in model.parameters() if p.requires_grad] == [learned]


def test_other_edits_are_set_aside_and_put_back(model):
    outer, inner = Difference(torch.ones(3, 4)), Difference(torch.full((3,), 2.0))
    weight, bias = model[0].weight.clone(), model[1].bias.clone()
    attach(model, {"0.weight": [outer]})
    with pytest.raises(KeyError), weights_edited(model, {"1.bias": [inner]}):
        assert torch.equal(model[0].weight, weight) and torch.equal(model[1].bias, bias + 2)
        raise KeyError
    assert torch.equal(model[0].weight, weight + 1) and torch.equal(model[1].bias, bias)
    assert detach(model) == {"0.weight": [outer]} and torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("2.weight", (3, 4), "no tensor '2.weight'"),
        ("0.wait", (3, 4), "no tensor"),
        ("0.weight", (4, 3), r"is \(3, 4\)"),
    ],
)
def test_what_has_no_place_is_refused_and_changes_nothing(model, name, shape, message):
    with pytest.raises(ValueError, match=message):
        attach(model, {"0.bias": [Difference(torch.ones(3))], name: [Difference(torch.ones(shape))]})
    assert detach(model) == {}


def test_another_weight_takes_the_place_beside_other_changes(model):
    """W' and a difference add up from W, in any order; strength is the way from W to W'."""
    base, other, more = model[0].weight.clone(), torch.randn(3, 4), torch.randn(3, 4)
    for edits in ([Whole(other, 0.5), Difference(more)], [Difference(more), Whole(other, 0.5)]):
        with weights_edited(model, {"0.weight": edits}):
            torch.testing.assert_close(model[0].weight, base + 0.5 * (other - base) + more)
    assert torch.equal(model[0].weight, base)


def test_a_convolutions_low_rank_change_is_two_convolutions():
    torch.manual_seed(0)
    layer, down, up = nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    x = torch.randn(1, 4, 8, 8)
    expected = layer(x) + 1.5 * nn.functional.conv2d(nn.functional.conv2d(x, down), up)
    with weights_edited(layer, {"weight": [LowRank(down, up, alpha=3.0)]}):
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_merged_changes_stay(model):
    difference = torch.randn(3, 4)
    expected = model[0].weight + difference
    merge(model, {"0.weight": [Difference(difference)]})
    assert torch.equal(model[0].weight, expected) and detach(model) == {}
    assert model.state_dict().keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_concepts_names_say_what_changes():
    down, up = torch.ones(2, 4), torch.ones(3, 2)
    tensors = {
        "a": up,
        "b.whole": up,
        "c.down": down,
        "c.up": up,
        "d.up": up,
        "d.down": down,
        "d.alpha": torch.tensor(6.0),
    }
    found = as_edits(tensors, 0.5, alpha=1.0)
    assert {name: type(edit) for name, edit in found.items()} == {
        "a": Difference,
        "b": Whole,
        "c": LowRank,
        "d": LowRank,
    }
    assert (found["c"].scale, found["d"].scale) == (0.25, 1.5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.up": (3, 2)}, "lacks 'a.down'"),
        ({"a.alpha": ()}, "lacks 'a.down'"),
        ({"a.down": (2, 4), "a.up": (3, 5)}, "no low-rank change"),
        ({"a.down": (2,), "a.up": (3, 2)}, "no low-rank change"),
        ({"a.down": (2, 4), "a.up": (3, 2), "a.alpha": (2,)}, "no low-rank change"),
        ({"a": (3, 4), "a.whole": (3, 4)}, "two ways"),
        ({"a.down": (2, 4), "a.up": (3, 2), "a": (3, 4)}, "two ways"),
    ],
)
def test_names_that_say_no_change_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        as_edits({name: torch.ones(shape) for name, shape in tensors.items()})


class Doubled(nn.Module):
    """Twice the output, for rows of the first timestep."""

    def forward(self, x, output, timesteps):
        return output * (1 + (timesteps == 0))[:, None, None]


def test_outputs_are_changed_inside_the_with_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    x, timesteps = torch.randn(2, 4, 3), torch.tensor([0, 5])
    plain = model(x)
    with outputs_changed(find_layers(model, [("0", Doubled())]), timesteps):
        changed = model(x)
    assert torch.equal(changed[0], 2 * plain[0]) and torch.equal(changed[1], plain[1])
    assert torch.equal(model(x), plain)


def test_a_change_of_no_layer_is_refused():
    model, odd = nn.Sequential(nn.Linear(3, 2)), Doubled()
    odd.shape = torch.Size((2, 4))
    for changes, says in (([("0", Doubled()), ("1", Doubled())], "no layer '1'"), ([("0", odd)], r"0 is \(2, 3\)")):
        with pytest.raises(ValueError, match=says):
            find_layers(model, changes)
