import open_clip
import pytest
import torch

from ldm.models.tokenizer import Tokenizer

BOS, EOS = 49406, 49407
CAT = [320, 1125, 539, 320, 2368]  # a photo of a cat


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(merges=2000, context_length=12)


def test_ids_are_those_of_clip():
    tokenizer = Tokenizer()
    row = tokenizer(["a photo of a cat"])
    assert row.shape == (1, 77) and row.dtype == torch.int64
    assert row[0].tolist() == [BOS, *CAT] + [EOS] * 71
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (49408, BOS, EOS)
    assert tokenizer.encode("A  photo\nof a CAT ") == CAT


def test_openclip_pads_with_zero():
    texts = ["a photo of a cat", "", "naïve café, 3 penguins' 🐧!"]
    assert Tokenizer(pad="zero")(texts)[0].tolist() == [BOS, *CAT, EOS] + [0] * 70
    assert torch.equal(Tokenizer(pad="zero")(texts), open_clip.get_tokenizer("ViT-H-14")(texts))


def test_long_text_is_cut_and_still_ends(small):
    assert Tokenizer()(["cat " * 100])[0].tolist() == [BOS] + [2368] * 75 + [EOS]
    exact = small(["a " * 10])[0].tolist()
    assert exact == small(["a " * 11])[0].tolist() == [small.bos] + small.encode("a") * 10 + [small.eos]


def test_fewer_merges_give_dense_ids_and_keep_the_text(small):
    assert (small.vocab_size, small.bos, small.eos) == (2514, 2512, 2513)
    assert sorted(small.table.encoder.values()) == list(range(2514))
    text = "a photo of a penguin's café 🐧"
    ids = small.encode(text)
    assert max(ids) < 2512
    assert small.table.decode(ids).split() == ["a", "photo", "of", "a", "penguin", "'s", "café", "🐧"]
    assert small.encode("a photo of") == CAT[:3]  # the first merges keep their ids
    assert len(ids) > len(Tokenizer().encode(text))


def test_all_merges_or_none():
    assert Tokenizer(merges=48894)(["a photo of a cat"]).equal(Tokenizer()(["a photo of a cat"]))
    assert Tokenizer(merges=0).encode("cat") == [66, 64, 339]  # c, a, and t at the end of a word


@pytest.mark.parametrize("options", [{"merges": 48895}, {"merges": -1}, {"context_length": 1}])
def test_impossible_arguments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Tokenizer(**options)


def test_one_string_is_refused(small):
    with pytest.raises(ValueError, match="list of strings"):
        small("a photo of a cat")


def test_windows_read_a_text_whole():
    tokenizer = Tokenizer(pad="zero")
    words = tokenizer.encode("red " * 80 + "cat")
    long, short = tokenizer.windows(["red " * 80 + "cat", "a cat"])
    assert long.tolist() == [BOS, *words[:75], EOS, BOS, *words[75:], EOS] + [0] * 69
    assert torch.equal(short, tokenizer(["a cat", ""]).flatten())
    assert torch.equal(tokenizer.windows(["", "a cat"]), tokenizer(["", "a cat"]))


@pytest.mark.parametrize(
    ("words", "windows"),
    [([0], [1]), ([0, 75], [1, 1]), ([75, 76], [1, 2]), ([225, 300, 375], [3, 4, 5]), ([500, 0, 600], [7, 1, 8])],
)
@pytest.mark.parametrize("pad", ["end", "zero"])
def test_texts_are_as_many_windows_as_the_longest_has_and_only_their_own_count(words, windows, pad):
    tokenizer = Tokenizer(pad=pad)
    ids = tokenizer.windows(["red " * count for count in words])
    assert ids.shape == (len(words), 77 * max(windows))
    attended = tokenizer.attended(ids)
    if len(set(windows)) == 1:
        assert attended is None
    else:
        assert attended.dtype == torch.bool and attended.shape == ids.shape
        assert attended.sum(1).tolist() == [77 * count for count in windows]
        assert attended.int().diff(dim=1).max() == 0  # those of the text come first


def test_what_is_beyond_is_named():
    tokenizer = Tokenizer()
    assert tokenizer.beyond("red " * 75) == ""
    assert tokenizer.beyond("red " * 74 + "on Grass, at night") == "grass , at night"
    assert tokenizer.beyond("red " * 150 + "cat", windows=2) == "cat"
    with pytest.raises(ValueError, match="'red red .* is longer than the 600 tokens that are read: 'cat' is beyond"):
        tokenizer.windows(["red " * 600 + "cat"])
