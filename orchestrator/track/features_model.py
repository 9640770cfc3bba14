"""The registered model: images in, features out. MLflow stores this file with the weights and runs it when loading.

It needs mlflow, torch, timm, safetensors and the copy of `itpn_core` that is stored beside it; no Ray, none of our
other packages, no pickle.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file

from itpn_core.models import ModelConfig, build_backbone

_CHUNK = 64


def _with_tuples(value: Any) -> Any:
    """Settings as the config classes want them; the stored file turned tuples into lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(held) for key, held in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


class FeatureModel(PythonModel):  # type: ignore[misc]
    """Backbone features for batches of RGB images.

    Input: uint8 array [B, H, W, 3] of any size (resized to the training size, bicubic with antialiasing).
    Output: float32 [B, E], the average of the stride-p tokens after the final norm.
    """

    def load_context(self, context: Any) -> None:
        """Build the backbone and load its weights strictly."""
        settings = dict(context.model_config)
        self._config = ModelConfig(**_with_tuples(settings["model"]))
        self._mean = torch.tensor(settings["mean"]).view(1, -1, 1, 1)
        self._std = torch.tensor(settings["std"]).view(1, -1, 1, 1)
        self._model = build_backbone(self._config).eval()
        self._model.load_state_dict(load_file(context.artifacts["weights"]))

    def predict(
        self,
        context: Any,
        model_input: np.ndarray,  # MLflow knows the bare name, and warns about others
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Features [B, E] of images [B, H, W, 3]."""
        images = np.asarray(model_input)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype}{list(images.shape)}; expected uint8 [B, H, W, 3]")
        parts = [self._features(images[at : at + _CHUNK]) for at in range(0, len(images), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros((0, self._config.embed_dim), np.float32)

    @torch.inference_mode()
    def _features(self, images_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        x_B3HW = torch.from_numpy(np.ascontiguousarray(images_BHW3)).permute(0, 3, 1, 2).float() / 255
        side = self._config.img_size
        if x_B3HW.shape[-2:] != (side, side):
            x_B3HW = torch.nn.functional.interpolate(x_B3HW, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        tokens_BNE = self._model.forward_features((x_B3HW - self._mean) / self._std)
        features: npt.NDArray[np.float32] = tokens_BNE.mean(1).float().numpy()
        return features


mlflow.models.set_model(FeatureModel())
