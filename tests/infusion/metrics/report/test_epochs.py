import json

import pytest

from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.epochs import epochs_of, in_order
from infusion.metrics.report.output import Measured
from infusion.metrics.report.tables import message, table
from tests.infusion.metrics.report.conftest import figure, result


def training(likeness, lfd, noun, name="rex"):
    """Epochs of one training, the last one first; the base model's likeness is 0.1."""
    rows = []
    for i, (like, change, share) in enumerate(zip(likeness, lfd, noun, strict=True), 1):
        one = result(f"{name}-{i}", "lora", group=f"{name}-{i}", epoch_of=f"{name}-1", epoch=i, training_steps=100 * i)
        one["figures"] = {
            "clip_i": figure(like, base=figure(0.1)),
            "lfd_context": figure(change),
            "noun": figure(share),
        }
        rows.append(one)
    return rows[::-1]


LONG = training([0.3, 0.5, 0.6, 0.61, 0.55], [0.1, 0.2, 0.3, 0.5, 0.9], [1, 1, 1, 0.99, 0.5])


def test_the_one_to_keep_and_where_overfitting_begins():
    (epochs,) = epochs_of(LONG)
    assert epochs.in_words() == (
        "Keep rex-3 (300 steps): likeness (CLIP-I) 0.600 ± 0.020, the untouched model has 0.100 ± 0.020. Overfitting "
        "begins at rex-4 (400 steps): likeness (0.610 ± 0.020) does not rise beyond its error while LFD around the "
        "concept rises from 0.300 ± 0.020 to 0.500 ± 0.020."
    )
    said = epochs.as_dict()
    assert (said["keep"], said["overfitting_from"], said["likeness"]) == ("rex-3", "rex-4", "clip_i")
    assert said["labels"] == [f"rex-{i}" for i in range(1, 6)]


@pytest.mark.parametrize(
    ("likeness", "lfd", "noun", "says"),
    [
        ([0.3, 0.5], [0.1, 0.9], [1, 0], "It is the last one: longer training may bring more."),
        ([0.3, 0.2], [0.1, 0.1], [1, 1], "No later one is seen to overfit."),
        ([0.3, 0.2], [0.1, 0.1], [1, 0.8], "while the share that keeps the noun falls from 100 % ± 2 % to 80 % ± 2 %."),
        ([0.3, 0.2], [0.1, 0.2], [1, 0.8], "to 0.200 ± 0.020 and the share that keeps the noun falls"),
        ([0.1, 0.0], [0.1, 0.2], [1, 0.8], "No epoch is more like the photos than the untouched model"),
    ],
)
def test_other_endings(likeness, lfd, noun, says):
    (epochs,) = epochs_of(training(likeness, lfd, noun))
    assert says in epochs.in_words()


def test_without_a_likeness_nothing_is_chosen():
    rows = training([0.3, 0.5], [0.1, 0.9], [1, 0])
    for row in rows:
        del row["figures"]["clip_i"]
    (epochs,) = epochs_of(rows)
    assert "--images names the photos" in epochs.in_words() and epochs.as_dict()["keep"] is None
    assert in_order(rows) == rows[::-1]


def test_two_trainings_and_another_row():
    other = result("hat", "infusion")
    rows = in_order([LONG[0], other, *training([0.3, 0.5], [0.1, 0.9], [1, 0], "max"), *LONG[1:]])
    assert [row["label"] for row in rows] == [*(f"rex-{i}" for i in range(1, 6)), "hat", "max-1", "max-2"]
    assert [row["label"] for row in rows if row.get("keep")] == ["rex-3", "max-2"]
    assert [epochs.training for epochs in epochs_of(rows)] == ["rex-1", "max-1"]


def test_a_report_marks_it_and_says_so():
    measured = Measured(in_order(LONG), {}, {}, "python scripts/metrics.py")
    assert json.loads(json.dumps(measured.as_dict()))["epochs"][0]["keep"] == "rex-3"
    assert measured.as_dict()["methods"]["rex-3"]["keep"] and "keep" not in measured.as_dict()["methods"]["rex-4"]
    groups = groups_of(in_order(LONG))
    assert table(groups, ["clip_i"]).index.tolist()[-5:] == ["rex-1", "rex-2", "rex-3 ★", "rex-4", "rex-5"]
    assert message(groups)["Concept"].startswith("rex-3 ★ reaches a likeness of 0.60")
