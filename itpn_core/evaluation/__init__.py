"""k-NN, linear probe, RankMe, throughput and FLOPs."""
