"""Import paths that users of the published FlashSVD code know: `SVDBlocks` and `FlashSVDBlocks`."""
