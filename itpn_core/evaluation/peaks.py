"""What devices can compute at most, for utilisation figures."""

from __future__ import annotations

import re

# Dense peak of matrix products with 16-bit inputs in TFLOP/s, from NVIDIA's data sheets (their larger figures are for
# structured sparsity). Words of the device's name as the driver gives it; the longest entry that fits wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "4090": 165.2,
    "3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def listed_peak(device_name: str) -> float:
    """Peak in TFLOP/s of a device by the name its driver gives, such as "NVIDIA H100 PCIe"; 0 = not listed."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split())]
    return PEAK_TFLOPS[max(known, key=len)] if known else 0.0
