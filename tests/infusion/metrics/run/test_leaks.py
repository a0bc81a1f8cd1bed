"""What is measured is never what was trained on: prompts and seeds of class images and of measurements."""

import pytest

from data.prior import COUNT
from infusion.metrics.run.evaluate import Evaluation
from infusion.metrics.run.options import EVALUATION_SEED, Options
from infusion.metrics.run.protocol import CONTEXT, GROUPS, Protocol
from infusion.metrics.run.stages import Stages
from ldm.util.config import ROOT, instantiate, load_config
from ldm.util.templates import fill

PROTOCOLS = sorted((ROOT / "configs/protocol").glob("*.yaml"))
METHODS = [path for folder in ("method", "compare") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))]


def priors():
    """Prompts and seeds of class images, for every config that has some."""
    for path in METHODS:
        config = load_config(path)
        node = config.get("data", {}).get("params", {}).get("prior")
        if node:
            config.superclass = "{}"
            yield path.stem, instantiate(node, "prior")


def test_there_are_class_images_to_compare_with():
    found = dict(priors())
    assert set(found) == {"dreambooth", "custom_diffusion"} and all(one.count > 10 for one in found.values())


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_no_measured_prompt_is_one_of_class_images(path):
    protocol = Protocol.load(path)
    nouns = {*protocol.others, *(noun for row in protocol.kin for noun in row)}
    trained = {fill(prior.prompt, [noun]) for _, prior in priors() for noun in nouns}
    assert len(trained) == len(nouns) > 5
    for noun in nouns:
        for group in GROUPS:
            prompts = {prompt.replace("{}", noun) for prompt in protocol.prompts(group, noun)}
            assert not prompts & trained, group


def test_measured_seeds_are_apart_from_those_of_class_images(sd, protocol, options, tools, subject, cache):
    evaluation = Evaluation(Stages(sd, options, tools, cache), subject("infusion"), protocol)
    measured = {seed for group in evaluation.groups.values() for seed in group.seeds(range(options.samples))}
    for _, prior in priors():
        assert not measured & {prior.seed + number for number in range(prior.count)}
    assert min(measured) == EVALUATION_SEED > COUNT
    assert CONTEXT in evaluation.groups and Options(seed=7).first_seed == EVALUATION_SEED + 7
