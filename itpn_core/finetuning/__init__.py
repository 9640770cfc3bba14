"""Supervised classification from pre-trained weights: mixing of images and labels, layer-wise depths, the task."""
