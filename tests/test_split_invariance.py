"""The losses of a run do not depend on how a step's batch is split over accumulation, devices and processes."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, flags, read_json, run_script

STEPS = 6


def arguments(model_folder, text_files, output, batch, accumulation):
    """Return the command line of a run without dropout on lines of all lengths, so that label counts differ a lot."""
    return flags(
        model_name_or_path=model_folder,
        output_dir=output,
        cache_dir=output.parent / "cache",
        do_train=True,
        line_by_line="true",
        max_seq_length=16,
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        dropout_rate=0,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        logging_steps=1,
        dataloader_drop_last="true",
        save_strategy="no",
        **text_files,
    )


def losses(output):
    """Return the training loss of every step."""
    logged = [entry["loss"] for entry in read_json(output, "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(logged) == STEPS
    return logged


@pytest.fixture
def whole(script, model_folder, text_files, tmp_path):
    """The losses of 16 samples a step in one piece."""
    script.main(arguments(model_folder, text_files, tmp_path / "whole", 16, 1))
    return losses(tmp_path / "whole")


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 2), (4, 4)])
def test_accumulation(script, whole, model_folder, text_files, tmp_path, batch, accumulation):
    script.main(arguments(model_folder, text_files, tmp_path / "split", batch, accumulation))
    assert losses(tmp_path / "split") == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("script", ["run_mlm_flax"], indirect=True)
@pytest.mark.parametrize(("devices", "batch", "accumulation"), [(2, 8, 1), (4, 2, 2)])
def test_devices(whole, model_folder, text_files, tmp_path, devices, batch, accumulation):
    run = run_script(
        "run_mlm_flax",
        arguments(model_folder, text_files, tmp_path / "split", batch, accumulation),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    assert run.returncode == 0, run.stderr
    assert f"{batch} x {accumulation} accumulated x {devices} devices" in run.stdout
    assert losses(tmp_path / "split") == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("script", ["run_mlm"], indirect=True)
@pytest.mark.parametrize(("batch", "accumulation", "dense_head"), [(8, 1, "true"), (4, 2, "false")])
def test_processes(whole, model_folder, text_files, tmp_path, batch, accumulation, dense_head):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "run_mlm.py"), "--use_cpu", "--ddp_backend", "gloo"]
    command += arguments(model_folder, text_files, tmp_path / "split", batch, accumulation)
    command += ["--dense_head", dense_head]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path / "split") == pytest.approx(whole, rel=1e-5)
