"""The ready tasks against losses written by hand, libraries' own losses, and plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import rows
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, default_collate

from dist_train import tasks, train
from dist_train.data import Shapes, TwoViews, collate_lists
from dist_train.data.plan import Plan
from dist_train.models import DigitsGAN, DigitsVAE, small_faster_rcnn
from dist_train.runtime.seeding import seed_everything
from dist_train.task.terms import computed

STEPS, BATCH, SAMPLES = 5, 6, 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def loss_of(output: Any) -> float:
    """What is minimized, as a mean."""
    one = computed(output)
    return float(one.loss.detach()) / float(one.weight)


def means(output: Any) -> dict[str, float]:
    """The named losses, as means."""
    return {name: float(term.total.detach()) / float(term.weight) for name, term in computed(output).terms.items()}


# --- training: one process in micro-batches is a plain loop over whole batches ------------------------------------------


class Held(Dataset[Any]):
    """Items made beforehand."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def images(classes: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(SAMPLES, 1, 8, 8, generator=generator, dtype=torch.float64)
    return [(picture, k % 4) if classes else picture for k, picture in enumerate(pictures)]


def tokens(padded: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 7, (SAMPLES, 9), generator=generator)
    if not padded:
        return [(row[:-1], row[1:]) for row in ids]
    lengths = torch.randint(2, 10, (SAMPLES,), generator=generator)
    masks = (torch.arange(9) < lengths[:, None]).long()
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


def masks() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(0, 4, (SAMPLES, 8, 8), generator=generator)
    found[:, :3][torch.rand(SAMPLES, 3, 8, generator=generator) < 0.7] = 255
    return [(picture, mask) for (picture, _), mask in zip(images(), found, strict=True)]


class Words(nn.Module):
    """Tokens to (logits, loss), as nanoGPT's: without targets only the last token's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 5), nn.GRU(5, 5, batch_first=True), nn.Linear(5, 7)
        self.double()

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.mix(self.embedding(ids))[0])
        if targets is None:
            return logits[:, -1:], None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class ByName(Words):
    """As transformers': by name, to an object with `logits`."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=self.head(self.mix(self.embedding(input_ids))[0]))


class TwoHeads(nn.Module):
    """As torchvision's: `out`, and `aux` at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.aux = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, 2, padding=1)
        self.double()

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"out": self.out(pictures), "aux": self.aux(pictures)}


class Student(nn.Sequential):
    def __init__(self, width: int = 4) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 4))
        self.double()


def double(model: nn.Module) -> nn.Module:
    return model.double()


def of_words(model: Any, batch: Any) -> Tensor:
    return model(batch[0], batch[1])[1]


def of_padded(model: Any, batch: Any) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    logits = model.head(model.mix(model.embedding(ids))[0])
    parts = [functional.cross_entropy(logits[n, t - 1], ids[n, t]) for n, t in mask.nonzero().tolist() if t > 0]
    return torch.stack(parts).mean()


def of_masks(model: Any, batch: Any) -> Tensor:
    outputs, weight = model(batch[0]), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    aux = functional.interpolate(outputs["aux"], (8, 8), mode="bilinear", align_corners=False)
    entropy = nn.CrossEntropyLoss(weight, ignore_index=255)
    return entropy(outputs["out"], batch[1]) + 0.5 * entropy(aux, batch[1])


def of_views(model: Any, batch: Any) -> Tensor:
    """SimCLR's equation, pair by pair."""
    one, other = (functional.normalize(model(view), dim=1) for view in batch)
    every, n, found = torch.cat([one, other]), len(one), []
    for i in range(2 * n):
        others = torch.stack([(every[i] @ every[k] / 0.5).exp() for k in range(2 * n) if k != i])
        found.append(-((every[i] @ every[(i + n) % (2 * n)] / 0.5).exp() / others.sum()).log())
    return torch.stack(found).mean()


def of_teacher(model: Any, batch: Any) -> Tensor:
    torch.manual_seed(0)
    teacher = Student(8)
    (p, q) = ((net(batch[0]) / 3).softmax(1) for net in (teacher, model))
    hard = functional.cross_entropy(model(batch[0]), batch[1])
    return 0.3 * hard + 0.7 * 9 * (p * (p / q).log()).sum(1).mean()


def views() -> list[Any]:
    return [(picture, picture.flip(1)) for picture in images(classes=False)]


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Student(8)


TRAINED: dict[str, tuple[Any, Any, Any, Any]] = {  # task, model, items, the loss of the textbook
    "packed": (tasks.LanguageModel, Words, tokens, of_words),
    "padded": (tasks.LanguageModel, ByName, lambda: tokens(padded=True), of_padded),
    "segmentation": (lambda: tasks.Segmentation(class_weights=torch.tensor([1.0, 2, 3, 4])), TwoHeads, masks, of_masks),
    "contrastive": (lambda: tasks.Contrastive(temperature=0.5), Student, views, of_views),
    "distillation": (lambda: tasks.Distillation(teacher(), temperature=3.0, soft=0.7), Student, images, of_teacher),
}


def batches(items: list[Any]) -> Iterator[Any]:
    plan = Plan(0, SAMPLES, BATCH)
    for step in range(STEPS):
        yield default_collate([items[int(index)] for index in plan.batch(step)])


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_micro_batches_is_a_plain_loop(name: str, tmp_path: Path) -> None:
    task, build, items, expected_loss = TRAINED[name]
    seed_everything(0)
    model = build()
    plain, losses = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches(items()):
        optimizer.zero_grad()
        loss = expected_loss(plain, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    train({
        "run": {"name": "run", "dir": str(tmp_path)}, "model": model, "task": task(),
        "data": {"train": Held(items()), "val": Held(items()), "global_batch_size": BATCH, "eval_batch_size": 5},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}, "checkpoint": {"keep_best": None},
        "trainer": {"duration": f"{STEPS}step", "log_every": "1step", "micro_batch_size": 4},
        "tracking": {"tensorboard": False, "report": False},
    })  # fmt: skip
    assert [row["loss"] for row in rows(tmp_path / "run", "train")] == pytest.approx(losses, rel=1e-9)
    state = torch.load(tmp_path / "run/model.pt", weights_only=True)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-11)
    if name != "contrastive":  # whose loss in evaluation is that of an eval batch
        with torch.no_grad():
            whole = float(expected_loss(plain, default_collate(items())))
        assert rows(tmp_path / "run", "val")[-1]["loss"] == pytest.approx(whole, rel=1e-9)


def test_the_default_task_by_its_name_is_the_default_task(tmp_path: Path) -> None:
    """With torch's loss as it is; so that one's own task may inherit from it."""
    results = []
    loss = {"_target_": "torch.nn.CrossEntropyLoss"}
    for name, how in {
        "loss": {"loss": loss},
        "task": {"task": {"_target_": "dist_train.tasks.Supervised", "loss": loss}},
    }.items():
        results.append(train({
            "run": {"name": name, "dir": str(tmp_path)}, **how, "metrics": ["accuracy"],
            "data": {key: {"_target_": "dist_train.data.Digits", "split": "val", "flat": True} for key in ("train", "val")},
            "model": {"_target_": "dist_train.models.MLP", "in_features": 64, "hidden": [8], "out_features": 10},
            "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}, "trainer": {"duration": "3step", "micro_batch_size": 20},
            "tracking": {"tensorboard": False, "report": False},
        }))  # fmt: skip
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert results[0]["metrics"] == results[1]["metrics"]


# --- language ------------------------------------------------------------------------------------------------------------


def test_a_language_model_gives_the_loss_of_transformers_on_unpadded_data() -> None:
    transformers = pytest.importorskip("transformers", reason="needs pip install -e '.[zoo]'")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 11, (3, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = tasks.LanguageModel().step(model, batch)
    assert loss_of(output) == pytest.approx(float(model(**batch, labels=ids).loss.detach()), rel=1e-6)
    labels = ids.masked_fill(ids < 4, -100)
    output = tasks.LanguageModel().step(model, {**batch, "labels": labels})
    assert loss_of(output) == pytest.approx(float(model(**batch, labels=labels).loss.detach()), rel=1e-6)
    assert output.weight == (labels[:, 1:] != -100).sum()


def test_tokens_alone_are_their_own_targets() -> None:
    model, ids = Words(), torch.randint(0, 7, (3, 6))
    task = tasks.LanguageModel()
    for batch in (ids, [ids]):
        assert loss_of(task.step(model, batch)) == pytest.approx(loss_of(task.step(model, (ids[:, :-1], ids[:, 1:]))))
    assert task.predict(model, ids).shape == (3, 1, 7)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Identity(), {"words": torch.zeros(2, 3)}, "expects a batch of .*found .words: float32"),
        (nn.Embedding(7, 7), (torch.zeros(2, 3), torch.zeros(2)), "expects a batch of"),
        (nn.Linear(3, 5), (torch.zeros(2, 3), torch.zeros(2, 3).long()), "expected logits of shape"),
    ],
)
def test_what_a_language_model_cannot_take_is_said(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tasks.LanguageModel().step(model, batch)


IDS = torch.randint(2, 7, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(6) < torch.tensor([[6], [4], [3]])).long()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IDS, MASK), "only 0 and 1, as an attention mask does: return dicts .input_ids"),
        ((IDS, torch.ones_like(IDS)), "only 0 and 1"),
        ((IDS, MASK.bool()), "only 0 and 1"),
        ((IDS, IDS), "they are the inputs themselves"),
        ((IDS, IDS.where(MASK > 0, -100)), "they are the inputs themselves"),
        ({"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}, "are other tokens. Leave the shift to it"),
        ({"input_ids": IDS.where(IDS < 4, 1), "labels": IDS.where(IDS >= 4, -100)}, "masked language models"),
    ],
)
def test_a_language_model_is_not_trained_on_other_tokens_than_the_next(batch: Any, message: str) -> None:
    """An attention mask in the place of targets, labels that aren't shifted or are shifted twice, masked tokens."""
    model = Words() if isinstance(batch, tuple) else ByName()
    if isinstance(batch, dict):
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(ValueError, match=message):
        tasks.LanguageModel().step(model, batch)


def test_inputs_and_labels_that_the_config_names_are_a_mapping_with_labels() -> None:
    named = {"input_ids": IDS, "attention_mask": MASK}
    model, labels, task = ByName(), IDS.where(IDS > 3, -100), tasks.LanguageModel()
    assert loss_of(task.step(model, (named, labels))) == loss_of(task.step(model, {**named, "labels": labels}))
    assert torch.equal(task.predict(model, (named, None)), task.predict(model, named))


@pytest.mark.parametrize("bits", [IDS % 2, torch.ones_like(IDS)])
def test_tokens_of_two_kinds_are_no_mask(bits: Tensor) -> None:
    batch = (bits[:, :-1], bits[:, 1:])
    assert loss_of(tasks.LanguageModel().step(Words(), batch)) > 0
    labels = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(IDS > 3, -100)}
    assert loss_of(tasks.LanguageModel().step(ByName(), labels)) > 0


# --- dense ---------------------------------------------------------------------------------------------------------------


def test_segmentation_without_aux_has_one_loss_and_predicts_logits() -> None:
    model, (pictures, found) = nn.Conv2d(1, 4, 1).double(), default_collate(masks())
    output = tasks.Segmentation().step(model, (pictures, found))
    assert loss_of(output) == pytest.approx(
        float(functional.cross_entropy(model(pictures), found, ignore_index=255).detach())
    )
    assert means(output) == {}
    assert tasks.Segmentation().predict(model, pictures).equal(model(pictures))
    with pytest.raises(TypeError, match="found float64 "):
        tasks.Segmentation().step(nn.Flatten(), (pictures, found))


def boxes(count: int = 4) -> Any:
    return collate_lists([Shapes("train", samples=8, target="boxes")[k] for k in range(count)])


def test_detection_has_the_losses_of_torchvision_and_predicts_in_eval_mode() -> None:
    model, batch, task = small_faster_rcnn(width=8), boxes(), tasks.Detection()
    torch.manual_seed(1)
    expected = {name: float(value.detach()) for name, value in model(*batch).items()}
    torch.manual_seed(1)
    output = task.step(model, batch)
    assert means(output) == pytest.approx(expected)
    assert loss_of(output) == pytest.approx(sum(expected.values()))
    with torch.no_grad():
        evaluated = task.evaluate(model.eval(), batch)
        plain = model(batch[0])
    assert {module.training for module in model.modules()} == {False}
    assert means(evaluated).keys() == expected.keys()
    assert len(evaluated.outputs) == 4
    assert all(one["boxes"].equal(other["boxes"]) for one, other in zip(evaluated.outputs, plain, strict=True))
    assert len(task.predict(model, batch[0])) == len(task.predict(model, batch)) == 4
    silent = tasks.Detection(val_losses=False).evaluate(model, batch)
    assert (float(silent.loss), silent.weight) == (0.0, 0)


def test_losses_of_an_evaluation_leave_batchnorm_and_dropout_in_eval_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))

        def forward(self, pictures: Any, targets: Any = None) -> Any:
            value = self.net(torch.stack(pictures))
            return {"size": value.square().mean()} if self.training else [{"boxes": row} for row in value]

    model, batch = Net().eval(), boxes()
    before = copy.deepcopy(model.state_dict())
    expected = float(torch.stack(batch[0]).square().mean() / (1 + 1e-5))
    assert means(tasks.Detection().evaluate(model, batch)) == {"size": pytest.approx(expected, rel=1e-5)}
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


class Ones(nn.Module):
    def forward(self, pictures: Any, targets: Any = None) -> Tensor:
        return torch.ones(())


def test_a_detector_of_another_form_and_stacked_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="collate_lists"):
        tasks.Detection().step(nn.Identity(), (torch.zeros(2, 3, 8, 8), torch.zeros(2)))
    with pytest.raises(TypeError, match="gives a dict of losses in train mode"):
        tasks.Detection().step(Ones(), boxes())


def test_detections_go_into_torchmetrics_map() -> None:
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools", reason="needs pip install pycocotools")
    model, batch = small_faster_rcnn(width=8).eval(), boxes()
    metric = detection.MeanAveragePrecision()
    with torch.no_grad():
        output = tasks.Detection().evaluate(model, batch)
    metric.update(output.outputs, output.targets)
    perfect = [{**target, "scores": torch.ones(len(target["labels"]))} for target in batch[1]]
    assert 0 <= float(metric.compute()["map"]) < 1
    metric.reset()
    metric.update(perfect, output.targets)
    assert float(metric.compute()["map"]) == 1.0


# --- contrastive ---------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(5, 3)
        self.logit_scale = nn.Parameter(torch.tensor(scale)) if scale is not None else None

    def forward(self, one: Tensor, other: Tensor) -> Any:
        found = self.one(one), self.other(other)
        if self.logit_scale is None:
            return found
        return {"image_embeds": found[0], "text_embeds": found[1], "logits_per_image": None}


def info_nce(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """CLIP's pseudocode, row by row."""
    a, b = functional.normalize(one, dim=1), functional.normalize(other, dim=1)
    parts = []
    for k in range(len(a)):
        rows, columns = (scale * a[k] @ b.T).exp(), (scale * b[k] @ a.T).exp()
        parts += [-(rows[k] / rows.sum()).log(), -(columns[k] / columns.sum()).log()]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("own_scale", [False, True])
def test_clip_is_info_nce_by_hand_with_a_learned_temperature(own_scale: bool) -> None:
    model, batch = Towers(1.5 if own_scale else None), (torch.randn(6, 4), torch.randn(6, 5))
    task = tasks.Contrastive(loss="clip", temperature=0.07, learned=not own_scale, towers=True)
    outputs, targets = task.outputs(model, batch)
    scale = math.exp(1.5) if own_scale else 1 / 0.07
    expected = info_nce(model.one(batch[0]), model.other(batch[1]), scale)
    loss = task.loss(outputs, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    learned = model.logit_scale if own_scale else task.log_scale
    assert learned.grad is not None
    evaluated = task.evaluate(model, batch)
    assert evaluated.outputs.shape == (6, 6)
    assert loss_of(evaluated) == pytest.approx(float(expected.detach()))
    one, other = task.predict(model, batch)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(6))
    assert other.shape == (6, 3)


def test_two_views_are_drawn_from_each_input() -> None:
    data = TwoViews(Held(images()), lambda picture: picture + torch.randn(()))
    (one, other), label = data[3]
    assert label == 3
    assert not one.equal(other)
    assert len(data) == SAMPLES
    with pytest.raises(TypeError, match="two views"):
        tasks.Contrastive().outputs(Student(), torch.zeros(3, 64))


# --- generative ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_a_vae_has_the_negative_elbo(likelihood: str) -> None:
    from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

    model, (pictures, labels) = DigitsVAE(latent=3).double().eval(), default_collate(images())
    raw, mean, log_variance = model(pictures)
    posterior = Normal(mean, (log_variance / 2).exp())
    likely: Any = Normal(raw, 1.0) if likelihood == "gaussian" else Bernoulli(logits=raw, validate_args=False)
    reconstruction = -Independent(likely, 3).log_prob(pictures).mean()
    if likelihood == "gaussian":
        reconstruction = reconstruction - 64 * math.log(2 * math.pi) / 2
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    output = tasks.VAE(likelihood, beta=0.5).step(model, (pictures, labels))
    assert means(output) == pytest.approx({"reconstruction": float(reconstruction), "kl": float(kl)})
    assert loss_of(output) == pytest.approx(float(reconstruction + 0.5 * kl))
    for batch in (pictures, [pictures], (pictures, labels)):
        predicted = tasks.VAE(likelihood).predict(model, batch)
        assert predicted.equal(raw if likelihood == "gaussian" else raw.sigmoid())
    with pytest.raises(TypeError, match=r"set data\.inputs and data\.target"):
        tasks.VAE(likelihood).step(model, {"image": pictures})


@pytest.mark.parametrize("kind", ["non_saturating", "hinge", "wgan"])
def test_a_gan_minimizes_the_losses_of_the_papers(kind: str) -> None:
    model, real = DigitsGAN(latent=5, width=8).double(), torch.stack(images(classes=False))
    task = tasks.GAN(5, kind, gradient_penalty=2.0 if kind == "wgan" else None)
    torch.manual_seed(3)
    critic = task.step(model, real, "discriminator")
    torch.manual_seed(3)
    fake = model.generator(torch.randn(SAMPLES, 5, dtype=torch.float64)).detach()
    of_real, of_fake = model.discriminator(real), model.discriminator(fake)
    one, zero = torch.ones_like(of_real), torch.zeros_like(of_real)
    bce = functional.binary_cross_entropy_with_logits
    expected = {
        "non_saturating": (bce(of_real, one), bce(of_fake, zero), bce(of_fake, one)),
        "hinge": ((1 - of_real).clamp(min=0).mean(), (1 + of_fake).clamp(min=0).mean(), -of_fake.mean()),
        "wgan": (-of_real.mean(), of_fake.mean(), -of_fake.mean()),
    }[kind]
    found = means(critic)
    assert [found["real"], found["fake"]] == pytest.approx([float(value) for value in expected[:2]])
    torch.manual_seed(3)
    assert loss_of(task.step(model, real, "generator")) == pytest.approx(float(expected[2]))
    if kind == "wgan":
        torch.manual_seed(3)
        torch.randn(SAMPLES, 5, dtype=torch.float64)
        share = torch.rand(SAMPLES, 1, 1, 1)
        slopes = []
        for k in range(SAMPLES):  # the gradient of each sample alone
            jacobian = torch.func.jacrev(lambda x: model.discriminator(x[None]).sum())
            slopes.append(jacobian(share[k] * real[k] + (1 - share[k]) * fake[k]).norm())
        penalty = float((torch.stack(slopes) - 1).square().mean().detach())
        assert found["penalty"] == pytest.approx(penalty, rel=1e-6)
        assert loss_of(critic) == pytest.approx(found["real"] + found["fake"] + 2 * penalty)


def test_a_gan_moves_the_generator_after_the_critics_steps() -> None:
    task = tasks.GAN(5, "wgan", critic_steps=3)
    assert [task.moves(step) for step in range(4)] == [
        ["discriminator"], ["discriminator"], ["discriminator", "generator"], ["discriminator"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="name them so in `optimizer`"):
        task.step(DigitsGAN(5), torch.zeros(2, 1, 8, 8), "critic")


# --- distillation --------------------------------------------------------------------------------------------------------


def distilled(folder: Path, weights: Path, steps: int, **task: Any) -> Any:
    spec = {"_target_": "dist_train.tasks.Distillation", "weights": str(weights), **task}
    return train({
        "run": {"name": "run", "dir": str(folder)},
        "model": {"_target_": "dist_train.models.MLP", "in_features": 64, "hidden": [8], "out_features": 10},
        "task": {"teacher": {"_target_": "dist_train.models.DigitsCNN", "width": 4}, **spec},
        "data": {"train": {"_target_": "dist_train.data.Digits", "split": "val"}, "global_batch_size": 60},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}, "tracking": {"tensorboard": False, "report": False},
        "trainer": {"duration": "4step", "stop_at": f"{steps}step"},
    })  # fmt: skip


def test_a_teacher_is_in_no_checkpoint_and_another_one_is_refused(tmp_path: Path) -> None:
    from dist_train.models import DigitsCNN

    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        files.append(tmp_path / f"{seed}.pt")
        torch.save(DigitsCNN(width=4).state_dict(), files[-1])
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(files[0].read_bytes())
    distilled(tmp_path, weights, 2)
    saved = tmp_path / "run/checkpoints/step-00000002"
    assert torch.load(saved / "task.pt", weights_only=True).keys() == {"task.teacher_sha256"}
    assert all(name.startswith("layers.") for name in torch.load(saved / "model.pt", weights_only=True))
    assert "features" not in str(torch.load(saved / "optimizer.pt", weights_only=True))
    weights.write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match="aren't those that this run began with"):
        distilled(tmp_path, weights, 3)
    weights.write_bytes(files[0].read_bytes())
    assert distilled(tmp_path, weights, 4)["state"] == "completed"


def test_a_teacher_stays_in_eval_mode_and_does_not_train(tmp_path: Path) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4), nn.Dropout(0.5)).double()
    before = copy.deepcopy(teacher.state_dict())
    task, model, batch = tasks.Distillation(teacher), Student(), default_collate(images())
    one = task.train().step(model.train(), batch)
    assert loss_of(one) == loss_of(task.step(model, batch))
    computed(one).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(value.equal(before[key]) for key, value in teacher.state_dict().items())
    assert list(task.parameters()) == []


def test_mistakes_in_distillation_name_their_key(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"task\.weights: there is no file or directory"):
        distilled(tmp_path, tmp_path / "nowhere.pt", 1)
    with pytest.raises(ValueError, match="logits of the same classes"):
        tasks.Distillation(Student()).step(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), default_collate(images())
        )


def test_a_label_that_cross_entropy_would_ignore_is_no_class_of_a_student() -> None:
    """The losses are means over all samples: an ignored one would count as a loss of zero."""
    task, model, (pictures, labels) = tasks.Distillation(teacher()), Student(), default_collate(images())
    some = labels.where(torch.arange(len(labels)) > 1, -100)
    with pytest.raises(ValueError, match="found the label -100: both losses are means over all samples"):
        task.step(model, (pictures, some))
    task.step(model, (pictures, labels))
    with pytest.raises(IndexError, match="-100 is out of bounds"):
        task.step(model, (pictures, some))
