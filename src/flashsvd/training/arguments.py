"""The Trainer's arguments for a config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashsvd.errors import ConfigError
from flashsvd.finetune_config import FinetuneConfig

_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# Points of the loss curve.
POINTS = 200


def training_arguments(
    config: FinetuneConfig, directory: Path, on_cpu: bool, metric: str | None, greater_is_better: bool
) -> Any:
    """Arguments that train as the config says; making them starts torch's process group, where there are several.

    Args:
        directory: for checkpoints.
        metric: the one that the best weights are chosen by; None where nothing is evaluated.

    Raises:
        ConfigError: this machine cannot train so.
    """
    from transformers import TrainingArguments

    evaluation = "no" if metric is None else "steps" if config.eval_steps else "epoch"
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[config.scheduler],
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        "bf16": config.bf16,
        "eval_strategy": evaluation,
        "eval_steps": config.eval_steps,
        # The Trainer keeps the best weights only where it saves them as often as it evaluates.
        "save_strategy": "steps" if evaluation == "steps" else "epoch",
        "save_steps": config.eval_steps or config.save_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": metric is not None,
        "metric_for_best_model": metric,
        "greater_is_better": greater_is_better,
        "logging_strategy": "steps",
        "logging_steps": 1 / POINTS,
        # What is not finite shall show.
        "logging_nan_inf_filter": False,
        # A sentence encoder's own pooling leaves the model's pooler aside; every other mode uses all there is.
        "ddp_find_unused_parameters": config.mode == "similarity",
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,
        "seed": config.seed,
        "report_to": "none",
        "disable_tqdm": False,
        "log_level_replica": "error",
    }
    for launcher in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{launcher}", "false").lower() in ("1", "true"):
            raise ConfigError(f"{launcher} shards a model, which is not supported; start plain processes with torchrun")
    try:
        arguments = TrainingArguments(**options)
        arguments.device  # noqa: B018 - sets up the devices
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot train so here: {' '.join(str(error).split())}") from error
    # One process trains on one GPU: several belong to several processes, not to nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
