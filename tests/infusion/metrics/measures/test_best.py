import pytest

from infusion.metrics.measures.best import best_of, overfits_from, rises


@pytest.mark.parametrize(
    ("gains", "best"),
    [([0.1, 0.3, 0.32, 0.34], 3), ([0.1, 0.3, 0.32, 0.33], 1), ([0.3, 0.2, 0.1], 0), ([0.0, -0.1], None), ([], None),
     ([0.30, 0.32, 0.34, 0.36], 2)],
)  # fmt: skip
def test_a_later_moment_is_better_where_it_gains_a_tenth_more(gains, best):
    assert best_of(gains) == best


def test_a_figure_rises_beyond_the_errors_of_both():
    assert rises((0.5, 0.03), (0.551, 0.04)) and not rises((0.5, 0.03), (0.549, 0.04))
    assert not rises((0.5, 0.0), (0.4, 0.0)) and not rises((0.0, None), (9.0, 0.01))


def figures(*values, error=0.01):
    return [(value, error) for value in values]


@pytest.mark.parametrize(
    ("likeness", "costs", "at"),
    [
        ((0.3, 0.5, 0.50, 0.4), [(1, 2, 2, 3)], 3),  # what costs no more is not overfitted
        ((0.3, 0.5, 0.50, 0.4), [(1, 2, 3, 4)], 2),
        ((0.3, 0.5, 0.60, 0.5), [(1, 2, 3, 4)], 3),  # what brings more is not, either
        ((0.3, 0.5, 0.50, 0.5), [(1, 2, 2, 2), (0, 0, 0, 1)], 3),  # any of the costs
        ((0.3, 0.5, 0.40, 0.3), [(1, 2, 2, 1)], None),
        ((0.3, 0.5, 0.40, 0.3), [], None),
        ((0.3, 0.5), [(1, 2)], None),  # the kept one is the last
    ],
)
def test_overfitting_begins_where_more_is_lost_and_nothing_gained(likeness, costs, at):
    assert overfits_from(1, figures(*likeness), [figures(*cost) for cost in costs]) == at
