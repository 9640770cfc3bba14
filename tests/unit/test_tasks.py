"""Pre-training tasks: losses by hand, exact additivity over ranks, gradients, state, learning."""

import pytest
import torch
import torch.nn.functional as F

from itpn_core.errors import ConfigError, WeightsError
from itpn_core.models.config import ModelConfig
from itpn_core.models.layout import take_patches
from itpn_core.models.pyramid import Levels
from itpn_core.pretraining.config import ObjectiveConfig
from itpn_core.pretraining.targets import ChannelStatistics, plain_layer_norm, tokens_of
from itpn_core.pretraining.tasks import FAMILY_OF, build_task
from itpn_core.pretraining.teachers import Teacher
from itpn_core.random import stream_keys
from itpn_core.task import Examples

KINDS = tuple(FAMILY_OF)


class ConvTeacher(Teacher):
    """A small real teacher: one convolution with fixed weights."""

    width, mean, std, image_size = 24, (0.0,) * 3, (1.0,) * 3, (64, 64)

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, self.width, 16, stride=16).requires_grad_(False)

    def grid_for(self, height, width):
        return height // 16, width // 16

    @torch.no_grad()
    def forward(self, images_B3HW):
        return self.conv(images_B3HW)


def make(kind, seed=0, drop_path=0.0, size=64, **objective):
    torch.manual_seed(seed)
    model = ModelConfig(family=FAMILY_OF[kind], embed_dim=64, depths=(1, 1, 2), img_size=size, drop_path_rate=drop_path)
    small = {"pyramid_dim": 16, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    config = ObjectiveConfig(kind=kind, **{**small, **objective})
    return build_task(model, config, teacher=ConvTeacher() if kind in ("fast", "clip") else None)


def batch(n=6, seed=0, dtype=torch.float32):
    images = torch.rand(n, 3, 64, 64, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return images, stream_keys(0, 0, torch.arange(n) + 100 * seed, "objective")


def losses(task, images, keys):
    return task(images, task.targets(images), keys)


def gradients(task, images, keys, total):
    task.zero_grad()
    (losses(task, images, keys).loss_B.sum() / total).backward()
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_add_up_over_any_split(kind):
    """World sizes 1, 2 and 3 with stochastic depth on, in float64: the same numbers up to rounding."""
    task = make(kind, drop_path=0.3).double().train()
    images, keys = batch(6, dtype=torch.float64)
    whole = losses(task, images, keys)
    grads = gradients(task, images, keys, 6)
    for world in (2, 3):
        parts = [losses(task, i, k).loss_B for i, k in zip(images.chunk(world), keys.chunk(world), strict=True)]
        assert torch.allclose(torch.cat(parts), whole.loss_B, rtol=1e-12, atol=1e-13)
        shares = [gradients(task, i, k, 6) for i, k in zip(images.chunk(world), keys.chunk(world), strict=True)]
        for name, full in grads.items():
            # The published pixel encoder resamples its positions in float32, and so their gradient.
            atol = 1e-10 if name.endswith("absolute_pos_embed") else 1e-12
            assert torch.allclose(sum(share[name] for share in shares), full, rtol=1e-9, atol=atol), name


@pytest.mark.parametrize("kind", KINDS)
def test_random_choices_follow_the_keys(kind):
    task = make(kind, drop_path=0.5).double().train()
    images, keys = batch(6, dtype=torch.float64)
    first = losses(task, images, keys).loss_B
    torch.manual_seed(99)
    assert torch.equal(losses(task, images, keys).loss_B, first)
    assert not torch.allclose(losses(task, images, keys.flip(0)).loss_B, first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(kind):
    task = make(kind).train()
    images, keys = batch()
    gradients(task, images, keys, 6)
    for name, parameter in task.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    names = {n.split(".")[0] for n, _ in task.named_parameters()}
    assert names == ({"student", "predictors", "ema"} if kind == "ema" else {"student"})
    assert not any("_outside" in n or "conv" in n.split(".") for n in task.state_dict())
    if task.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_learns_random_images(kind):
    task = make(kind, stem_gradient_scale=1.0).train()
    images, keys = batch(8)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    history = []
    for step in range(20):
        loss = losses(task, images, keys).loss_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.ema_update(step / 20)
        history.append(loss.item())
    assert sum(history[-3:]) / 3 < sum(history[:3]) / 3 - 0.02, history


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_keeps_losses_in_full_precision(kind):
    task = make(kind).train()
    images, keys = batch()
    full = losses(task, images, keys).loss_B
    with torch.autocast("cpu", torch.bfloat16):
        half = losses(task, images, keys)
    assert half.loss_B.dtype == torch.float32
    assert torch.allclose(half.loss_B, full, atol=0.05)
    half.loss_B.mean().backward()


def test_fast_loss_is_minus_the_mean_cosine_over_masked_tokens():
    task = make("fast").eval()
    images, keys = batch(3)
    mask = task.mask(keys)
    prediction = task.student(task.normalise(images), mask)
    target = tokens_of(task.teacher(images))
    assert (mask.sum(1) == 6).all()
    for b in range(3):
        cosines = [F.cosine_similarity(prediction[b, n], target[b, n], dim=0) for n in range(16) if mask[b, n]]
        assert losses(task, images, keys).loss_B[b].item() == pytest.approx(
            -sum(c.item() for c in cosines) / 6, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["fast", "ema"])
def test_a_pyramid_of_masked_patches_alone_teaches_what_the_whole_one_does(kind):
    task = make(kind, drop_path=0.3).double().train()
    images, keys = batch(dtype=torch.float64)
    found, grads = losses(task, images, keys).loss_B, gradients(task, images, keys, 6)
    real = task.student.levels
    seen = []

    def whole(x_BNE, stem):
        seen.append(x_BNE.shape[1])
        return real(x_BNE, stem)

    task.student.levels = whole
    losses(task, images, keys)
    assert seen == [task.mask_count], "the others cost nothing"
    task.student._levels_of = lambda only_BM, x_BNE, stem: Levels(
        *(level if only_BM is None else take_patches(level, only_BM) for level in whole(x_BNE, stem))
    )
    torch.testing.assert_close(losses(task, images, keys).loss_B, found, rtol=1e-12, atol=1e-14)
    assert seen[1:] == [16]
    expected = gradients(task, images, keys, 6)
    for name, value in grads.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_fast_loss_over_all_tokens_keeps_the_masked_part_for_the_record():
    task = make("fast", loss_tokens="all").eval()
    images, keys = batch(3)
    prediction = task.student(task.normalise(images), task.mask(keys))
    cosine_BN = F.cosine_similarity(prediction, tokens_of(task.teacher(images)), dim=2)
    output = losses(task, images, keys)
    assert torch.allclose(output.loss_B, -cosine_BN.mean(1), atol=1e-6)
    masked_B = (cosine_BN * task.mask(keys)).sum(1) / 6
    assert torch.allclose(output.parts["loss_masked"], -masked_B, atol=1e-6)


def test_clip_loss_is_the_sum_of_two_smooth_l1_over_all_tokens():
    task = make("clip").eval()
    images, keys = batch(3)
    target = plain_layer_norm(tokens_of(task.teacher(images)))
    heads = task.student(task.normalise(images), task.mask(keys))
    by_hand = sum(F.smooth_l1_loss(h[1], target[1]) for h in heads)
    output = losses(task, images, keys)
    assert torch.allclose(output.loss_B[1], by_hand)
    assert torch.allclose(output.loss_B, output.parts["loss_pyramid"] + output.parts["loss_auxiliary"])


def test_pixel_loss_is_the_error_of_normalised_masked_pixels():
    task = make("pixel").eval()
    images, keys = batch(2)
    mask = task.mask(keys)
    assert (mask.sum(1) == 12).all()
    prediction = task.student(task.normalise(images), mask)
    image = task.normalise(images)[0].permute(1, 2, 0)
    errors = []
    for n in range(16):
        pixels = image[n // 4 * 16 : n // 4 * 16 + 16, n % 4 * 16 : n % 4 * 16 + 16].reshape(-1)
        pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
        errors.append((prediction[0, n] - pixels).square().mean())
    by_hand = torch.stack(errors)[mask[0]].mean()
    assert torch.allclose(losses(task, images, keys).loss_B[0], by_hand, atol=1e-5)


def test_ema_loss_compares_masked_cells_of_three_levels():
    task = make("ema", level_weights=(2.0, 1.0, 1.0)).eval()
    images, keys = batch(2)
    mask = task.mask(keys)
    _, _, levels = task.student.encode(task.normalise(images), mask)
    output = losses(task, images, keys)
    for name, predict, level, target in zip(
        ("p16", "p8", "p4"), task.predictors, levels, task.targets(images), strict=True
    ):
        assert not target.requires_grad
        by_hand = F.smooth_l1_loss(predict(level[0][mask[0]]), target[0][mask[0]])
        assert torch.allclose(output.parts[f"loss_{name}"][0], by_hand, atol=1e-6)
    p16, p8, p4 = output.parts.values()
    assert torch.allclose(output.loss_B, 0.5 * p16 + 0.25 * p8 + 0.25 * p4)


def test_ema_loss_over_all_cells_counts_visible_patches_too():
    task = make("ema", loss_tokens="all").eval()
    images, keys = batch(2)
    _, _, levels = task.student.encode(task.normalise(images), task.mask(keys))
    by_hand = [
        F.smooth_l1_loss(predict(level[1]), target[1])
        for predict, level, target in zip(task.predictors, levels, task.targets(images), strict=True)
    ]
    assert torch.allclose(losses(task, images, keys).loss_B[1], sum(by_hand) / 3, atol=1e-6)


def test_ema_instance_targets_are_standardised_per_image_and_channel():
    task = make("ema", target_norm="instance").eval()
    images, _ = batch()
    for whole, alone in zip(task.targets(images), task.targets(images[:1]), strict=True):
        assert torch.allclose(whole.mean((1, 2)), torch.zeros(()), atol=1e-4)
        assert torch.allclose(whole.var((1, 2), correction=0), torch.ones(()), atol=1e-2)
        assert torch.allclose(whole[:1], alone, atol=1e-4)  # other images of the batch do not matter


def test_ema_teacher_is_the_moving_average_and_starts_as_the_student():
    task = make("ema", ema_momentum=0.5, ema_momentum_end=0.5).eval()
    images, _ = batch(2)
    _, _, levels = task.student.encode(task.normalise(images))
    for target, level in zip(task.targets(images), levels, strict=True):
        assert torch.allclose(target, plain_layer_norm(level), atol=1e-6)
    before = [p.clone() for p in task.ema.parameters()]
    with torch.no_grad():
        for p in task.student.parameters():
            p.add_(1.0)
    task.ema_update(0.3)
    assert all(torch.allclose(a, b + 0.5, atol=1e-6) for a, b in zip(task.ema.parameters(), before, strict=True))


def test_ema_image_loss_compares_the_mean_of_visible_tokens_with_the_whole_image():
    task = make("ema", image_weight=2.0).train()
    images, keys = batch(3)
    mask = task.mask(keys)
    tokens, _, _ = task.student.encode(task.normalise(images), mask)
    whole = task.ema.module.encode(task.normalise(images))[0].mean(1)
    visible = torch.stack([tokens[b][~mask[b]].mean(0) for b in range(3)])
    expected_B = F.smooth_l1_loss(task.image_predictor(visible), plain_layer_norm(whole), reduction="none").mean(1)
    output = losses(task, images, keys)
    assert torch.allclose(output.parts["loss_image"], expected_B, atol=1e-6)
    levels = sum(output.parts[f"loss_{name}"] for name in ("p16", "p8", "p4")) / 3
    assert torch.allclose(output.loss_B, levels + 2.0 * expected_B, atol=1e-6)
    output.loss_B.sum().backward()
    assert all(p.grad is not None for p in task.image_predictor.parameters())
    assert set(task.picture(images, mask)) == set(make("ema").picture(images, mask))


def seen_by_the_student(images, keys, **objective):
    task = make("ema", **objective).eval()
    full = torch.ones(len(keys), dtype=torch.bool)
    view, targets = task.prepare(Examples(images, torch.zeros_like(keys), full, keys))
    assert all(torch.equal(a, b) for a, b in zip(targets, task.targets(images), strict=True))  # the teacher's: as is
    return view


def test_ema_student_colours_follow_the_sample_alone_and_leave_the_teacher_its_own():
    images, keys = batch(6)
    view = seen_by_the_student(images, keys, student_colour=0.4, student_grey=0.5)
    alone = [
        seen_by_the_student(images[i : i + 1], keys[i : i + 1], student_colour=0.4, student_grey=0.5) for i in range(6)
    ]
    assert torch.allclose(view, torch.cat(alone), atol=1e-6)
    assert (view - images).abs().flatten(1).mean(1).min() > 0.01
    assert 0 <= view.min() <= view.max() <= 1
    assert not torch.allclose(view, seen_by_the_student(images, keys + 1, student_colour=0.4, student_grey=0.5))
    assert torch.equal(seen_by_the_student(images, keys), images)


def test_ema_student_sees_the_asked_share_in_grey():
    images, keys = torch.rand(400, 3, 64, 64), stream_keys(3, 1, torch.arange(400), "objective")
    task = make("ema", student_grey=0.25)
    grey_B = task.student_view(images, keys).std(dim=1).amax((1, 2)) < 1e-5
    assert 75 <= int(grey_B.sum()) <= 125
    assert torch.allclose(task.student_view(images, keys)[~grey_B], images[~grey_B], atol=1e-6)


def test_channel_statistics_standardise_the_targets():
    task = make("fast", target_norm="channel")
    images, _ = batch(32)
    assert task.needs_statistics
    with pytest.raises(ValueError, match="fit_target_statistics"):
        task.targets(images)
    with pytest.raises(ValueError, match="at least one batch"):
        task.fit_target_statistics([])
    task.fit_target_statistics(images.chunk(5))
    assert not task.needs_statistics
    rows = task.targets(images).flatten(0, 1)
    assert torch.allclose(rows.mean(0), torch.zeros(24), atol=1e-4)
    assert torch.allclose(rows.std(0, unbiased=False), torch.ones(24), atol=1e-3)


def test_channel_statistics_do_not_depend_on_the_batches():
    rows = torch.randn(4, 10, 6, dtype=torch.float64)
    results = []
    for size in (1, 2, 4):
        statistics = ChannelStatistics(6, torch.device("cpu"))
        for part in rows.split(size):
            statistics.update(part)
        results.append(torch.stack(statistics.result()))
    assert torch.allclose(results[0], results[1])
    assert torch.allclose(results[0], results[2])
    assert torch.allclose(results[0][0].double(), rows.flatten(0, 1).mean(0), atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_restart_bit_for_bit(kind):
    settings = {"target_norm": "channel"} if kind in ("fast", "clip") else {}
    first, second = make(kind, **settings).eval(), make(kind, seed=5, **settings).eval()
    images, keys = batch()
    first.fit_target_statistics([images])
    first.watch(7, first.health(images))
    first.ema_update(0.1)
    second.load_persistent_state({k: v.clone() for k, v in first.persistent_state().items()})
    if second.teacher is not None:
        second.teacher.load_state_dict(first.teacher.state_dict())
    assert second.guard == first.guard
    assert torch.equal(losses(second, images, keys).loss_B, losses(first, images, keys).loss_B)
    with pytest.raises(WeightsError, match=f"does not fit the {kind} objective"):
        second.load_persistent_state({"student.nothing": torch.zeros(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_the_exported_backbone(kind):
    from itpn_core.models import build_backbone

    task = make(kind).train()
    images, _ = batch()
    features = task.features(images)
    assert task.training
    backbone = build_backbone(task.model_config).eval()
    backbone.load_state_dict(task.student.export_backbone_state())
    with torch.no_grad():
        assert torch.allclose(features, backbone.forward_features(task.normalise(images)).mean(1), atol=1e-5)
    if task.teacher is None:
        with pytest.raises(ValueError, match="no external teacher"):
            task.teacher_features(images)
    else:
        assert task.teacher_features(images).shape == (6, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_figure_and_health_have_what_a_picture_needs(kind):
    task = make(kind).train()
    images, keys = batch(4)
    figure = task.figure(images, keys)
    assert figure["mask"].shape == (4, 1, 4, 4)
    assert (figure["mask"].sum((1, 2, 3)) == task.mask_count).all()
    levels = {"": 4} if kind != "ema" else {"/p16": 4, "/p8": 8, "/p4": 16}
    for level, side in levels.items():
        assert figure[f"teacher{level}"].shape == figure[f"student{level}"].shape
        assert figure[f"teacher{level}"].shape[2:] == (side, side)
    if kind == "fast":
        assert figure["student/p4"].shape[2:] == (16, 16)
    health = task.health(images)
    levels = ("p16", "p8", "p4") if kind == "ema" else ("x16",)
    assert set(health) == {f"{m}/{name}" for m in ("std", "rankme") for name in levels}
    assert all(value > 0 for value in health.values())


@pytest.mark.parametrize(
    ("kind", "objective", "words"),
    [
        ("fast", {"mask": "blocks"}, "Did you mean 'block'"),
        ("fast", {"mask_ratio": 1.5}, "objective.mask_ratio = 1.5: must lie between 0 and 1"),
        ("fast", {"mask_ratio": 0.01}, "at least one and not all of the 16 patches"),
        ("fast", {"loss_tokens": "visible"}, "must be one of masked, all"),
        ("pixel", {"loss_tokens": "all"}, "must be masked when objective.kind is pixel"),
        ("ema", {"target_norm": "channel"}, "must be layer, instance or none for ema"),
        ("fast", {"target_norm": "instance"}, "must be none, layer or channel when objective.kind is fast"),
        ("pixel", {"target_norm": "layer"}, "must be auto when objective.kind is pixel"),
        ("ema", {"level_weights": (1.0, 1.0)}, "must be three weights"),
        ("ema", {"student_grey": 1.5}, "objective.student_grey = 1.5: must lie between 0 and 1"),
        ("pixel", {"image_weight": 1.0}, "objective.image_weight = 1.0: must be 0 when objective.kind is pixel"),
        ("ema", {"guard_steps": 0}, "objective.guard_steps = 0: must be at least 1"),
    ],
)
def test_settings_that_cannot_work(kind, objective, words):
    with pytest.raises(ConfigError, match=words):
        make(kind, **objective)


def test_objective_and_family_must_fit():
    with pytest.raises(ConfigError, match=r"model.family = 'fast': must be itpn_clip when objective.kind is clip"):
        build_task(ModelConfig(), ObjectiveConfig(kind="clip"))


def test_masks_by_objective():
    _, keys = batch(64)
    assert make("fast").mask(keys).sum(1).unique().tolist() == [6]
    assert make("pixel").mask(keys).sum(1).unique().tolist() == [12]
    assert make("fast", mask_ratio=0.5, mask="uniform").mask(keys).sum(1).unique().tolist() == [8]


def test_moving_the_task_moves_the_teacher():
    task = make("fast").double()
    assert next(task.teacher.parameters()).dtype == torch.float64
    assert task.targets(batch(2, dtype=torch.float64)[0]).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_one_graph(kind):
    """No graph break and no wait for the device: dynamo refuses `.item()` and data-dependent branches."""
    task = make(kind, drop_path=0.1).train()
    images, keys = batch(2)
    targets = task.targets(images)
    torch.compiler.reset()
    compiled = torch.compile(task, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images, targets, keys).loss_B, task(images, targets, keys).loss_B, atol=1e-5)
