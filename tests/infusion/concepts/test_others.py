"""Damaged and hostile files of other tools: one line that names the file, or a concept."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infusion.concepts.concept import Concept

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"  # of both small models


class Program:
    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def kohya(path: Path) -> None:
    start = f"lora_unet_{LAYER.replace('.', '_')}_to_k"
    tensors = {f"{start}.lora_down.weight": torch.ones(2, 48), f"{start}.lora_up.weight": torch.ones(64, 2)}
    said = {"ss_tag_frequency": '{"1_dog": {"dog": 3}}', "lora_adapter_metadata": '{"unet.lora_alpha": 4}'}
    save_file(tensors, path, said)


FILES: dict[str, Callable[[Path], None]] = {
    "kohya.safetensors": kohya,
    "peft.ckpt": lambda path: torch.save(
        {f"unet.{LAYER}.to_k.lora_A.weight": torch.ones(2, 48), f"unet.{LAYER}.to_k.lora_B.weight": torch.ones(64, 2)},
        path,
    ),
    "a1111.pt": lambda path: torch.save({"string_to_param": {"*": torch.ones(2, 48)}, "name": "x"}, path),
    "custom.bin": lambda path: torch.save(
        {f"{LAYER}.processor.to_k_custom_diffusion.weight": torch.ones(64, 48), "x.attn1.processor": {}}, path
    ),
    "authors.bin": lambda path: torch.save(
        {"unet": {f"{LAYER}.to_k.weight": torch.ones(64, 48)}, "modifier_token": {"<new1>": torch.ones(48)}}, path
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(known, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    FILES[name](path)
    assert Concept.load(path).architecture == "tiny2"
    content, chance = path.read_bytes(), random.Random(0)
    variants = [content[: int(share * len(content))] for share in (0, 0.01, 0.2, 0.5, 0.9, 0.999)]
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        variants.append(bytes(damaged))
    for variant in variants:
        path.write_bytes(variant)
        try:
            assert Concept.load(path).tensors
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


HOSTILE = {
    "a program as a word": {"string_to_param": {"*": Program()}},
    "a program beside": {"string_to_param": {"*": torch.ones(2, 48)}, "x": Program()},
    "no mapping of words": {"string_to_param": 3},
    "words without tensors": {"string_to_param": {"*": "x"}},
    "no mapping of weights": {"unet": 3, "modifier_token": []},
    "odd words": {"unet": {f"{LAYER}.to_k.weight": torch.ones(64, 48)}, "modifier_token": {7: [torch.ones(48)] * 9}},
    "a word of three encoders": {
        "unet": {f"{LAYER}.to_k.weight": torch.ones(64, 48)},
        "modifier_token": {"<new1>": [torch.ones(48)] * 3},
    },
    "a product of one": {"unet": {f"{LAYER}.to_k.weight": {"u": torch.ones(64, 2)}}, "modifier_token": {}},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(known, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    torch.save(HOSTILE[what], tmp_path / "a.bin")
    try:
        Concept.load(tmp_path / "a.bin")
        assert what == "odd words"
    except ValueError as error:
        assert str(error).startswith(str(tmp_path / "a.bin")) and "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "said", ['{"a": {"b": "c"}}', '{"a": 3}', "[" * 50_000, '{"a": {"\\u0007": 9}}', '{"a": {"%s": 9}}' % ("x" * 999)]
)
def test_hostile_metadata(known, tmp_path, said):
    path = tmp_path / "kohya.safetensors"
    start = f"lora_unet_{LAYER.replace('.', '_')}_to_k"
    tensors = {f"{start}.lora_down.weight": torch.ones(2, 48), f"{start}.lora_up.weight": torch.ones(64, 2)}
    names = (
        "ss_tag_frequency",
        "lora_adapter_metadata",
        "templates",
        "base_parts",
        "ss_steps",
        "modelspec.trigger_phrase",
    )
    save_file(tensors, path, dict.fromkeys(names, said))
    try:
        assert Concept.load(path).noun
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
