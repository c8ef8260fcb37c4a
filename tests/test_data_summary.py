"""What the log says before training: texts, samples, tokens, parameters, steps, batch, learning rate."""

import re

import pytest
from conftest import flags, make_model, sentences, write_lines
from safetensors.numpy import load_file

LENGTH = 16


@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_the_summary_is_true(script, tmp_path, caplog, line_by_line):
    lines = [*sentences(90), "", "the § dog § sees .", " "]
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model_name_or_path": model, "output_dir": tmp_path / "o", "max_seq_length": LENGTH}
    settings |= {"train_file": write_lines(tmp_path / "t.txt", lines), "do_train": True, "max_steps": 2}
    settings |= {"train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 3e-4}
    script.main(flags(**settings, lr_scheduler_type="constant", line_by_line=line_by_line))
    tokenizer = script.load_tokenizer(script.ModelArguments(model_name_or_path=model))
    limit = {"truncation": True, "max_length": LENGTH} if line_by_line == "true" else {}
    rows = [tokenizer(line, **limit)["input_ids"] for line in lines if line.strip() or line_by_line == "false"]
    joined = [token for row in rows for token in row]
    first = round(len(lines) * 0.05)  # The validation split; none of its lines is blank.
    rows, joined = rows[first:], joined[sum(map(len, rows[:first])) :]
    samples = len(rows) if line_by_line == "true" else len(joined) // LENGTH
    tokens = len(joined) if line_by_line == "true" else samples * LENGTH
    unknown = sum(token == tokenizer.unk_token_id for token in joined[:tokens]) / tokens
    expected = f"train: {len(lines) - first} texts, {samples} samples, {tokens:,} tokens ({unknown:.2%} unknown)"
    assert expected in caplog.text
    parameters = sum(value.size for value in load_file(tmp_path / "o" / "model.safetensors").values())
    assert f"training: {parameters:,} parameters, 2 steps, peak learning rate 0.0003" in caplog.text
    assert re.search(r"batch: 6 samples per step \(3 x 2 accumulated x 1 devices\)", caplog.text)
