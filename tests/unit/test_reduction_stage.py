"""Reduced models: exact invariants, equality with the plain definitions, gradients, masks, sizes."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn_core import TokenGathering, TokenMigration
from itpn_core.errors import ConfigError
from itpn_core.models import ClipStudent, FastStudent, ModelConfig, PixelStudent, build_backbone
from itpn_core.reduction.backend import block_mask
from itpn_core.reduction.gathering import View, gathered_layer
from itpn_core.reduction.layout import window_order
from itpn_core.reduction.plain import PlainImage

FAMILIES = ("fast", "itpn_clip")
MIGRATIONS = {
    "half": TokenMigration((2,), (0.5,)),
    "two": TokenMigration((1, 3), (0.75, 0.6)),
    "keys": TokenMigration((2,), (0.5,), similarity="keys"),
    "neighbours": TokenMigration((1,), (0.35,), partners="neighbours"),
    "random": TokenMigration((2,), (0.5,), rule="random", seed=3),
    "norm": TokenMigration((2,), (0.5,), rule="norm"),
    "merge": TokenMigration((1, 3), (0.6, 0.6), rule="merge"),
    "parked": TokenMigration((1, 3), (0.75, 0.6), restore="parked"),
    "lost": TokenMigration((2,), (0.5,), replenish=False),
}
GATHERINGS = {
    "shared": TokenGathering(4, 3),
    "simultaneous": TokenGathering(4, 3, simultaneous=True),
    "per_window": TokenGathering(4, 2, per_window=True),
    "per_window_simultaneous": TokenGathering(4, 2, per_window=True, simultaneous=True),
    "global_layers": TokenGathering(4, 2, global_layers=(0, 3)),
    "windows_only": TokenGathering(4, 0),
    "one_window": TokenGathering(8, 2),
}


def _model(family="fast", size=(8, 8), depth=4, seed=0, **extra):
    torch.manual_seed(seed)
    config = ModelConfig(family=family, embed_dim=32, depths=(1, 1, depth), num_heads=2, patch_size=4, **extra)
    model = build_backbone(config, num_classes=5, img_size=(4 * size[0], 4 * size[1])).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # weights far from their start, so that every path matters
            if "gamma" in name:
                value.fill_(0.7)
            if "relative_position_bias_table" in name or "pos_embed" in name:
                value.normal_()
    return model


def _images(size=(8, 8), batch=3, seed=1):
    return torch.randn(batch, 3, 4 * size[0], 4 * size[1], generator=torch.Generator().manual_seed(seed))


def _tokens(model, images):
    grid = model.grid_of(*images.shape[-2:])
    return model.stem(model.embed(images)).tokens + model.positions(grid), grid


def _plain(model, x_BNE, grid, masked=None):
    blocks = model.stage3
    out = []
    for b, x_NE in enumerate(x_BNE):
        hidden = set() if masked is None else set(masked[b].nonzero().flatten().tolist())
        image = PlainImage(
            *(x_NE, grid, model.migration, model.gathering, hidden),
            lambda layer: model.attention_bias(blocks[layer], grid, layer),
            model.trained_gathering_tokens,
        )
        out.append(image.run(blocks))
    return torch.stack(out)


# --- exact invariants ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("migration", "gathering"),
    [
        (TokenMigration((1, 2), (1.0, 1.0)), None),
        (None, TokenGathering(8, 0)),
        (TokenMigration((0,), (1.0,)), TokenGathering(8, 0)),
        (TokenMigration((0,), (1.0,), pool="survivors"), None),
    ],
)
def test_settings_that_reduce_nothing_are_bit_identical(family, migration, gathering):
    model, images = _model(family), _images()
    expected = model(images), model.forward_features(images), model.forward_intermediates(images)[1]
    model.set_token_reduction(migration, gathering)
    assert torch.equal(model(images), expected[0])
    assert torch.equal(model.forward_features(images), expected[1])
    for level, wanted in zip(model.forward_intermediates(images)[1], expected[2], strict=True):
        assert torch.equal(level, wanted)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
@pytest.mark.parametrize("name", MIGRATIONS)
def test_untouched_tokens_come_back_exactly_once(name, grid):
    """With blocks that add nothing, a migrated stage is the identity: every token returns to its cell."""
    model, images = _model(size=grid), _images(grid)
    for block in model.stage3:
        block.gamma_1.data.zero_()
        block.gamma_2.data.zero_()
    x_BNE, grid = _tokens(model, images)
    model.set_token_reduction(MIGRATIONS[name])
    out = model.attend(x_BNE, grid)
    total = grid[0] * grid[1]
    assert out.survivors.sum(1).tolist() == [out.history[-1][1].shape[1]] * 3
    if name in ("merge", "lost"):
        # merged cells hold their owner's mean, lost ones nothing; survivors of "lost" are untouched
        kept = out.tokens[out.survivors] if name == "lost" else None
        assert kept is None or torch.equal(kept, x_BNE[out.survivors])
        assert name == "merge" or not out.tokens[~out.survivors].any()
    else:
        assert torch.equal(out.tokens, x_BNE)
        assert int(out.survivors.sum()) < 3 * total


@pytest.mark.parametrize("gathering", GATHERINGS)
@pytest.mark.parametrize("migration", MIGRATIONS)
def test_permuting_the_batch_permutes_the_output(migration, gathering):
    model, images = _model(), _images(batch=4)
    model.set_token_reduction(MIGRATIONS[migration], GATHERINGS[gathering])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.forward_features(images)[order], model.forward_features(images[order]))


# --- equality with the definitions ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("migration", [None, *MIGRATIONS])
def test_migration_equals_the_plain_definition_with_gradients(family, migration):
    _compare(family, (8, 8), MIGRATIONS.get(migration), None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gathering", GATHERINGS)
@pytest.mark.parametrize("migration", [None, "half", "merge", "parked"])
def test_gathering_equals_the_plain_definition_with_gradients(family, migration, gathering):
    _compare(family, (8, 8), MIGRATIONS.get(migration), GATHERINGS[gathering])


@settings(max_examples=20)
@given(
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    ratio=st.floats(0.5, 1.0),
    window=st.integers(2, 9),
    tokens=st.integers(0, 2),
    per_window=st.booleans(),
    simultaneous=st.booleans(),
    family=st.sampled_from(FAMILIES),
)
def test_any_grid_and_window_equals_the_plain_definition(grid, ratio, window, tokens, per_window, simultaneous, family):
    """Non-square grids and grids that windows do not divide."""
    gathering = TokenGathering(min(window, max(grid)), tokens, per_window=per_window, simultaneous=simultaneous)
    for migration in (TokenMigration((1,), (ratio,)), TokenMigration((1,), (ratio,), restore="parked"), None):
        try:
            _compare(family, grid, migration, gathering, batch=2, depth=2)
        except ConfigError:
            # this window cannot lose that many, or is smaller than its gathering tokens
            continue


def _compare(family, grid, migration, gathering, batch=3, depth=4):
    model, images = _model(family, grid, depth), _images(grid, batch)
    model.set_token_reduction(migration, gathering)
    twin = copy.deepcopy(model)
    weight = torch.randn(batch, grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(9))
    results = []
    for run, which in ((lambda m, x, g: m.attend(x, g).tokens, model), (_plain, twin)):
        x_BNE, cells = _tokens(which, images)
        x_BNE = x_BNE.detach().requires_grad_()
        out = run(which, x_BNE, cells)
        (out * weight).sum().backward()
        results.append((out, x_BNE.grad, {n: p.grad for n, p in which.named_parameters() if p.grad is not None}))
    (out, grad, grads), (plain_out, plain_grad, plain_grads) = results
    torch.testing.assert_close(out, plain_out, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(grad, plain_grad, atol=1e-3, rtol=1e-3)
    assert grads.keys() == plain_grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(value, plain_grads[name], atol=5e-3, rtol=5e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("restore", ["parked", "carried"])
def test_gradients_reach_kept_and_parked_tokens(restore):
    model, images = _model(), _images(batch=1)
    model.set_token_reduction(TokenMigration((2,), (0.5,), restore=restore))
    x_BNE, grid = _tokens(model, images)
    x_BNE = x_BNE.detach().requires_grad_()
    out = model.attend(x_BNE, grid)
    for chosen in (out.survivors, ~out.survivors):
        (grad,) = torch.autograd.grad(out.tokens[chosen].square().sum(), x_BNE, retain_graph=True)
        assert bool((grad[chosen].abs().sum(-1) > 0).all())
    # what a parked token becomes depends on the layers after its drop only through its partner's gain
    last = list(model.stage3[3].parameters())
    grads = torch.autograd.grad(out.tokens[~out.survivors].square().sum(), last, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in grads) == (restore == "carried")


# --- block masks ---


@pytest.mark.parametrize("simultaneous", [False, True])
@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_layer(simultaneous, per_window):
    if per_window and not simultaneous:
        pytest.skip("this variant has no block mask")
    block = _model().stage3[0]
    order = window_order((7, 10), 4)
    tokens = 2 * order.windows if per_window else 2
    valid = order.valid.view(order.windows, -1)
    view = View(order.windows, order.length, tokens, per_window, simultaneous, valid)
    z_BTE = torch.randn(2, tokens + order.windows * order.length, 32)
    masked = View(*list(vars(view).values())[:6], block_mask(view, torch.device("cpu")))
    with torch.no_grad():
        expected, got = gathered_layer(block, z_BTE, view), gathered_layer(block, z_BTE, masked)
    seen = torch.cat([torch.ones(tokens, dtype=torch.bool), valid.flatten()])
    torch.testing.assert_close(got[:, seen], expected[:, seen], atol=1e-5, rtol=1e-5)


# --- pre-training ---


@pytest.mark.parametrize("name", ["half", "keys", "neighbours", "random", "norm", "parked"])
@pytest.mark.parametrize("gathering", [None, TokenGathering(4, 2)])
def test_masked_tokens_are_never_dropped_and_match_the_plain_definition(name, gathering):
    model = FastStudent(ModelConfig(embed_dim=32, depths=(1, 1, 4), num_heads=2, patch_size=4, img_size=32), 7).eval()
    mask = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(b)) < 20 for b in range(3)])
    migration = MIGRATIONS[name] if gathering is None else TokenMigration((2,), (0.75,))
    model.set_token_reduction(migration, gathering, masked_tokens=20)
    stem = model.stem(model.masked_cells(_images(), mask))
    x_BNE = stem.tokens + model.positions((8, 8))
    out = model.attend(x_BNE, (8, 8), masked_BN=mask)
    assert bool(out.survivors[mask].all())
    if name not in ("random", "norm"):
        torch.testing.assert_close(out.tokens, _plain(model, x_BNE, (8, 8), mask), atol=2e-4, rtol=2e-4)
    assert model(_images(), mask).shape == (3, 64, 7)


def test_clip_student_and_pixel_student_train_reduced():
    clip = ClipStudent(
        ModelConfig(family="itpn_clip", embed_dim=32, depths=(1, 1, 4), num_heads=2, patch_size=4, img_size=32), 6
    )
    mask = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(b)) < 20 for b in range(3)])
    clip.set_token_reduction(MIGRATIONS["half"], TokenGathering(4, 2))
    sum(out.square().mean() for out in clip(_images(), mask)).backward()
    pixel = PixelStudent(
        ModelConfig(family="itpn_pixel", embed_dim=32, depths=(1, 1, 4), num_heads=2, patch_size=4, img_size=32),
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
    )
    plain = pixel(_images(), mask)
    pixel.set_token_reduction(TokenMigration((1,), (1.0,)))
    assert torch.equal(pixel(_images(), mask), plain)
    pixel.set_token_reduction(MIGRATIONS["two"])
    pixel(_images(), mask).square().mean().backward()
    for student in (clip, pixel):
        assert all(torch.isfinite(p.grad).all() for p in student.stage3[-1].parameters())
    with pytest.raises(ConfigError, match=r"TokenGathering.window = 4: must be 0 when only visible"):
        pixel.set_token_reduction(None, TokenGathering(4, 2))
    with pytest.raises(ConfigError, match="masked tokens never go"):
        clip.set_token_reduction(MIGRATIONS["half"], masked_tokens=40)
    clip.set_token_reduction(MIGRATIONS["merge"])
    with pytest.raises(ConfigError, match="redundancy, random or norm in masked pre-training"):
        clip(_images(), mask)


def test_students_that_are_reduced_by_nothing_are_bit_identical():
    model = FastStudent(ModelConfig(embed_dim=32, depths=(1, 1, 4), num_heads=2, patch_size=4, img_size=32), 7).eval()
    mask = torch.arange(64).expand(2, -1) % 3 == 0
    expected = model.pyramid(_images(batch=2), mask)
    model.set_token_reduction(TokenMigration((2,), (1.0,)), TokenGathering(8, 0))
    for level, wanted in zip(model.pyramid(_images(batch=2), mask), expected, strict=True):
        assert torch.equal(level, wanted)


# --- settings on models ---


def test_settings_change_no_weight_and_come_off_again():
    model, images = _model(), _images()
    expected, before = model(images), copy.deepcopy(model.state_dict())
    model.set_token_reduction(MIGRATIONS["half"], GATHERINGS["shared"])
    assert not torch.equal(model(images), expected)
    model.set_token_reduction()
    assert torch.equal(model(images), expected)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("migration", "gathering", "words"),
    [
        (TokenMigration((4,), (0.5,)), None, "TokenMigration.layers = .4,.: 4 must lie in 0 to 3"),
        (None, TokenGathering(9, 0), r"TokenGathering.window = 9: must lie in 1 to 8"),
        (None, TokenGathering(4, 17, per_window=True), "TokenGathering.tokens = 17: must lie in 0 to 16"),
        (None, TokenGathering(4, 2, global_layers=(7,)), "TokenGathering.global_layers"),
        ({"layers": (1,), "keep": (0.5,), "rato": 1}, None, "Did you mean|Known"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_as_it_was(migration, gathering, words):
    model = _model()
    model.set_token_reduction(MIGRATIONS["half"])
    with pytest.raises(ConfigError, match=words):
        model.set_token_reduction(migration, gathering)
    assert model.migration == MIGRATIONS["half"]
    assert not model.gathering.active


def test_zero_shot_tokens_are_announced_and_trained_ones_travel(caplog):
    model, images = _model(), _images()
    with caplog.at_level(logging.INFO, "itpn_core"):
        model.set_token_reduction(gathering=TokenGathering(4, 3))
    assert sum("zero-shot" in r.message for r in caplog.records) == 1
    assert "gathering_tokens" not in model.state_dict()
    model.set_token_reduction(gathering=TokenGathering(4, 3, learn=True))
    model(images).square().mean().backward()
    assert model.gathering_tokens.grad.abs().sum() > 0
    expected = model(images)
    other = _model(seed=5)
    other.load_state_dict(model.state_dict())
    other.set_token_reduction(gathering=TokenGathering(4, 3))
    assert torch.equal(other(images), expected)
    with pytest.raises(ConfigError, match="already learns 3"):
        other.set_token_reduction(gathering=TokenGathering(4, 2, learn=True))


def test_timm_and_config_take_the_same_fields():
    fields = {"layers": [2], "keep": [0.5]}
    kwargs = {"img_size": 64, "num_classes": 3, "depths": (1, 1, 3), "embed_dim": 64}
    model = timm.create_model(
        "fast_itpn_tiny_1112_patch16_224", migration=fields, gathering={"window": 2, "tokens": 1}, **kwargs
    )
    assert model.migration == TokenMigration((2,), (0.5,))
    assert model.gathering == TokenGathering(2, 1)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    maps = timm.create_model(
        "fast_itpn_tiny_1112_patch16_224", features_only=True, migration=fields, pyramid_dim=32, **kwargs
    )(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_survivor_pooling_averages_undropped_tokens():
    model, images = _model(), _images()
    model.set_token_reduction(TokenMigration((2,), (0.5,), pool="survivors"))
    x_BNE, grid = _tokens(model, images)
    out = model.attend(x_BNE, grid)
    expected = torch.stack([model.norm(t)[s].mean(0) for t, s in zip(out.tokens, out.survivors, strict=True)])
    torch.testing.assert_close(model(images), model.head(expected))


# --- training machinery ---


@pytest.mark.parametrize("gathering", [None, GATHERINGS["shared"], GATHERINGS["per_window"]])
def test_gradient_checkpointing_changes_nothing(gathering):
    model, images = _model(drop_path_rate=0.3).train(), _images()
    model.set_token_reduction(MIGRATIONS["two"], gathering)
    keys = torch.arange(3)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, keys).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_plan_made_in_inference_mode_serves_training():
    model, images = _model(size=(6, 10)), _images((6, 10))
    model.set_token_reduction(TokenMigration((1,), (0.81,)), TokenGathering(5, 2, per_window=True))
    with torch.inference_mode():
        expected = model(images).clone()
    out = model(images)
    out.square().sum().backward()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_and_autocast(family):
    model, images = _model(family, (7, 9)), _images((7, 9))
    model.set_token_reduction(TokenMigration((2,), (0.75,)), TokenGathering(9, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(images)).all()
    assert torch.isfinite(model.bfloat16()(images.bfloat16())).all()


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gathering", [None, "shared", "per_window"])
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_graph_breaks_or_recompiles(family, gathering):
    torch._dynamo.reset()
    model = _model(family, (7, 8), depth=2)
    model.set_token_reduction(TokenMigration((1,), (0.86,)), gathering and GATHERINGS[gathering])
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            images = _images((7, 8), seed=seed)
            torch.testing.assert_close(compiled(images), model(images), atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_traces_as_one_graph():
    torch._dynamo.reset()
    model = _model(size=(7, 8), depth=2)
    model.set_token_reduction(TokenMigration((1,), (0.86,)), TokenGathering(4, 2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            images = _images((7, 8), seed=seed)
            torch.testing.assert_close(compiled(images), model(images))
    exported = torch.export.export(model, (_images((7, 8)),))
    torch.testing.assert_close(exported.module()(images), model(images))
    torch._dynamo.reset()


def test_a_configuration_refuses_layers_the_model_does_not_have():
    with pytest.raises(ConfigError, match=r"model.migration.layers = \(9,\): 9 must lie in 0 to 5"):
        ModelConfig(depths=(1, 1, 6), migration=TokenMigration((9,), (0.5,)))
