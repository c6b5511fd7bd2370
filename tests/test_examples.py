"""What the README tells a reader to run, run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchstage._adult import NUMBERS, TEXTS, Adult
from torchstage._demo import run_demo

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["smart_stage_auto.py", "smart_stage_manual.py"])
def test_the_documentations_examples_print_five_steps(name: str) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    assert done.stdout.count("grad_fn=<EmbeddingBackward0>") == 5
    assert done.stdout.count("'xxx'") == 5
    assert "string_to_hash_bucket" in done.stdout.split("values that cross to the step: ")[1].splitlines()[0]


def test_the_demo_trains_on_real_rows_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    report = run_demo(epochs=2, batch_size=256, rows=2000)
    assert "2,000 rows, 16 steps each" in report
    assert "losses bit-equal          yes, all 16 steps" in report
    assert "outputs bit-equal         yes" in report
    assert "parameters bit-equal      yes" in report
    assert "16 batches, 16 staged steps" in report
    assert "string_to_hash_bucket x8" in report


def test_the_data_set_is_whole() -> None:
    data = Adult()
    assert len(data) == 48_842
    (numbers, texts), label = data[[0, 48_841]]
    assert numbers.shape == (2, len(NUMBERS))
    assert numbers[0].tolist() == [25, 226802, 7, 0, 0, 40]
    assert [len(column) for column in texts] == [2] * len(TEXTS)
    assert texts[0].tolist() == [b"Private", b"Self-emp-inc"]
    assert label.tolist() == [0, 1]
    assert int(data.label.sum()) == 11_687
