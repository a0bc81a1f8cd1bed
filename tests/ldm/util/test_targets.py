import subprocess
import sys
from pathlib import Path

import pytest

from infusion.training.trainer import SaveConcept
from ldm.util.config import ConfigError, check
from ldm.util.targets import OTHERS, PLAIN, ROOT, UnknownTarget, find_class, full_name

NO_CLASSES = [
    *("os.system", "subprocess.Popen", "builtins.eval", "torch.utils.benchmark.Timer", "torch.package.PackageImporter"),
    *(
        "torch.nn.Linear",
        "torch.load",
        "torch.hub.load",
        "torch.jit.CompilationUnit",
        "torch.serialization.MAP_LOCATION",
    ),
    *("pytorch_lightning.callbacks.ModelCheckpoint", "pytorch_lightning.callbacks.LambdaCallback"),
    *("pytorch_lightning.callbacks.OnExceptionCheckpoint", "pytorch_lightning.loggers.CSVLogger"),
    *("pytorch_lightning.Trainer", "lightning.Trainer", "transformers.AutoModel", "transformers.pipelines.Pipeline"),
    *("diffusers.DiffusionPipeline", "diffusers.UNet2DModel"),
    *(
        "ldm",
        "ldm.",
        ".ldm.unet.UNet",
        "ldm..UNet",
        "ldm.models.unet.UNet.",
        "ldm.models.unet.UNet.forward",
        "ldm.models.unet.UNet.__init__",
    ),
    *(
        "ldm.models.unet.__builtins__",
        "ldm.__init__.X",
        "ldm.models.unet._X",
        "_ldm.unet.UNet",
        "ldm.models.unet.UNet ",
        " ldm.models.unet.UNet",
    ),
    *(
        "ldm.models.unet.UNet\n",
        "ldm/unet.UNet",
        "ldm.\u0075net.UN\u00cbt",
        "ldm.models.unet.\uff35Net",
        "ldm.models.unet.UNet()",
        "ldm." * 99,
    ),
    *(
        "ldm.util.config.Path",
        "ldm.pipeline.DictConfig",
        "ldm.models.unet.nn",
        "ldm.models.unet.Tensor",
        "ldm.util.config.ConfigError",
    ),
    *(
        "ldm.weights.files.TensorFile",
        "ldm.util.errors.Parser",
        "ldm.util.signals.Signals",
        "ldm.util.resume.StateFile",
    ),
    *(
        "infusion.concepts.concept.Concept",
        "infusion.concepts.released.ReleasedFile",
        "infusion.metrics.run.cache.Cache",
    ),
    *(
        "infusion.metrics.run.features.ClipBackbone",
        "infusion.sampling.pictures.Numbered",
        "scripts.pocket.build_atlas.Icons",
    ),
    *("scripts.pocket.demo.Plan", "data.soft_segment.Photo", "data.latents.LatentCache", "data.many.ConceptEntry"),
    *("data.pocket.concepts.X", "scripts.metrics.X", "tests.conftest.X", "main.Namespace", "data.dreambooth.X"),
]


@pytest.mark.parametrize("target", [*NO_CLASSES, None, 3, [], {}, True])
def test_what_a_config_may_not_name(target):
    with pytest.raises(UnknownTarget) as raised:
        find_class(target)
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value).replace(str(target), "")


@pytest.mark.parametrize("target", sorted(OTHERS | PLAIN))
def test_what_a_config_may_name(target):
    found = find_class(target)
    assert full_name(found) == target and isinstance(found, type)


def test_a_target_imports_nothing_before_it_is_known_to_be_a_class_for_configs():
    """In a process of its own: what is refused leaves no module behind."""
    code = f"""
import sys
import ldm.util.targets
before = set(sys.modules)
for target in {NO_CLASSES!r} + ["scripts.pocket.build_atlas.Icon", "scripts.pocket.demo.X", "antigravity.X"]:
    try:
        ldm.util.targets.find_class(target)
    except ldm.util.targets.UnknownTarget as error:
        continue
    raise SystemExit(target)
names = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert "antigravity" not in names and "resvg_py" not in names and "diffusers.pipelines" not in sys.modules, names
assert "scripts" not in names and "torch.utils.benchmark" not in set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_config_says_where_concepts_are_written():
    node = {"target": "infusion.training.trainer.SaveConcept", "params": {"dirpath": "/tmp/elsewhere"}}
    assert "dirpath" in SaveConcept.__init__.__annotations__
    for target in (node["target"], "infusion.training.many.SaveConcepts"):
        with pytest.raises(ConfigError, match="^params.dirpath: is not for configs to set"):
            check(node | {"target": target})


def test_a_file_that_a_config_has_written_lies_under_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = {"target": "data.pocket.module.LatentWorldData", "params": {"batch_size": 1, "count": 100}}
    check(node | {"params": node["params"] | {"cache": "a/b.safetensors"}})
    (tmp_path / "link").symlink_to("/tmp")
    for cache in ("/tmp/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "link/x.safetensors"):
        with pytest.raises(ConfigError, match="^params.cache: a file is written to"):
            check(node | {"params": node["params"] | {"cache": cache}})


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "auto_map", "dtype", "_name_or_path"])
def test_a_network_of_transformers_takes_its_own_parameters_alone(key):
    params = {"text_config": {"hidden_size": 8, "model_type": "clipseg_text_model", key: "org/kernel"}}
    with pytest.raises(ConfigError, match=f"^params.text_config: `{key}` is not for configs"):
        check({"target": "transformers.CLIPSegConfig", "params": params})
    with pytest.raises(ConfigError, match=f"CLIPSegConfig has no parameter `{key}`|{key}: is not for configs"):
        check({"target": "transformers.CLIPSegConfig", "params": {key: ["org/kernel"]}})


def test_callbacks_of_lightning_are_not_open_ended():
    node = {"target": "pytorch_lightning.callbacks.EMAWeightAveraging", "params": {"avg_fn": "os.system"}}
    with pytest.raises(ConfigError, match="EMAWeightAveraging has no parameter `avg_fn`"):
        check(node)


def test_every_plain_class_is_there():
    for target in PLAIN:
        assert Path(ROOT, *target.split(".")[:-1]).with_suffix(".py").is_file()
