"""Writes trained weights as files that run elsewhere; each is re-loaded in a fresh process and compared first.

    python jobs/export.py source=RUN_FOLDER dest=FOLDER

Formats: safetensors, official (.pt), timm (a folder for timm.create_model), pt2 (torch.export), onnx.
Exit code: 0 every format is there and equal, 1 one is not, 2 wrong settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Started by path, the rooms are imported from beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator.export.config import ExportConfig
from orchestrator.export.run import export
from orchestrator.launch.cli import run_job
from orchestrator.launch.home import absolute, object_store

if __name__ == "__main__":
    sys.exit(
        run_job(
            ExportConfig,
            __doc__ or "",
            "",
            lambda config, _: export(config, object_store()),
            lambda config: absolute(config, "dest"),
        )
    )
