import pytest
from omegaconf import OmegaConf

from ldm.util.references import HEIGHT, MOST, Endless, measure


def nodes(value) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(nodes, children))


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": [1, {"c": 2}]}, "d": "x"},
        {"a": {"b": [1, 2]}, "c": ["${a}", "${a.b}", "${a.b[1]}"]},
        {"a": {"b": {"c": [1, 2]}}, "link": "${a}", "x": "${link.b.c}", "y": {"z": "${x[0]}"}},
    ],
)
def test_as_many_nodes_as_the_resolved_config_has_and_some_for_the_references(tree):
    resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    assert nodes(resolved) <= measure(tree) <= nodes(resolved) + nodes(tree)


def test_a_reference_that_leads_nowhere_is_one_node():
    assert measure({"a": "${b}", "c": "${a.d}", "e": "${x[7]}", "x": []}) == 5


@pytest.mark.parametrize(
    "tree",
    [
        {"a": "${a}"},
        {"a": "${b}", "b": "x ${a}"},
        {"a": {"b": {"c": "${a.b}"}}},
        {"a": ["${a}"]},
        {"a": "${b.c}", "b": "${a}"},
        {"a": "${b}", "b": {"c": "${d}"}, "d": "${a.c}"},
    ],
)
def test_circles(tree):
    with pytest.raises(Endless, match="stands for itself"):
        measure(tree)


def test_doubling_is_found_at_once():
    tree = {"a0": "x"} | {f"a{i}": [f"${{a{i - 1}}}"] * 2 for i in range(1, 80)}
    with pytest.raises(Endless, match="becomes too much"):
        measure(tree)


def test_texts_count_by_their_length():
    with pytest.raises(Endless, match="becomes too much"):
        measure({"a": "x" * 10_000, "b": ["${a}"] * (MOST // 100)})


def test_long_chains():
    with pytest.raises(Endless, match="becomes too much"):
        measure({"a0": 1} | {f"a{i}": f"${{a{i - 1}}}" for i in range(1, HEIGHT + 2)})
    with pytest.raises(Endless, match="becomes too much"):
        measure({f"a{i}": f"${{a{i + 1}}}" for i in range(5000)} | {"a5000": 1})
