"""The text tower is read through noise, at one scale."""

import torch

from data.pocket_two import reading
from data.pocket_two.reading import noisy


def test_encodings_are_read_at_one_scale(monkeypatch):
    encodings = 7 * torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    noise = noisy(encodings.expand(200, 5, 192)) - noisy(encodings.expand(200, 5, 192))
    assert abs(noise.std() - 2**0.5 * reading.NOISE) < 0.02  # of two draws
    monkeypatch.setattr(reading, "NOISE", 0.0)
    torch.testing.assert_close(noisy(encodings), noisy(encodings / 100))
    torch.testing.assert_close(noisy(encodings).square().mean(-1), torch.ones(5))
