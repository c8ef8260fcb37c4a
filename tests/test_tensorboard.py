"""Both scripts draw the same TensorBoard charts, with the values of trainer_state.json."""

import pytest
from conftest import flags, read_json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm")}
TAGS |= {f"eval/{name}" for name in ("loss", "accuracy", "perplexity")}


def test_charts_hold_the_logged_values(script, text_files, model_folder, tmp_path):
    output = tmp_path / "output"
    arguments = flags(model_name_or_path=model_folder, output_dir=output, do_train=True, do_eval=True)
    arguments += flags(max_seq_length=16, line_by_line="false", max_steps=6, logging_steps=2, **text_files)
    arguments += flags(eval_strategy="steps", eval_steps=3)
    if script.__name__ == "run_mlm":
        arguments += flags(report_to="tensorboard", logging_dir=output / "logs")
    script.main(arguments)
    events = EventAccumulator(str(output / "logs")).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    history = read_json(output, "trainer_state.json")["log_history"]
    for tag in sorted(TAGS):
        chart, name = tag.split("/")
        key = f"eval_{name}" if chart == "eval" else name
        expected = [(entry["step"], entry[key]) for entry in history if key in entry]
        assert [step for step, _ in expected][:3] == ([3, 6, 6] if chart == "eval" else [2, 4, 6])[: len(expected)]
        # The Trainer opens a second file for the last evaluation; TensorBoard reads files in the order of their names.
        points = sorted(events.Scalars(tag), key=lambda point: point.wall_time)
        assert [point.step for point in points] == [step for step, _ in expected]
        assert [point.value for point in points] == pytest.approx([value for _, value in expected], rel=1e-6)
