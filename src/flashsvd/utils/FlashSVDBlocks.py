"""The fused blocks under the import path existing users know; `flashsvd.optimize` builds and installs them."""

from flashsvd.blocks.post_ln import PostLNBlock, PostLNWeights
from flashsvd.blocks.pre_ln import PreLNBlock, PreLNWeights

__all__ = ["PostLNBlock", "PostLNWeights", "PreLNBlock", "PreLNWeights"]
