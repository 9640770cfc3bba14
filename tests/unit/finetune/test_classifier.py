"""The classification task: depths for layer-wise rates, starting weights, drop-path by sample, the report."""

import csv
import io

import pytest
import torch

from itpn_core.finetuning.config import FinetuneTaskConfig
from itpn_core.finetuning.depth import parameter_depths
from itpn_core.finetuning.task import ClassifyTask
from itpn_core.models import Backbone, ModelConfig
from itpn_core.random import stream_keys
from itpn_core.task import Examples
from orchestrator.evaluate.classify import class_csv, class_markdown, class_rows
from orchestrator.track.confusion import confusion_figure
from orchestrator.train.config import OptimizerConfig
from orchestrator.train.optimizer import parameter_groups, set_lr

CONFIG = ModelConfig(embed_dim=32, num_heads=2, depths=(2, 1, 3), patch_size=8, img_size=16, drop_path_rate=0.3)


def task(**settings):
    torch.manual_seed(0)
    return ClassifyTask(CONFIG, FinetuneTaskConfig(**settings), 4)


def examples(count=6, own=slice(None)):
    ids = torch.arange(count)
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(count, dtype=torch.bool)
    return Examples(images, ids % 4, valid, stream_keys(0, 0, ids, "objective"), own)


def test_depth_rises_from_the_stem_to_the_head():
    depths = parameter_depths(Backbone(CONFIG, num_classes=4, final_norm="pooled"))
    blocks = sum(CONFIG.depths)
    assert depths["patch_embed.proj.weight"] == depths["pos_embed"] == 0
    # two blocks, a merge that goes with the second, a block with its merge, three blocks
    found = [depths[next(n for n in depths if n.startswith(f"blocks.{i}."))] for i in range(blocks + 2)]
    assert found == [1, 2, 2, 3, 3, 4, 5, 6]
    assert depths["head.weight"] == max(depths.values())
    assert depths["fc_norm.weight"] >= blocks


@pytest.mark.parametrize("family", ["fast", "itpn_clip", "itpn_pixel"])
def test_every_parameter_has_a_depth_and_a_rate(family):
    config = ModelConfig(family=family, embed_dim=32, num_heads=2, depths=(1, 1, 2), patch_size=8, img_size=16)
    model = Backbone(config, num_classes=4, final_norm="pooled")
    depths = parameter_depths(model)
    assert depths.keys() == dict(model.named_parameters()).keys()
    top = max(depths.values())
    settings = OptimizerConfig(layer_decay=0.5)
    groups = parameter_groups(model.named_parameters(), settings, 1.0, depths.__getitem__, top)
    optimizer = torch.optim.AdamW(groups)
    set_lr(optimizer, 2.0)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates.keys() == depths.keys()
    assert all(rates[name] == pytest.approx(2.0 * 0.5 ** (top - depth)) for name, depth in depths.items())
    assert rates["head.weight"] == 2.0


def test_head_starts_small_and_the_first_loss_is_that_of_guessing():
    model = task(head_scale=0.001, mixup=0.0, cutmix=0.0)
    assert float(model.student.head.weight.detach().abs().max()) < 1e-3
    images, targets = model.prepare(examples())
    loss = model(images, targets, examples().keys).loss_B.detach()
    assert loss.tolist() == pytest.approx([float(torch.tensor(4.0).log())] * 6, abs=1e-3)


def test_only_the_own_part_is_returned_and_equals_the_whole():
    model = task()
    whole_images, whole_targets = model.prepare(examples())
    given = examples()
    part = Examples(given.images[2:6], given.labels[2:6], given.valid[2:6], given.keys[2:6], slice(1, 3))
    images, targets = model.prepare(part)
    assert torch.equal(images, whole_images[3:5])
    assert torch.equal(targets, whole_targets[3:5])
    assert model.paired
    assert not task(mixup=0.0, cutmix=0.0).paired


def test_drop_path_belongs_to_the_sample():
    model = task(head_scale=1.0).train()
    images, targets = model.prepare(examples())
    keys = examples().keys
    whole = model(images, targets, keys).loss_B.detach()
    assert model(images[3:], targets[3:], keys[3:]).loss_B.detach().tolist() == pytest.approx(
        whole[3:].tolist(), rel=1e-5
    )
    other = model(images, targets, stream_keys(0, 1, torch.arange(6), "objective")).loss_B.detach()
    assert not torch.allclose(other, whole, rtol=1e-3)


def test_report_names_what_is_confused(tmp_path):
    confusion = torch.tensor([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    rows = class_rows(confusion, ["cat", "dog", "none"])
    assert (rows[0].top1, rows[0].taken_for, rows[0].taken) == (0.8, "dog", 2)
    assert rows[1].precision == pytest.approx(9 / 11)
    assert rows[2].images == 0
    table = list(csv.DictReader(io.StringIO(class_csv(rows))))
    assert [r["class"] for r in table] == ["cat", "dog", "none"]
    assert table[1]["most_often_taken_for"] == "cat"
    assert class_markdown(rows, 7).splitlines()[4].startswith("| cat | 10 | 80.0 %")
    path = tmp_path / "figures" / "c.png"
    confusion_figure(path, confusion, ["cat", "dog", "none"], step=7)
    assert path.read_bytes().startswith(b"\x89PNG")
