"""Words for reviewers: what MLflow shows on top of a run and beside registered weights. Markdown, made from facts."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.track.redact import flatten


def run_description(
    *, purpose: str, recipe: str, model: str, objective: str, data: str, length: str, run_directory: str
) -> str:
    """The description of a run.

    Args:
        purpose: the user's own sentence; "" leaves the line out.
        recipe: recipe name.
        model: for example "fast_itpn width 192, depths 1-1-6, 64 px, patch 16, 4.3 M parameters".
        objective: what is predicted, by whom, from how much.
        data: train and validation data with counts.
        length: epochs, steps and global batch.
        run_directory: where checkpoints and journal are.
    """
    rows = [
        ("Recipe", f"`{recipe}`"),
        ("Model", model),
        ("Objective", objective),
        ("Data", data),
        ("Length", length),
        ("Checkpoints and journal", f"`{run_directory}`"),
    ]
    table = "\n".join(f"| **{name}** | {value} |" for name, value in rows)
    head = f"{purpose.strip()}\n\n" if purpose.strip() else ""
    return (
        f"{head}| | |\n|---|---|\n{table}\n\n"
        "Curves: `train/loss` and its parts, `eval/` on held-out images. Pictures: artifact `figures/`. "
        "Story in one file: artifact `report.html`. Resume: type the same command again."
    )


def model_card(*, name: str, model: Mapping[str, object], data: str, metrics: Mapping[str, float], run_uid: str) -> str:
    """The model card of registered weights: what it is, how good it is, how it is used, what it is not.

    Args:
        name: run name.
        model: the `ModelConfig` as a dictionary.
        data: training data in words.
        metrics: last evaluation.
        run_uid: identity of the run that made them.
    """
    facts = "\n".join(f"| {key} | {value} |" for key, value in flatten(model).items())
    figures = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items()) or "| none | |"
    side = model.get("img_size", "?")
    return (
        f"# Backbone of {name}\n\nPre-trained by masked feature modeling (iTPN), without labels, on {data}. "
        f"Run `{run_uid}`.\n\n## Use\n\n```python\nimport mlflow\nmodel = mlflow.pyfunc.load_model(MODEL_URI)\n"
        "features = model.predict(images)  # uint8 [B, H, W, 3] -> float32 [B, E]\n```\n\n"
        f"Images of any size are resized to {side} x {side}. The features are the mean of the final tokens; "
        "compare them by cosine.\n\n"
        f"## Evaluation\n\n| metric | value |\n|---|---|\n{figures}\n\n"
        f"## Shape\n\n| setting | value |\n|---|---|\n{facts}\n\n"
        "## Limits\n\nFeatures, not a classifier. Images unlike the training data were not evaluated; "
        "the data's biases are the model's.\n"
    )
