"""Judging frozen features: k-NN, linear probe, feature health, confidence, cost."""

from itpn_core.evaluation.cost import Throughput, count_flops, throughput
from itpn_core.evaluation.features import feature_std, pca_colours, rankme
from itpn_core.evaluation.intervals import Estimate, accuracy, over_seeds, paired_difference
from itpn_core.evaluation.knn import knn_classify, raw_pixel_features
from itpn_core.evaluation.probe import ProbeResult, linear_probe

__all__ = [
    "Estimate",
    "ProbeResult",
    "Throughput",
    "accuracy",
    "count_flops",
    "feature_std",
    "knn_classify",
    "linear_probe",
    "over_seeds",
    "paired_difference",
    "pca_colours",
    "rankme",
    "raw_pixel_features",
    "throughput",
]
