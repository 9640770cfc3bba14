"""Detection and segmentation on the pre-trained pyramid (extra `dense`): one process, any image size."""
