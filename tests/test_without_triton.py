"""Where triton is not installed, everything imports and runs in plain torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil, torch
import flashsvd.kernels
for module in pkgutil.iter_modules(flashsvd.kernels.__path__):
    importlib.import_module(f"flashsvd.kernels.{module.name}")
from transformers import BertConfig, BertModel
import flashsvd
from flashsvd.errors import BackendError
config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
model = BertModel(config).eval()
x = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    before = model(x).last_hidden_state
    try:
        flashsvd.optimize(model, backend="triton")
    except BackendError as error:
        print(error)
    after = flashsvd.optimize(model)(x).last_hidden_state
torch.testing.assert_close(after, before)
print("ok")
"""


@pytest.mark.slow
def test_without_triton_models_are_optimised_in_plain_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, ok = done.stdout.strip().splitlines()
    assert "triton 3.4 or later is not installed" in refusal
    assert ok == "ok"
