from itertools import combinations

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F
from torchmetrics.functional.image import lpips

from infusion.metrics.measures.fidelity import alignment, among, diversity, drift, lpips_diversity, pairwise


def at(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def cosines(*degrees):
    return torch.tensor(degrees, dtype=torch.float64).deg2rad().cos()


def test_pairwise_is_the_mean_cosine_with_every_photo():
    wanted = torch.stack([cosines(0, 90).mean(), cosines(60, 30).mean(), cosines(180, 90).mean()])
    torch.testing.assert_close(pairwise(at(0, 60, 180), at(0, 90)), wanted)


def test_among_leaves_out_each_photo_itself():
    wanted = torch.stack([cosines(60, 90).mean(), cosines(60, 30).mean(), cosines(90, 30).mean()])
    torch.testing.assert_close(among(at(0, 60, 90)), wanted)
    torch.testing.assert_close(among(at(30, 30)), torch.ones(2).double())


def test_alignment_and_drift_go_row_by_row():
    torch.testing.assert_close(alignment(at(0, 10), at(60, 10)), cosines(60, 0))
    torch.testing.assert_close(drift(at(0, 0, 0), at(0, 90, 180)), torch.tensor([0.0, 0.5, 1.0]).double())


def test_diversity_is_within_prompts():
    found = diversity(at(0, 100, 60, 100, 90), ["b", "a", "b", "a", "b"])
    torch.testing.assert_close(found, torch.stack([1 - cosines(60, 90, 30).mean(), torch.tensor(0.0).double()]))


@pytest.mark.parametrize("function", [pairwise, alignment, drift])
def test_features_of_any_precision_are_computed_in_float64(function):
    assert function(at(0).half(), at(30).half()).dtype == torch.float64


@pytest.fixture(scope="module")
def alexnet():
    """Random, and without the classifier, which is most of it."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    del network.classifier
    return network


def reference(network, first, second):
    """LPIPS, eq. 1 of Zhang et al. 2018: squared gaps of unit-length features, weighed by channel, mean over places."""
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    heads = torch.load(lpips.__file__.replace("lpips.py", "lpips_models/alex.pth"), map_location="cpu")
    x = ((torch.stack([first, second]) * 2 - 1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    total, layer = 0, 0
    for module in network.features:
        x = module(x)
        if isinstance(module, torch.nn.ReLU):
            unit = F.normalize(x, dim=1)
            total += (heads[f"lin{layer}.model.1.weight"][0] * (unit[0] - unit[1]).square()).sum(0).mean()
            layer += 1
    assert layer == 5
    return total.item()


def test_lpips_diversity(alexnet, tmp_path):
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    save_file(alexnet.state_dict(), tmp_path / "alexnet.safetensors")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[4] = images[1]
    found = lpips_diversity(images, list("abaab"), tmp_path / "alexnet.pth")
    with torch.no_grad():
        wanted = [reference(alexnet, images[i], images[j]) for i, j in combinations([0, 2, 3], 2)]
    assert found.tolist() == pytest.approx([sum(wanted) / 3, 0.0], rel=1e-4)
    assert found[0] > 1e-5
    assert torch.equal(lpips_diversity(images, list("abaab"), tmp_path / "alexnet.safetensors"), found)


def test_lpips_names_what_is_wrong(alexnet, tmp_path):
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="no such file"):
        lpips_diversity(images, "aa", tmp_path / "alexnet.pth")
    state = {name: value for name, value in alexnet.state_dict().items() if name != "features.8.bias"}
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="not torchvision's AlexNet, whose features.8.bias"):
        lpips_diversity(images, "aa", tmp_path / "cut.pth")
