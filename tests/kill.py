"""Kill a training run again and again: each next start must resume by itself and the end must be the same.

    python tests/kill.py [--script run_mlm_flax] [--kills 20]

Trains a tiny model that writes a checkpoint after every step, ends the process with SIGKILL at random moments, starts
it again, and compares the final weights with those of a run that was never killed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT, SCRIPTS, flags, make_model, sentences, write_lines
from safetensors.numpy import load_file


def command(script, folder, output, steps):
    """Return the command line of the run: `steps` steps, a checkpoint after each."""
    arguments = flags(
        model_name_or_path=folder / "model",
        train_file=folder / "train.txt",
        cache_dir=folder / "cache",
        output_dir=output,
        do_train=True,
        max_seq_length=16,
        train_batch_size=4,
        max_steps=steps,
        logging_steps=1,
        save_steps=1,
        save_total_limit=2,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
    )
    return [sys.executable, str(ROOT / f"{script}.py"), *arguments]


def run_until(script, folder, output, steps, target, delay):
    """Start the run and kill it `delay` seconds after it reports step `target`; return the newest checkpoint's step.

    Checkpoints take most of the run's time, so that most moments are in the middle of writing one.
    """
    process = subprocess.Popen(
        command(script, folder, output, steps),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(folder),
    )
    seen, first = b"", newest_step(output)
    while first + seen.count(b"'grad_norm'") < target:
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            raise RuntimeError(f"the run ended before step {target}:\n{seen.decode(errors='replace')}")
        seen += part
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    process.kill()
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with status {process.returncode} before it was killed")
    return newest_step(output)


def newest_step(output):
    """Return the step of the newest complete checkpoint, 0 where there is none."""
    complete = []
    for path in output.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):
            complete.append(json.loads((path / "trainer_state.json").read_text())["global_step"])
    return max(complete, default=0)


def environment(folder):
    """Return the environment of the runs, which compile once."""
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"), "PYTHONUNBUFFERED": "1"}


def kill_at_random(script, folder, steps, kills, seed=0):
    """Return the newest checkpoint steps at each of `kills` kills; raises when a run fails or ends differently."""
    rng = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    targets = sorted(rng.sample(range(steps * 3 // 4), kills))
    moments = [run_until(script, folder, killed, steps, target, rng.uniform(0, 0.05)) for target in targets]
    for output in (whole, killed):
        subprocess.run(command(script, folder, output, steps), check=True, env=environment(folder), capture_output=True)
    final = [load_file(path / "model.safetensors") for path in (whole, killed)]
    different = [name for name in final[0] if final[0][name].tobytes() != final[1][name].tobytes()]
    if different or final[0].keys() != final[1].keys():
        raise RuntimeError(f"killed at steps {moments}, the final weights are different: {different}")
    return moments


def prepare(folder):
    """Write the model and the text that the runs need."""
    make_model(folder / "model", hidden_dropout_prob=0.1)
    write_lines(folder / "train.txt", sentences(200))


def main():
    """Run the chain for each script asked for and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, action="append", help="which script (default: both)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    for script in arguments.script or SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            moments = kill_at_random(script, Path(folder), arguments.steps, arguments.kills)
            print(f"{script}: killed {len(moments)} times, at steps {moments}; final weights equal", flush=True)


if __name__ == "__main__":
    main()
