"""Runs in processes of their own: one that is killed, two that train together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_support import run_options, run_tiny, write_base
from safetensors.torch import load_file

from dmtd_models.finetune.options import LossOptions
from dmtd_models.finetune.states import latest_checkpoint

ROOT = Path(__file__).resolve().parents[3]
ENVIRON = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "runtime", "models", "tests")),
    "OMP_NUM_THREADS": "1",
}

# Killed while the optimiser's state of step 4 is being written: the weights lie there, complete.json does not.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from finetune_support import run_options, run_tiny
torch.set_num_threads(1)
save = torch.save
def killing(value, file, *rest, **more):
    if "checkpoint-4" in str(file):
        Path(file).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, file, *rest, **more)
torch.save = killing
run_tiny(Path(sys.argv[1]), Path(sys.argv[2]), run_options())
"""

# Clocks that disagree, and a Ctrl-C that reaches one of them.
TOGETHER = """
import os, signal, sys
from pathlib import Path
import torch
from dmtd_models.finetune import run
from dmtd_models.finetune.options import LossOptions
from finetune_support import interrupted_at, run_options, run_tiny
torch.set_num_threads(1)
run.matmul_peak = lambda dtype, device: 1e12
rank, stop_at = int(os.environ["RANK"]), int(sys.argv[4])
options = run_options(
    max_tokens=int(sys.argv[3]), loss=LossOptions(top_k=2, vocab_sample=0), save_every_s=1e9 if rank == 0 else 0.0
)
def stop():
    if rank == 1:
        signal.raise_signal(signal.SIGINT)
run_tiny(Path(sys.argv[1]), Path(sys.argv[2]), options, hooks=interrupted_at(stop_at, stop))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """In one process: ``test_run``, where a full disk ends the writing of a state, and half-written ones are passed over."""
    base = write_base(tmp_path / "base")
    command = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "killed")]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = tmp_path / "killed" / "checkpoint-4"
    assert (half / "model.safetensors").is_file() and not (half / "complete.json").exists()
    result = run_tiny(base, tmp_path / "killed", run_options())
    expected = run_tiny(base, tmp_path / "whole", run_options())
    assert result.steps == expected.steps
    for (name, one), (_, other) in zip(
        result.student.named_parameters(), expected.student.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_rows(tmp_path: Path) -> None:
    """Rows 2k and 2k + 1 of each step, their gradients averaged: float32 sums in another order, nothing else.

    With a Ctrl-C in one of them on the way, after which both go on from the state they saved together.
    """
    base, script = write_base(tmp_path / "base"), tmp_path / "script.py"
    script.write_text(TOGETHER)
    loss = LossOptions(top_k=2, vocab_sample=0)
    alone = run_tiny(base, tmp_path / "alone", run_options(max_tokens=900, accumulate=2, loss=loss))
    # What `accelerate launch` starts for several GPUs; for CPUs it knows MPI only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*launch, str(base), str(tmp_path / "two"), "900"]
    environ = {**ENVIRON, "ACCELERATE_USE_CPU": "true"}
    for stop_at, newest in ((4, 5), (0, alone.steps)):
        done = subprocess.run(
            [*command, str(stop_at)], env=environ, capture_output=True, text=True, timeout=1200, check=False
        )
        assert (done.returncode == 0) == (stop_at == 0), done.stderr[-3000:]
        assert latest_checkpoint(tmp_path / "two") == tmp_path / "two" / f"checkpoint-{newest}", done.stderr[-3000:]
    name = f"checkpoint-{alone.steps}"
    states = sorted(path.name for path in (tmp_path / "two" / name).glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"], "two processes, not one"
    one, other = (load_file(tmp_path / place / name / "model.safetensors") for place in ("alone", "two"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4, msg=key)
