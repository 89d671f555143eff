"""Run quickstart.ipynb in a fresh directory, and store in it what comes out.

make notebook        or, where `pip install flashsvd[dev]` was run:         python examples/run_notebook.py
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

import flashsvd

HERE = Path(__file__).parent
NOTEBOOK = HERE / "quickstart.ipynb"
TIMEOUT_S = 300


def execute(directory: Path) -> Any:
    """The notebook with its outputs, run in a directory that has nothing but its data.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    shutil.copytree(HERE / "data", directory / "data")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The flashsvd that is imported here, wherever the notebook runs; and no progress bars, which nobody watches.
    source = str(Path(flashsvd.__file__).parents[1])
    # One thread: several wait for one another, and for ever where something else runs too.
    environment = os.environ | {
        "PYTHONPATH": source,
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(directory)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        # When each cell ran would differ every time.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        nbformat.write(execute(Path(directory)), NOTEBOOK)


if __name__ == "__main__":
    main()
