"""What goes into TensorBoard of inputs, feature maps, weights and gradients; and that training doesn't notice."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import result, rows, run, run_several, same_state_dicts, traced
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.config.fields import Duration
from dist_train.views.network import MOST, Pictures, _Every, _values, pictures

NET = Path(__file__).parent / "programs" / "net.py"
CONFIG = """
data:
  train: {{_target_: dist_train.data.Arrays, inputs: data.npz}}
  val: {{_target_: dist_train.data.Arrays, inputs: data.npz}}
  augment: [{{_target_: dist_train.data.RandomShift, pixels: 2}}]
  global_batch_size: 16
model: {{_target_: net.Net, channels: {channels}, side: {side}}}
loss: {{_target_: torch.nn.CrossEntropyLoss}}
optimizer: {{_target_: torch.optim.SGD, lr: 0.01, momentum: 0.9}}
trainer: {{duration: 3ep, micro_batch_size: 4, log_every: 1step}}
tracking: {{report: false}}
debug: {{trace_samples: true}}
"""
SEEN = (
    "tracking.images={modules: [conv1, act, MaxPool2d, head, spare], samples: 4}",
    "tracking.histograms=2ep",
    "tracking.graph=true",
)
FORMS = {1: (1, 28), 2: (3, 32)}  # channels and side, by the number of processes


@pytest.fixture(scope="module", params=[1, 2])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that differ in how the model is looked at meanwhile, on one and on two processes."""
    folder = tmp_path_factory.mktemp(f"processes{request.param}")
    channels, side = FORMS[request.param]
    random = np.random.RandomState(0)
    inputs = random.rand(64, channels, side, side).astype(np.float32)
    np.savez(folder / "data.npz", inputs=inputs, targets=random.randint(0, 4, 64))
    shutil.copy(NET, folder)
    (folder / "config.yaml").write_text(CONFIG.format(channels=channels, side=side))
    seen, unseen = ["config.yaml", "run.name=seen", *SEEN], ["config.yaml", "run.name=unseen"]
    careless = ["config.yaml", "run.name=careless", "callbacks=[{_target_: net.Careless}]"]
    run_several(folder, request.param, [seen, unseen, careless])
    return folder / "runs"


def events(folder: Path) -> EventAccumulator:
    everything = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    everything.Reload()
    return everything


def test_training_is_bit_identical_with_pictures_and_without(folder: Path) -> None:
    seen, unseen = folder / "seen", folder / "unseen"
    assert result(seen)["weights_sha256"] == result(unseen)["weights_sha256"]
    assert rows(seen) == rows(unseen)
    assert traced(seen) == traced(unseen)
    assert same_state_dicts(seen / "model.pt", unseen / "model.pt")
    assert events(unseen).Tags()["images"] == []
    careless = folder / "careless"
    assert result(careless)["weights_sha256"] != result(unseen)["weights_sha256"], "the comparison sees nothing"
    assert not same_state_dicts(careless / "model.pt", unseen / "model.pt")


def test_inputs_and_feature_maps_have_the_right_sizes_before_training_after_every_epoch_and_at_the_end(
    folder: Path,
) -> None:
    found = events(folder / "seen")
    side = 28 if folder.parent.name.startswith("processes1") else 32
    sizes = {"inputs": (2 * side + 1, 2 * side + 1), "features/head": (4, 4)}  # 4 samples, 2 by 2; 4 outputs of each
    for k in range(4):
        sizes[f"features/conv1/{k}"] = sizes[f"features/act/{k}"] = (2 * side + 1, 3 * side + 2)  # 6 maps, 2 by 3
        sizes[f"features/pool/{k}"] = (side + 1, 3 * side // 2 + 2)
    assert set(found.Tags()["images"]) == set(sizes)
    for name, (height, width) in sizes.items():
        assert [(e.step, e.height, e.width) for e in found.Images(name)] == [(s, height, width) for s in (0, 4, 8, 12)]
    log = (folder / "seen" / "logs" / "rank-0.log").read_text()
    assert log.count("the model's forward doesn't call spare") == 1


def test_what_works_in_place_spoils_no_picture_before_it(folder: Path) -> None:
    found = events(folder / "seen")
    assert (
        found.Images("features/conv1/0")[1].encoded_image_string
        != found.Images("features/act/0")[1].encoded_image_string
    )


def test_histograms_and_the_graph_are_there(folder: Path) -> None:
    found = events(folder / "seen")
    names = [f"{layer}.{part}" for layer in ("conv1", "norm", "conv2", "head") for part in ("weight", "bias")]
    assert set(found.Tags()["histograms"]) == {f"{what}/{name}" for what in ("weights", "gradients") for name in names}
    assert [(e.step, e.histogram_value.num) for e in found.Histograms("gradients/conv1.bias")] == [(0, 6), (8, 6)]
    assert [(e.step, e.histogram_value.num) for e in found.Histograms("weights/conv1.bias")] == [
        (0, 6),
        (8, 6),
        (12, 6),
    ]
    assert "Net/Conv2d[conv1]" in str(found.Graph())


def test_the_inputs_are_the_batch_as_it_goes_into_the_model(tmp_path: Path) -> None:
    inputs = np.random.RandomState(0).rand(8, 1, 5, 5).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=np.zeros(8, np.int64))
    config = CONFIG.format(channels=1, side=5).replace("augment", "# augment").replace("size: 16", "size: 4")
    (tmp_path / "config.yaml").write_text(config.replace("net.Net", "flat.Net"))
    (tmp_path / "flat.py").write_text(
        "from torch import nn\ndef Net(channels, side): return nn.Sequential(nn.Flatten(), nn.Linear(25, 4))\n"
    )
    run(tmp_path, 1, "--config", "config.yaml", "run.name=seen", "tracking.images={samples: 3, every: 3step}")
    steps = traced(tmp_path / "runs" / "seen")
    shown = events(tmp_path / "runs" / "seen").Images("inputs")
    assert [event.step for event in shown] == [0, 3, 6]
    for event, trained in zip(shown, (1, 4, 4), strict=True):  # what comes next; at the end what was shown last
        (tmp_path / "p.png").write_bytes(event.encoded_image_string)
        whole = np.asarray(Image.open(tmp_path / "p.png").convert("L"))
        parts = [whole[:5, :5], whole[:5, 6:], whole[6:, :5]]
        found = {int(np.abs(inputs * 255 - part).max((1, 2, 3)).argmin()) for part in parts}
        assert len(found) == 3
        assert found <= steps[trained]


def test_a_module_that_is_not_there_is_reported_with_names_near_it_and_nothing_is_started(tmp_path: Path) -> None:
    shutil.copy(NET, tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(channels=1, side=28))
    np.savez(tmp_path / "data.npz", inputs=np.zeros((64, 1, 28, 28), np.float32), targets=np.zeros(64, np.int64))
    done = run(tmp_path, 1, "--config", "config.yaml", "tracking.images={modules: [conv3]}", expect=2)
    assert "tracking.images.modules: conv3 matches no module of Net; names look like conv2, conv1" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("shape", "inputs", "maps"),
    [
        ((8, 1, 28, 28), [(86, 86)], [(28, 28)] * 8),
        ((4, 3, 32, 32), [(65, 65, 3)], [(65, 65)] * 4),
        ((2, 5, 28, 28), [(57, 86)] * 2, [(57, 86)] * 2),
        ((2, 64, 7, 9), [(63, 79)] * 2, [(63, 79)] * 2),
        ((4, 28, 28), [(57, 57)], [(28, 28)] * 4),  # no channels; of a layer: one row per channel
        ((6, 10), [(6, 10)], [(6, 10)]),
    ],
)
def test_pictures_are_made_of_any_number_of_channels(
    shape: tuple[int, ...], inputs: list[Any], maps: list[Any]
) -> None:
    values = torch.randn(shape)
    assert [array.shape for array in pictures(values, color=True)] == inputs
    assert [array.shape for array in pictures(values)] == maps
    assert all(array.dtype == np.uint8 for array in pictures(values))
    with pytest.raises(ValueError, match=r"no picture can be made of a tensor of shape \(2,\)"):
        pictures(torch.zeros(2))


def test_inputs_in_the_range_of_a_screen_stay_as_they_are_and_maps_are_stretched_one_by_one() -> None:
    values = torch.tensor([0.0, 0.5, 0.25, 0.25]).view(1, 1, 2, 2)
    assert pictures(values, color=True)[0].tolist() == [[0, 128], [64, 64]]
    assert pictures(values)[0].tolist() == [[0, 255], [128, 128]]
    assert pictures(values * 3 - 1, color=True)[0].tolist() == [[0, 255], [128, 128]]
    two = torch.cat([values, 100 * values, torch.full_like(values, 7.0), values * float("nan")], 1)
    whole = pictures(two)[0]
    assert whole[:2, :2].tolist() == whole[:2, 3:].tolist() == [[0, 255], [128, 128]]
    assert whole[3:, :2].tolist() == whole[3:, 3:].tolist() == [[0, 0], [0, 0]]
    assert set(whole[2]) == {255}


def test_large_tensors_are_thinned_and_what_is_kept_is_a_copy() -> None:
    large = torch.arange(float(3 * MOST + 1))
    kept = _values(large)
    assert len(kept) == MOST * 3 // 4 + 1
    small = torch.ones(3)
    kept = _values(small)
    small.zero_()
    assert kept.tolist() == [1, 1, 1]


def test_a_time_is_counted_by_the_clock_and_a_failure_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = SimpleNamespace(step=0, seconds=130.0, plan=SimpleNamespace(steps_per_epoch=10))
    every = _Every(Duration(60.0, "s"))
    assert every.due(trainer)  # before training
    trainer.step = 5
    assert not every.due(trainer)
    trainer.seconds = 180.5
    assert every.due(trainer)
    assert not every.due(trainer)
    trainer.seconds = 400.0
    assert every.due(trainer)
    looked_at: Any = SimpleNamespace(images=None, histograms=None), SimpleNamespace(model=torch.nn.ReLU()), None
    show = Pictures(*looked_at)
    for _ in range(2):
        show._try("images", lambda: 1 / 0)
    assert caplog.text.count("tracking.images is off for the rest of this run: ZeroDivisionError") == 1
