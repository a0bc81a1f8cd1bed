from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from infusion.regularisers.contextualizer import load
from infusion.training.contextual import CaptionFile, ContextualizerTraining, SaveContextualizer
from ldm.models.text import ClipText
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.templates import short
from tests.infusion import conftest

PAIRS = [
    ("cat", "fish"),
    ("dog", "meat"),
    ("bird", "seeds"),
    ("horse", "grass"),
    ("mouse", "cheese"),
    ("bear", "honey"),
]
CAPTIONS = [f"{place} the {who} eats {what}" for who, what in PAIRS for place in ("at home", "today", "in the park")]


@pytest.fixture
def sd():
    torch.manual_seed(0)
    text = ClipText(Tokenizer(merges=2000, context_length=16), 32, 64, layers=2, heads=2, max_length=16)
    with torch.no_grad():
        text.embeddings.mul_(50)  # words that differ
    return SimpleNamespace(text=text.eval(), architecture="tiny", digests={}, device=torch.device("cpu"))


def test_the_loss_is_that_of_the_recipe(sd):
    module = ContextualizerTraining(sd, layers=2, heads=2)
    tokens = sd.text.tokenizer(CAPTIONS[:3])
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, 2:4] = True
    loss, accuracy = module.reading(tokens, masked)
    net = module.contextualizer
    logits = net(net.read(sd.text, tokens, masked, None), torch.ones_like(masked)).view(3, 16, -1)
    total = 0.0
    for i, row in enumerate(tokens.tolist()):
        for j in range(row.index(sd.text.tokenizer.eos)):  # the begin token too, the end token not
            total += (5 if masked[i, j] else 1) * F.cross_entropy(logits[i, j], tokens[i, j]).item()
    assert loss.item() == pytest.approx(total / (3 * 16), rel=1e-5) and 0 <= accuracy <= 1


def test_a_caption_that_is_cut_is_told_once(sd, caplog, monkeypatch):
    module = ContextualizerTraining(sd, layers=2, heads=2)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    for captions in (CAPTIONS[:2], [CAPTIONS[0], "fish " * 15], ["meat " * 20] * 2):
        module.training_step({"captions": captions}, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: captions of more than 14 tokens are cut, the first: {short('fish ' * 15)}"
    ]


def test_it_learns_what_goes_together_and_resumes_exactly(sd, tmp_path):
    """Far above chance on masked words; a run in two parts is the run in one."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))

    def run(folder, steps, ckpt_path=None):
        torch.manual_seed(1)
        module = ContextualizerTraining(sd, learning_rate=0.003, layers=2, heads=2)
        data = CaptionFile(str(tmp_path / "captions.txt"), batch_size=12)
        return module, conftest.fit(module, folder, data, steps, ckpt_path, [SaveContextualizer()])

    module, _ = run(tmp_path / "whole", 150)
    before = sd.text.embeddings.clone()
    tokens = sd.text.tokenizer(CAPTIONS)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    ends = (tokens == sd.text.tokenizer.eos).int().argmax(1)
    masked[torch.arange(len(tokens)), ends - 1] = True  # the last piece of what is eaten
    _, accuracy = module.reading(tokens, masked)
    chance = 1 / len(PAIRS)
    assert accuracy > 5 * chance, accuracy
    assert torch.equal(sd.text.embeddings, before) and set(module.state_dict()) == set(module.tensors)
    torch.manual_seed(1)
    start = ContextualizerTraining(sd, layers=2, heads=2).contextualizer.mask
    assert not torch.equal(module.contextualizer.mask, start)  # the one row of the encoder's inputs that is learned
    loaded = load(tmp_path / "whole/models/contextualizer.safetensors", sd)
    for name, tensor in module.contextualizer.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)  # float16

    _, trainer = run(tmp_path / "first", 5)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = run(tmp_path / "second", 10, tmp_path / "last.ckpt")
    straight, _ = run(tmp_path / "straight", 10)
    for name, tensor in straight.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, atol=1e-6, rtol=1e-5)


def test_lines_are_read_in_order_again_and_again_and_shared_out(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    data = CaptionFile(str(tmp_path / "a.txt"), batch_size=2)
    one = {"world_size": 1, "accumulate_grad_batches": 1}
    data.trainer = SimpleNamespace(global_step=1, global_rank=0, **one)
    lines = data.train_dataloader()
    assert [next(lines)["captions"] for _ in range(3)] == [["c", "a"], ["b", "c"], ["a", "b"]]
    parts = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_step=0, global_rank=rank, **one | {"world_size": 2})
        parts.append(next(data.train_dataloader())["captions"])
    assert parts == [["a", "b"], ["c", "a"]]


def test_a_file_without_captions_and_numbers_out_of_range_are_refused(sd, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    for path, says in (("a.txt", "holds no captions"), ("gone.txt", "cannot be read")):
        with pytest.raises(UserError, match=f"{path}.*{says}"):
            CaptionFile(str(tmp_path / path))
    for options in ({"mask_probability": 1.0}, {"learning_rate": 0.0}, {"heads": 5}):
        with pytest.raises(UserError, match=next(iter(options))):
            ContextualizerTraining(sd, **options)
