#!/usr/bin/env bash
# Installs this checkout into a clean Debian 12, as the image does it, and ends by examining the result.
#   infra/image/install.sh cuda|cpu        as root; the checkout stays where it is, the environment goes to /opt/itpn-env
# cuda takes torch from the package index, whose wheels bring the CUDA libraries (the host lends the driver only). cpu takes
# it from the index that TORCH_CPU_INDEX names (PyTorch's own of CPU wheels, a tenth of the size), where it names one.
set -euo pipefail

variant="${1:-}"
case "$variant" in
  cuda | cpu) ;;
  *) echo "usage: $0 cuda|cpu (got '$variant')" >&2; exit 2 ;;
esac
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
environment=/opt/itpn-env
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Compilers and headers are what torch.compile and Triton build with; KubeRay's health probes call wget.
apt-get update
apt-get install --yes --no-install-recommends ca-certificates python3 python3-dev python3-venv gcc g++ wget
rm -rf /var/lib/apt/lists/*

python3 -m venv "$environment"
if [ "$variant" = cpu ] && [ -n "${TORCH_CPU_INDEX:-}" ]; then
  grep -E '^(torch|torchvision)==' "$checkout/constraints.txt" >/tmp/torch.txt
  PIP_INDEX_URL="$TORCH_CPU_INDEX" "$environment/bin/pip" install --requirement /tmp/torch.txt
elif [ "$variant" = cpu ]; then
  echo "TORCH_CPU_INDEX names no index of CPU wheels: torch comes with CUDA libraries, which take several GB and do no harm"
fi
"$environment/bin/pip" install --constraint "$checkout/constraints.txt" --editable "$checkout[dense,export,server]"

# A few made-up pictures are enough to try storage, loaders, groups of ranks, a kill and a resume.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cd "$checkout"
export PATH="$environment/bin:$PATH" ITPN_HOME="$scratch"
python - "$scratch/pictures" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
for label in range(4):
    folder = Path(sys.argv[1], f"class-{label}")
    folder.mkdir(parents=True)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
PYTHON
python jobs/make_shards.py "$scratch/pictures" "$scratch/shards" --shard-samples 16 --val-fraction 0.25
python jobs/doctor.py --recipe jobs/recipes/first_run.yaml data.source="$scratch/shards" run.storage="$scratch/runs" \
  track.follow=false eval.bank=32 eval.queries=16 eval.k=5 train.global_batch=16 doctor.worlds=[1,2]
