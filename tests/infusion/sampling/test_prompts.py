import pytest

from infusion.sampling.prompts import Job, read_jobs
from infusion.sampling.settings import Settings

USUAL = Settings(steps=20, scale=5.0)


def test_a_line_without_options_is_drawn_as_usual():
    assert read_jobs("\n a {} on a hill \n# not drawn\nthe {}\n", USUAL) == [
        Job("a {} on a hill", USUAL, row=2),
        Job("the {}", USUAL, row=4),
    ]


def test_only_line_feeds_part_prompts():
    """Pasted text has other separators, which str.splitlines would cut at."""
    (job,) = read_jobs("a {} on a hill\u2028in the\x0bfog\n", USUAL)
    assert job.prompt == "a {} on a hill\u2028in the\x0bfog"


def test_options_follow_the_prompt():
    (job,) = read_jobs("a {}, close-up -- nice --n dull, grey --w 640 --h 512 --s 30 --l 6.5 --d 12", USUAL)
    own = Settings(steps=30, scale=6.5, negative_prompt="dull, grey", width=640, height=512)
    assert job == Job("a {}, close-up -- nice", own, 12, row=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("# nothing", "has no prompt in it"),
        ("a {}\na {} --x 3", "line 2: there is no option --x; there are --n, --w, --h, --s, --l, --d"),
        ("--n fog", "line 1: has options and no prompt"),
        ("a {} --s many", "line 1: --s: `many` is not a whole number from 1"),
        ("a {} --s", "line 1: --s: `` is not a whole number from 1"),
        ("a {} --l nan", "line 1: --l: `nan` is not a finite number"),
        ("a {} --l big", "line 1: --l: could not convert"),
        ("a {} --d -1", "line 1: --d: `-1` is not a whole number from 0"),
    ],
)
def test_mistakes_name_their_line(text, message):
    with pytest.raises(ValueError, match="^" + message):
        read_jobs(text, USUAL)
