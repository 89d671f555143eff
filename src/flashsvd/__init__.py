"""flashsvd: compress Hugging Face transformers with SVD methods and run the result.

Names are imported when they are first used. Importing this package also makes transformers able to load compressed
checkpoints with plain `AutoModelFor....from_pretrained(directory)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flashsvd._version import __version__
from flashsvd.integrations import hook

if TYPE_CHECKING:
    from flashsvd import runtime
    from flashsvd.compress import CompressConfig, plan_compress, run_compress
    from flashsvd.compression.plan import CompressPlan
    from flashsvd.compression.result import CompressReport
    from flashsvd.errors import FlashSVDError
    from flashsvd.evaluate import EvalConfig, run_eval
    from flashsvd.evaluation.result import EvalResult
    from flashsvd.finetune import FinetuneConfig, run_finetune
    from flashsvd.info import read_info, show_checkpoint_info
    from flashsvd.io import export_dense, load_compressed, round_factors, save_compressed
    from flashsvd.profile import ProfileConfig, run_profile
    from flashsvd.profiling.result import ProfileResult
    from flashsvd.runtime import optimize
    from flashsvd.training.result import FinetuneResult

_MODULES = ("runtime",)
_HOMES = {
    "CompressConfig": "flashsvd.compress",
    "CompressPlan": "flashsvd.compression.plan",
    "CompressReport": "flashsvd.compression.result",
    "EvalConfig": "flashsvd.evaluate",
    "EvalResult": "flashsvd.evaluation.result",
    "FinetuneConfig": "flashsvd.finetune",
    "FinetuneResult": "flashsvd.training.result",
    "FlashSVDError": "flashsvd.errors",
    "ProfileConfig": "flashsvd.profile",
    "ProfileResult": "flashsvd.profiling.result",
    "export_dense": "flashsvd.io",
    "load_compressed": "flashsvd.io",
    "optimize": "flashsvd.runtime",
    "plan_compress": "flashsvd.compress",
    "read_info": "flashsvd.info",
    "round_factors": "flashsvd.io",
    "run_compress": "flashsvd.compress",
    "run_eval": "flashsvd.evaluate",
    "run_finetune": "flashsvd.finetune",
    "run_profile": "flashsvd.profile",
    "save_compressed": "flashsvd.io",
    "show_checkpoint_info": "flashsvd.info",
}

__all__ = [
    "CompressConfig",
    "CompressPlan",
    "CompressReport",
    "EvalConfig",
    "EvalResult",
    "FinetuneConfig",
    "FinetuneResult",
    "FlashSVDError",
    "ProfileConfig",
    "ProfileResult",
    "__version__",
    "export_dense",
    "load_compressed",
    "optimize",
    "plan_compress",
    "read_info",
    "round_factors",
    "run_compress",
    "run_eval",
    "run_finetune",
    "run_profile",
    "runtime",
    "save_compressed",
    "show_checkpoint_info",
]

hook.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"flashsvd.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'flashsvd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
