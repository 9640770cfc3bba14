"""The model card of an exported folder (Hugging Face layout)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.export.formats import Subject

_HEAD = """---
library_name: timm
pipeline_tag: {task}
tags:
- {task}
- timm
- itpn
---
"""


def model_card(subject: Subject) -> str:
    """README.md of the folder: what the model is, where its weights come from, how to use them."""
    model, source, (height, width) = subject.model, subject.source, subject.size
    config = model.config
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    parameters = sum(value.numel() for value in model.parameters())
    depths = "-".join(map(str, config.depths))
    kind = {"fast": "Fast-iTPN", "itpn_clip": "iTPN, CLIP flavour", "itpn_pixel": "iTPN, pixel flavour"}[config.family]
    facts = [
        ("architecture", f"{kind}: width {config.embed_dim}, depths {depths}, {config.heads} heads"),
        ("parameters", f"{parameters:,}"),
        ("input", f"RGB, {height} x {width} (any multiple of {config.patch_size} works), bicubic"),
        ("normalisation", f"mean {list(source.mean)}, std {list(source.std)}"),
        ("classifier", f"{model.num_classes} outputs" if model.num_classes else "none"),
        ("feature pyramid", f"{model.pyramid_dim} wide" if model.pyramid_dim else "none"),
        ("token migration", _migration(subject)),
        ("token gathering", _gathering(subject)),
        *source.facts.items(),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""{_HEAD.format(task=task)}
# {kind}, {parameters / 1e6:.1f}M parameters

A hierarchical vision transformer after arXiv 2211.12735, written by `jobs/export.py`. Its outputs were compared with
the original model's in a fresh process before this folder was kept.

| | |
|---|---|
{rows}

## Use

```python
import itpn_core  # registers the architecture with timm
import timm

model = timm.create_model("local-dir:PATH-OF-THIS-FOLDER", pretrained=True).eval()
out = model(images)  # float [B, {config.in_chans}, H, W], normalised as above -> {_output(subject)}
maps = model.forward_intermediates(images, intermediates_only=True)  # four maps, finest first
```

No network is needed. What the weights were trained on decides what they may be used for; nothing was evaluated here.
"""


def _output(subject: Subject) -> str:
    model = subject.model
    return f"logits [B, {model.num_classes}]" if model.num_classes else f"features [B, {model.num_features}]"


def _migration(subject: Subject) -> str:
    migration = subject.model.migration
    if not migration.active:
        return "off"
    return f"layers {list(migration.layers)}, keep {list(migration.keep)}, rule {migration.rule}"


def _gathering(subject: Subject) -> str:
    gathering = subject.model.gathering
    return f"window {gathering.window}, {gathering.tokens} tokens" if gathering.active else "off"
