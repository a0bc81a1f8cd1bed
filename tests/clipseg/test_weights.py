import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPSegForImageSegmentation

from clipseg import weights
from clipseg.convert import convert_clip, convert_decoder
from clipseg.weights import empty, load
from tests.clipseg.test_convert import parts

VOCABULARY = 49408


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(VOCABULARY, VOCABULARY - 1)


@pytest.fixture(scope="module")
def network(config, randomise) -> CLIPSegForImageSegmentation:
    network = CLIPSegForImageSegmentation(config)
    randomise(network)
    return network.eval()


@pytest.fixture
def folder(network, tmp_path):
    """A Hugging Face folder as transformers writes it."""
    network.save_pretrained(tmp_path / "clipseg")
    (tmp_path / "clipseg/preprocessor_config.json").write_text('{"size": {"height": 80, "width": 80}}')
    return tmp_path / "clipseg"


def change(folder, change) -> None:
    """Write the folder's tensors anew, changed."""
    tensors = {name: t.clone() for name, t in weights.read(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_brings_its_network_and_its_size(folder, network):
    model = load(folder)
    assert model.image_size == 80 and not model.training
    assert model.tokenizer.context_length == 16 and model.tokenizer.vocab_size == VOCABULARY
    loaded, expected = model.network.state_dict(), network.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], t) for name, t in expected.items())
    pixels, prompts = torch.rand(1, 3, 80, 80), ["a cat"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = network(input_ids=model.tokenizer(prompts), pixel_values=(pixels - mean) / std).logits
        torch.testing.assert_close(model(pixels, prompts), logits, rtol=1e-4, atol=1e-4)


def test_without_a_size_it_is_that_of_the_published_network(folder):
    (folder / "preprocessor_config.json").unlink()
    assert load(folder).image_size == 352


def test_old_files_half_precision_and_pickles_are_read(folder, network):
    tensors = {name: t.half() for name, t in network.state_dict().items()}
    tensors["clip.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    loaded = load(folder).network.state_dict()
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], t.half().float()) for name, t in network.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda tensors: tensors.pop("decoder.film_mul.bias"), "1 tensors are missing: decoder.film_mul.bias"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "1 tensors are not the network's: more"),
        (lambda t: t.update({"decoder.film_mul.bias": torch.zeros(3)}), "another shape: decoder.film_mul.bias"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(folder, changed, message):
    change(folder, changed)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_folder_of_another_model_is_refused(folder):
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "clip"}
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="config.json: is of a clip, not of a clipseg"):
        load(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no nowhere; .*CIDAS/clipseg-rd64-refined"):
        load("nowhere")
    with pytest.raises(ValueError, match="clip: the folder .* brings its own"):
        load(folder, clip=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="clipseg: no JSON of a network"):
        load(folder)


class TestDecoderFile:
    """The decoder alone, and CLIP from somewhere else; the published sizes are replaced by small ones."""

    @pytest.fixture(autouse=True)
    def small(self, config, monkeypatch):
        monkeypatch.setattr(weights, "refined_config", lambda: config)
        monkeypatch.setattr(weights, "SIZE", 64)

    @pytest.fixture
    def original(self, config, randomise):
        """CLIP and decoder under their original names."""
        modules = parts(config)
        for seed, module in enumerate(modules):
            randomise(module, seed)
        return [module.state_dict() for module in modules]

    @pytest.fixture
    def decoder(self, original, tmp_path):
        torch.save(original[1], tmp_path / "d.pth")
        return tmp_path / "d.pth"

    @pytest.fixture
    def clip(self, original, tmp_path):
        save_file(original[0], tmp_path / "clip.safetensors")
        return tmp_path / "clip.safetensors"

    def test_it_becomes_the_same_network(self, decoder, clip, original):
        model = load(decoder, clip)
        assert model.image_size == 64
        loaded, expected = model.network.state_dict(), convert_clip(original[0]) | convert_decoder(original[1])
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], t) for name, t in expected.items())

    def test_clip_may_be_a_folder_of_transformers(self, decoder, original, tmp_path):
        tensors = convert_clip(original[0])
        (tmp_path / "clip").mkdir()
        held = {name.removeprefix("clip."): t.contiguous().clone() for name, t in tensors.items()}
        save_file(held, tmp_path / "clip/model.safetensors")
        loaded = load(decoder, tmp_path / "clip").network.state_dict()
        assert all(torch.equal(loaded[name], t) for name, t in tensors.items())

    def test_clip_is_wanted(self, decoder):
        with pytest.raises(ValueError, match="decoder alone.*openai/clip-vit-base-patch16"):
            load(decoder)
        with pytest.raises(ValueError, match="clip: there is no nowhere"):
            load(decoder, "nowhere")

    def test_files_are_not_mistaken_for_each_other(self, decoder, clip):
        with pytest.raises(ValueError, match="clip.safetensors and .*d.pth: .* tensors are missing: clip.logit_scale"):
            load(clip, decoder)

    def test_a_program_is_not_run(self, decoder, tmp_path):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-16.pt")
        with pytest.raises(ValueError, match="ViT-B-16.pt: not a file of tensors that can be read safely"):
            load(decoder, tmp_path / "ViT-B-16.pt")


def test_transformers_clip_has_the_names_that_are_expected(config):
    """Published files of `CLIPModel` have these names; the level `text_model` within is not repeated."""
    names = {f"clip.{name}" for name in CLIPModel(clip_config(config)).state_dict() if "position_ids" not in name}
    ours = {name for name in empty(config, 64).network.state_dict() if name.startswith("clip.")}
    assert names == ours


def clip_config(config):
    text, vision = (vars(part) for part in (config.text_config, config.vision_config))
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return CLIPConfig(
        text_config={key: text[key] for key in (*keys, "vocab_size", "max_position_embeddings")},
        vision_config={key: vision[key] for key in (*keys, "image_size", "patch_size")},
        projection_dim=config.projection_dim,
    )


def test_a_config_gives_the_network_of_a_file(network, tmp_path):
    nodes = {
        "tokenizer": {"target": "ldm.models.tokenizer.Tokenizer", "params": {"context_length": 16}},
        "image_size": 64,
    }
    nodes["config"] = {"target": "transformers.CLIPSegConfig", "params": own_keys(network.config)}
    node = {"clipseg": {"target": "clipseg.model.ClipSeg", "params": nodes}}
    (tmp_path / "net.yaml").write_text(json.dumps(node))
    save_file({name: t.half() for name, t in network.state_dict().items()}, tmp_path / "weights.safetensors")
    loaded = load(tmp_path / "weights.safetensors", config=tmp_path / "net.yaml").network.state_dict()
    assert all(torch.equal(loaded[name], t.half().float()) for name, t in network.state_dict().items())
    (tmp_path / "none.yaml").write_text("{}")
    with pytest.raises(ValueError, match="no node `clipseg`"):
        load(tmp_path / "weights.safetensors", config=tmp_path / "none.yaml")


def test_a_config_may_take_its_clip_from_a_file_of_its_own(network, tmp_path):
    nodes = {
        "tokenizer": {"target": "ldm.models.tokenizer.Tokenizer", "params": {"context_length": 16}},
        "image_size": 64,
    }
    nodes["config"] = {"target": "transformers.CLIPSegConfig", "params": own_keys(network.config)}
    node = {"clip": str(tmp_path / "clip.safetensors"), "clipseg": {"target": "clipseg.model.ClipSeg", "params": nodes}}
    (tmp_path / "net.yaml").write_text(json.dumps(node))
    tensors = network.state_dict()
    clip = {name.removeprefix("clip."): tensor for name, tensor in tensors.items() if name.startswith("clip.")}
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    save_file(clip, tmp_path / "clip.safetensors")
    save_file(decoder, tmp_path / "weights.safetensors")
    loaded = load(tmp_path / "weights.safetensors", config=tmp_path / "net.yaml").network.state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], t) for name, t in tensors.items())
    save_file({name: t for name, t in decoder.items() if "film_add" not in name}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="2 tensors are missing: decoder.film_add"):
        load(tmp_path / "weights.safetensors", config=tmp_path / "net.yaml")


def own_keys(config) -> dict:
    """A config's choices as YAML may give them."""
    keys = ("projection_dim", "extract_layers", "reduce_dim", "decoder_num_attention_heads")
    keys += ("decoder_intermediate_size", "use_complex_transposed_convolution")
    towers = {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}
    return {key: getattr(config, key) for key in keys} | towers
