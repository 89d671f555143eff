"""The transformers model inside of the objects that other libraries run it by."""

from __future__ import annotations

from typing import Any

from torch import nn

from flashsvd.errors import BackendError


def model_inside(given: Any) -> Any:
    """The one transformers model that an object runs: itself, or that of a SentenceTransformer or a pipeline.

    Args:
        given: a PreTrainedModel, a model of sentence-transformers such as a CrossEncoder, or what is no module and has
            a PreTrainedModel as its `model`, as pipelines of transformers do.

    Raises:
        BackendError: it is none of these, or runs several models or one of another library.
    """
    from transformers import PreTrainedModel

    if isinstance(given, PreTrainedModel):
        return given
    name = type(given).__name__
    if _is_of_sentence_transformers(given):
        found = _outermost(given, PreTrainedModel)
        if not found:
            raise BackendError(
                f"the {name} runs no model of transformers; load it with backend='torch', or run it as it is"
            )
        if len(found) > 1:
            raise BackendError(f"the {name} runs {len(found)} transformers models; give each of them to optimize")
        return found[0]
    # A module with a `model` is a wrapper, such as a compiled model, or a part of a model.
    if not isinstance(given, nn.Module) and isinstance(inside := getattr(given, "model", None), PreTrainedModel):
        return inside
    raise BackendError(
        f"optimize takes a transformers model, or a SentenceTransformer, CrossEncoder or pipeline with one, not a "
        f"{name}; give it what from_pretrained or load_compressed returned, before anything wraps it"
    )


def _is_of_sentence_transformers(given: Any) -> bool:
    """Asked of the names of its classes, so that the library need not be installed."""
    kinds = type(given).__mro__
    return nn.Module in kinds and any(kind.__module__.startswith("sentence_transformers.") for kind in kinds)


def _outermost(module: nn.Module, kind: type) -> list[nn.Module]:
    """The submodules of a class that lie in no other one of it, each once."""
    if isinstance(module, kind):
        return [module]
    found = [one for child in module.children() for one in _outermost(child, kind)]
    return list({id(one): one for one in found}.values())
