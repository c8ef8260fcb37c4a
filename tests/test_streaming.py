"""A stream gives the samples that the cached data set gives, in an order that a resumed run continues."""

import copy
import gzip
import importlib
import itertools
import json
import os
import shutil
import signal

import numpy as np
import pandas
import pytest
from accelerate.data_loader import BatchSamplerShard
from conftest import (
    INSTALLED,
    flags,
    history,
    make_model,
    make_tokenizer,
    optional_module,
    read_json,
    run_script,
    sentences,
    set_up,
    weights,
    write_lines,
)
from test_data import batched_rows, plain_rows

import run_mlm

run_mlm_flax = optional_module("run_mlm_flax")

LENGTH = 16


@pytest.fixture(autouse=True)
def few_texts_at_a_time(monkeypatch):
    """Short streams that still have many tables of texts."""
    for name in INSTALLED:
        monkeypatch.setattr(importlib.import_module(name), "ENCODE_BATCH", 7)


@pytest.fixture
def tokenizer(tmp_path):
    """A tiny WordPiece tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    return make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def small_model(tmp_path):
    """A BERT folder of one layer."""
    return make_model(tmp_path / "model", num_hidden_layers=1)


@pytest.fixture
def files(tmp_path):
    """Three training files of unlike lengths, one of them packed, and a validation file."""
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.txt")]
    write_lines(names[0], [*sentences(41), "", " "])
    with gzip.open(names[1], "wt", encoding="utf-8") as file:
        file.write("\n".join(sentences(3, seed=1)))
    write_lines(names[2], sentences(60, seed=2))
    return ["--train_file", *names, "--validation_file", write_lines(tmp_path / "v.txt", sentences(5, seed=3))]


def tokenize(script, tokenizer, arguments, **settings):
    """Return what a run trains on."""
    needed = flags(model_name_or_path="some-model", output_dir="unused", do_train=True, max_steps=40, **settings)
    model_args, data_args, training_args = script.parse_args([*needed, *arguments])
    raw = script.load_raw_datasets(model_args, data_args)
    if "do_eval" in settings:
        raw = script.needed_splits(raw, data_args, training_args)
    return script.tokenize_datasets(raw, tokenizer, data_args, LENGTH, training_args)


def content(sample):
    """Return all of a sample as something that can be compared and sorted."""
    words = sample.get("continues_word", np.empty(0)).tolist()
    return sample["epoch"], sample["index"], sample["input_ids"].tolist(), words


def take(dataset, count, seed=42, first=0):
    """Return samples of a stream, from number `first` on."""
    return [content(sample) for sample in itertools.islice(dataset.samples(seed, first), count)]


def resumed_at(fresh, stopped, number):
    """Return a copy of a stream that goes on at the block of a sample, as a checkpoint of the stopped one tells it."""
    resumed = copy.deepcopy(fresh)
    stopped.forget_blocks_before(number)
    block = stopped.blocks[0]
    resumed.start(json.loads(json.dumps(block)))
    resumed.forget_blocks_before(number)
    assert resumed.blocks == [block]  # Also before it has read anything.
    return resumed


@pytest.mark.shared
@pytest.mark.parametrize("settings", [{"line_by_line": "true"}, {"line_by_line": "false", "whole_word_mask": True}])
def test_each_pass_has_the_rows_of_the_data_set(script, tokenizer, files, settings):
    rows = tokenize(script, tokenizer, files, **settings)["train"]
    for more in ({"shuffle_buffer_size": 10}, {"shuffle_buffer_size": 1000}):
        stream = tokenize(script, tokenizer, files, streaming=True, **settings, **more)["train"]
        samples = take(stream, 2 * len(rows))
        passes = samples[: len(rows)], samples[len(rows) :]
        for epoch, part in enumerate(passes):
            assert sorted(part) == [content(rows[script.SampleKey(i, epoch)]) for i in range(len(rows))]
        orders = [[index for _, index, *_ in part] for part in passes]
        assert len({tuple(order) for order in [*orders, range(len(rows))]}) == 3
        for order in orders:  # Whole blocks, one after the other.
            size = more["shuffle_buffer_size"]
            for first in range(0, len(rows), size):
                assert sorted(order[first : first + size]) == list(range(len(rows)))[first : first + size]


@pytest.mark.shared
def test_the_order_of_a_block_is_its_own_and_the_seeds(script, tokenizer, files):
    stream = tokenize(script, tokenizer, files, streaming=True, shuffle_buffer_size=10, line_by_line="true")["train"]
    one, other = (take(stream, 208, seed) for seed in (1, 2))
    assert sorted(one) == sorted(other)
    orders = {tuple(i % 10 for _, i, *_ in part[first : first + 10]) for part in (one, other) for first in (0, 10, 104)}
    assert len(orders) == 6


def pytorch_steps(trainer):
    """Return the batches of each optimizer step of the Trainer's loop as (input_ids, labels) rows."""
    accumulation = trainer.args.gradient_accumulation_steps
    trainer.data_collator.compact = False  # Labels of all positions.
    batches = [(batch["input_ids"].numpy(), batch["labels"].numpy()) for batch in trainer.get_train_dataloader()]
    steps = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [[pair for inputs, labels in step for pair in unpadded(inputs, labels)] for step in steps]


def flax_steps(run):
    """Return the same of the Flax loop."""
    steps = []
    for keys in run.plan.steps():
        batch = run.batch(run.train_dataset, keys, run.args.train_batch_size, run.args.gradient_accumulation_steps)
        steps.append(unpadded(*(batch[name].reshape(-1, batch[name].shape[-1]) for name in ("input_ids", "labels"))))
    return steps


def unpadded(inputs, labels):
    """Return (input_ids, labels) of each row as lists, without padding."""
    return [(row[row != 0].tolist(), label[row != 0].tolist()) for row, label in zip(inputs, labels)]


@pytest.mark.flax
@pytest.mark.parametrize("more", [["--line_by_line", "false"], ["--line_by_line", "true", "--group_by_length"]])
def test_both_scripts_stream_the_same_batches(small_model, files, tmp_path, more):
    arguments = flags(model_name_or_path=small_model, output_dir=tmp_path / "o", max_seq_length=LENGTH, seed=7)
    arguments += [*flags(streaming=True, max_steps=15, shuffle_buffer_size=30), *files, *more]
    splits = [(4, 2), (8, 1)]
    steps = []
    for rows, accumulation in splits:
        split = flags(train_batch_size=rows, gradient_accumulation_steps=accumulation)
        steps += [pytorch_steps(set_up(run_mlm, arguments + split))]
        steps += [flax_steps(set_up(run_mlm_flax, arguments + split))]
    assert len(steps[0]) == 15
    assert all(len(step) == 8 for step in steps[0])
    assert steps[0] == steps[1] == steps[2] == steps[3]


def test_each_process_takes_its_part_of_a_step(small_model, files, tmp_path):
    arguments = flags(model_name_or_path=small_model, output_dir=tmp_path / "o", max_seq_length=LENGTH)
    arguments += [*flags(streaming=True, max_steps=6, shuffle_buffer_size=30, train_batch_size=4), *files]
    trainer = set_up(run_mlm, arguments)
    trainer.plan.num_steps = 12  # As many samples as two processes see in 6 steps.
    batches = trainer.get_train_dataloader().batch_sampler
    shards = [BatchSamplerShard(batches, num_processes=2, process_index=i) for i in range(2)]
    parts = [[[content(sample) for sample in batch] for batch in shard] for shard in shards]
    assert [len(part) for part in parts] == [6, 6]
    assert {len(batch) for part in parts for batch in part} == {4}
    stream = tokenize(run_mlm, trainer.data_collator.tokenizer, files, streaming=True, shuffle_buffer_size=30)["train"]
    assert [sample for pair in zip(*parts) for batch in pair for sample in batch] == take(stream, 48)


@pytest.mark.long
def test_workers_share_the_samples(small_model, files, tmp_path):
    # A program of its own: workers are forked, which JAX threads of other tests in this process do not allow.
    outputs = {workers: tmp_path / str(workers) for workers in (0, 2)}
    for workers, output in outputs.items():
        changes = {"dataloader_num_workers": workers, "max_steps": 5, "save_strategy": "no", "do_eval": "false"}
        done = run_script("run_mlm", stream_flags(small_model, files, output, **changes))
        assert done.returncode == 0, done.stderr
    assert history(outputs[2]) == history(outputs[0])


@pytest.mark.shared
@pytest.mark.parametrize("settings", [{"line_by_line": "true"}, {"line_by_line": "false", "whole_word_mask": True}])
def test_a_saved_state_continues_at_any_sample(script, tokenizer, files, tmp_path, settings):
    for size, limit in ((9, 40), (25, None)):
        more = {**settings, "shuffle_buffer_size": size}
        more |= {} if limit is None else {"max_train_samples": limit}
        fresh = tokenize(script, tokenizer, files, streaming=True, train_batch_size=1, **more)["train"]
        whole = take(copy.deepcopy(fresh), 150)
        for step in range(0, 150, 23):
            stopped = copy.deepcopy(fresh)
            take(stopped, min(150, step + 5))  # Batches are fetched ahead.
            assert take(resumed_at(fresh, stopped, step), 150 - step, first=step) == whole[step:]


@pytest.mark.shared
def test_a_stream_remembers_only_the_blocks_that_a_checkpoint_can_need(script, tokenizer, files):
    settings = {"streaming": True, "line_by_line": "true", "shuffle_buffer_size": 2, "train_batch_size": 1}
    stream = tokenize(script, tokenizer, files, **settings)["train"]
    for number, _ in enumerate(itertools.islice(stream.samples(42, 0), 300)):
        stream.forget_blocks_before(number)
        assert len(stream.blocks) <= 2


def test_a_run_remembers_only_the_blocks_that_it_needs(script, small_model, files, tmp_path, monkeypatch):
    streams, init = [], script.StreamedDataset.__init__

    def note(stream, *args, **kwargs):
        streams.append(stream)
        init(stream, *args, **kwargs)

    monkeypatch.setattr(script.StreamedDataset, "__init__", note)
    changes = {"save_strategy": "no", "do_eval": "false", "line_by_line": "true", "shuffle_buffer_size": 2}
    script.main(stream_flags(small_model, files, tmp_path / "output", **changes))
    # 96 samples in 48 blocks, of which some steps are read ahead.
    assert streams[0].blocks[0]["first"] >= 94 and len(streams[0].blocks) < 20


@pytest.mark.shared
def test_a_resume_tokenizes_only_from_its_block_on(script, tokenizer, files, tmp_path, monkeypatch):
    texts = []
    encode = script.encode_texts

    def watched(items, **settings):
        items = list(items)
        texts.extend(text for (text,) in items)
        return encode(items, **settings)

    monkeypatch.setattr(script, "encode_texts", watched)
    settings = {"streaming": True, "line_by_line": "true", "shuffle_buffer_size": 20, "train_batch_size": 1}
    stream = tokenize(script, tokenizer, files, **settings)["train"]
    take(stream, 70)
    resumed = resumed_at(tokenize(script, tokenizer, files, **settings)["train"], stream, 65)
    texts.clear()
    take(resumed, 1, first=65)
    assert len(texts) < 20 + 2 * script.ENCODE_BATCH
    assert not set(texts) & set(sentences(41))


def stream_flags(small_model, files, output, **changes):
    """Return the command line of a streamed run of 12 steps in several passes."""
    settings = {"model_name_or_path": small_model, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_seq_length": LENGTH, "max_steps": 12, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings |= {"train_batch_size": 4, "gradient_accumulation_steps": 2, "dropout_rate": 0.1, "streaming": True}
    settings |= {"logging_steps": 1, "save_steps": 3, "shuffle_buffer_size": 20, "max_train_samples": 50}
    return [*flags(**{**settings, **changes}), *files]


@pytest.mark.parametrize(
    "changes",
    [
        {"line_by_line": "false", "whole_word_mask": True},
        {"line_by_line": "true", "group_by_length": True, "eval_strategy": "steps", "eval_steps": 6},
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(script, small_model, files, tmp_path, changes):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    script.main(stream_flags(small_model, files, whole, **changes))
    entries = read_json(whole, "trainer_state.json")["log_history"]
    assert [entry["epoch"] for entry in entries if "loss" in entry] == pytest.approx([i / 12 for i in range(1, 13)])
    shutil.copytree(whole / "checkpoint-9", resumed / "checkpoint-9")
    script.main(stream_flags(small_model, files, resumed, **changes))
    assert history(resumed) == history(whole)
    assert weights(resumed) == weights(whole)


def test_a_stream_may_become_shorter(script, small_model, files, tmp_path, caplog):
    script.main(stream_flags(small_model, files, tmp_path / "output", max_steps=5))
    script.main(stream_flags(small_model, files, tmp_path / "output", max_steps=7, max_train_samples=10))
    (line,) = [record.getMessage() for record in caplog.records if "(now" in record.getMessage()]
    assert "max_train_samples 50 (now 10)" in line
    assert read_json(tmp_path / "output", "trainer_state.json")["global_step"] == 7


def test_another_batch_size_goes_on_behind_the_last_sample(script, small_model, files, tmp_path, monkeypatch):
    """Also where the order of a block depends on the batch size that began it."""
    mask, trained = script.MaskingCollator.mask, []

    def note(collator, sample):
        if sample.get("labelled", True) and "input_ids" in sample and sample.get("index") is not None:
            trained.append((sample["epoch"], sample["index"]))
        return mask(collator, sample)

    settings = {"line_by_line": "true", "group_by_length": True, "do_eval": "false", "gradient_accumulation_steps": 1}
    script.main(stream_flags(small_model, files, tmp_path / "whole", **settings, train_batch_size=8, save_steps=4))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    monkeypatch.setattr(script.MaskingCollator, "mask", note)
    script.main(stream_flags(small_model, files, tmp_path / "whole-again", **settings, train_batch_size=8))
    order = [place for place in trained if place[0] < 2**62]
    trained.clear()
    script.main(stream_flags(small_model, files, tmp_path / "resumed", **settings, train_batch_size=3))
    after = [place for place in trained if place[0] < 2**62]
    assert after == order[4 * 8 :][: 8 * 3] and len(after) == 8 * 3


def test_a_stopped_run_is_resumed(script, small_model, files, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script.main(stream_flags(small_model, files, whole, line_by_line="true"))
    masked, sent = script.MaskingCollator.mask, []

    def send_signal(self, sample):
        if sample.get("epoch") == 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return masked(self, sample)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(script.MaskingCollator, "mask", send_signal)
        script.main(stream_flags(small_model, files, stopped, line_by_line="true", save_strategy="no"))
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert 4 < int(checkpoint.name[11:]) < 9
    script.main(stream_flags(small_model, files, stopped, line_by_line="true"))
    assert weights(stopped) == weights(whole)


def test_the_tokenizer_is_saved_without_truncation(script, small_model, files, tmp_path):
    script.main(stream_flags(small_model, files, tmp_path / "o", line_by_line="true", max_steps=3))
    for folder in (tmp_path / "o", tmp_path / "o" / "checkpoint-3"):
        assert read_json(folder, "tokenizer.json")["truncation"] is None


@pytest.mark.shared
@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_validation_is_taken_from_the_beginning(script, tokenizer, tmp_path, caplog, line_by_line):
    caplog.set_level("INFO")
    lines = [line for i, line in enumerate(sentences(1500)) for line in ([line, "", " "] if i % 5 == 0 else [line])]
    given = ["--train_file", write_lines(tmp_path / "train.txt", lines)]
    settings = {"streaming": True, "line_by_line": line_by_line, "shuffle_buffer_size": 10, "do_eval": True}
    rows = plain_rows(tokenizer, lines) if line_by_line == "true" else batched_rows(tokenizer, lines, 7)
    for limit in (None, 30):
        more = {} if limit is None else {"max_val_samples": limit}
        tokenized, wanted = tokenize(script, tokenizer, given, **settings, **more), limit or 1000
        validation = tokenized["validation"]
        assert [validation[i]["input_ids"].tolist() for i in range(len(validation))] == rows[:wanted]
        assert all(validation[i]["epoch"] == script.EVAL_EPOCH for i in range(len(validation)))
        assert f"The first {wanted:,} samples of the stream are for validation" in caplog.text
        rest, samples = rows[wanted:], sorted(take(tokenized["train"], 2 * (len(rows) - wanted)))
        assert [sample[:3] for sample in samples] == [(epoch, *item) for epoch in (0, 1) for item in enumerate(rest)]


@pytest.mark.shared
def test_given_validation_data_is_read_whole_or_as_asked(script, tokenizer, tmp_path, files):
    blank = ["--validation_file", write_lines(tmp_path / "blank.txt", ["", " ", *sentences(4), ""])]
    for more, count in (({}, 4), ({"max_val_samples": 2}, 2)):
        settings = {"streaming": True, "line_by_line": "true", **more}
        assert len(tokenize(script, tokenizer, [*files, *blank], **settings)["validation"]) == count


@pytest.mark.shared
def test_a_data_set_folder_is_streamed(script, tokenizer, tmp_path):
    lines = sentences(40)
    for split, part in (("train", lines), ("validation", lines[:3])):
        (tmp_path / "hub").mkdir(exist_ok=True)
        frame = pandas.DataFrame({"number": range(len(part)), "body": part})
        frame.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    settings = {"dataset_name": tmp_path / "hub", "text_column_name": "body", "line_by_line": "true"}
    tokenized = tokenize(script, tokenizer, [], streaming=True, **settings)
    texts = [tokenizer(line, truncation=True, max_length=LENGTH)["input_ids"] for line in lines]
    assert sorted(row for _, _, row, _ in take(tokenized["train"], 40)) == sorted(texts)
    assert len(tokenized["validation"]) == 3


def test_a_stream_without_a_sample_is_an_error(script, small_model, tmp_path, capsys):
    given = ["--train_file", write_lines(tmp_path / "empty.txt", ["", " "]), *flags(do_eval="false")]
    given += ["--validation_file", given[1]]
    for line_by_line in ("true", "false"):
        with pytest.raises(SystemExit, match="2"):
            script.main(stream_flags(small_model, given, tmp_path / "o", line_by_line=line_by_line))
        assert "no sample" in capsys.readouterr().err


@pytest.mark.shared
def test_text_that_breaks_off_in_the_stream_is_an_error(script, tokenizer, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "broken.jsonl"
    good.write_text("".join(f'{{"text": "{line}"}}\n' for line in sentences(20)))
    bad.write_text('{"text": "the baker ."}\n{"text": "the chi')
    for train, validation in ((bad, good), (good, bad)):  # Each after a file that is good.
        given = ["--train_file", str(good), str(train), "--validation_file", str(good), str(validation)]
        with pytest.raises(script.UserError, match=rf"^{bad}: line 2: Unterminated string"):
            take(tokenize(script, tokenizer, given, streaming=True, line_by_line="true")["train"], 21)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_train": True}, "--max_steps"),
        ({"do_eval": True, "validation_file": "v", "validation_ref_file": "r"}, "reference files"),
        ({"do_eval": True, "shuffle_buffer_size": 0}, "--shuffle_buffer_size 0"),
    ],
)
def test_what_does_not_go_with_a_stream_is_refused(script, settings, message):
    needed = {"model_name_or_path": "m", "output_dir": "o", "train_file": "t.txt", "line_by_line": "true"}
    with pytest.raises(script.UserError, match=message):
        script.parse_args(flags(**{**needed, "streaming": True, **settings}))


def test_a_resume_that_holds_out_other_samples_is_warned_of(script, small_model, tmp_path, caplog):
    files = ["--train_file", write_lines(tmp_path / "train.txt", sentences(80))]
    settings = {"line_by_line": "true", "max_val_samples": 5, "max_steps": 3}
    script.main(stream_flags(small_model, files, tmp_path / "output", **settings))
    assert "(now" not in caplog.text
    settings |= {"do_eval": "false", "max_steps": 4}
    script.main(stream_flags(small_model, files, tmp_path / "output", **settings))
    (line,) = [record.getMessage() for record in caplog.records if "(now" in record.getMessage()]
    assert "held_out_samples 5 (now 0)" in line
