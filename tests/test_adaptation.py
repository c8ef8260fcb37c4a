"""What adapts a model to a domain: new words, a share of masks that falls, a schedule whose end can be run again."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import (
    INSTALLED,
    flags,
    history,
    make_config,
    make_model,
    make_slow_tokenizer,
    make_unigram,
    optional_module,
    read_json,
    save_model,
    sentences,
    set_up,
    weights,
    write_lines,
)
from safetensors.numpy import load_file
from tokenizers import decoders, pre_tokenizers

run_mlm = optional_module("run_mlm")
run_mlm_flax = optional_module("run_mlm_flax")
LENGTH = 16
NEW = ["sunflower", "windmill"]


def make_folder(folder, kind, **changes):
    """Write a model of one layer with a tokenizer of a kind, and return the folder as a string."""
    if kind == "wordpiece":
        return make_model(folder, num_hidden_layers=1, **changes)
    if kind == "byte-level BPE":
        return make_model(folder, "roberta", num_hidden_layers=1, **changes)
    folder.mkdir()
    tokenizer = make_unigram(pre_tokenizers.Metaspace(), pre_tokenizers.Metaspace(), decoders.Metaspace())
    tokenizer.save_pretrained(folder)
    config = make_config("bert", tokenizer, num_hidden_layers=1, **changes)
    save_model(folder, config, seed=0)
    return str(folder)


def job(folder, tmp_path, **changes):
    """Return the command line of a run of two steps on text with new words."""
    lines = [f"the {NEW[i % 2]} near the old {NEW[i % 3 % 2]} sees {line}" for i, line in enumerate(sentences(40))]
    settings = {"model_name_or_path": folder, "output_dir": tmp_path / "output", "do_train": True, "max_steps": 2}
    settings |= {"train_file": write_lines(tmp_path / "train.txt", lines), "line_by_line": "true", "logging_steps": 1}
    settings |= {"validation_file": write_lines(tmp_path / "validation.txt", lines[:5]), "max_seq_length": LENGTH}
    settings |= {"new_tokens": write_lines(tmp_path / "new.txt", [NEW[0], "", "a", NEW[1], f" {NEW[0]} "])}
    settings |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "train_batch_size": 4, "dropout_rate": 0}
    return flags(**{name: value for name, value in (settings | changes).items() if value is not None})


def initial_weights(script, arguments):
    """Return the weights that a run would start from, under their PyTorch names."""
    run = set_up(script, arguments)
    if script.__name__ == "run_mlm":
        return {name: value.numpy() for name, value in run.model.state_dict().items()}
    return script.pytorch_weights(run.params, run.model.config)


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level BPE", "SentencePiece"])
def test_a_new_token_starts_as_the_mean_of_its_pieces(script, tmp_path, kind):
    folder = make_folder(tmp_path / "model", kind, tie_word_embeddings=False)
    before, tokenizer = load_file(f"{folder}/model.safetensors"), transformers.AutoTokenizer.from_pretrained(folder)
    after = initial_weights(script, job(folder, tmp_path))
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in NEW]
    assert all(len(ids) > 1 for ids in pieces)
    changed = {name for name, old in before.items() if len(after[name]) != len(old)}
    assert {name.split(".")[-1] for name in changed} == {"weight", "bias"} and len(changed) >= 3
    for name in changed:
        assert len(after[name]) == len(tokenizer) + 2
        np.testing.assert_array_equal(after[name][:-2], before[name])
        expected = [before[name][ids].mean(axis=0) for ids in pieces]
        np.testing.assert_allclose(after[name][-2:], expected, atol=1e-6)


def test_new_tokens_of_a_new_model(script, tmp_path):
    folder = make_folder(tmp_path / "model", "wordpiece")
    changes = {"model_name_or_path": None, "config_name": folder, "tokenizer_name": folder}
    rows = initial_weights(script, job(folder, tmp_path, **changes))["bert.embeddings.word_embeddings.weight"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, token in zip(rows[-2:], NEW):
        np.testing.assert_allclose(
            row, rows[tokenizer(token, add_special_tokens=False)["input_ids"]].mean(0), atol=1e-6
        )


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level BPE", "SentencePiece"])
def test_the_log_counts_and_the_saved_tokenizer_has_them(script, tmp_path, caplog, kind):
    folder = make_folder(tmp_path / "model", kind)
    script.main(job(folder, tmp_path, max_seq_length=60))
    assert "new tokens: 2 added, 1 known" in caplog.text
    old, new = (transformers.AutoTokenizer.from_pretrained(each) for each in (folder, tmp_path / "output"))
    lines = (tmp_path / "train.txt").read_text().splitlines()
    counts = [sum(len(tokenizer(line)["input_ids"]) for line in lines) for tokenizer in (old, new)]
    if kind == "wordpiece":  # Elsewhere, a word is split in another way after a space than alone.
        saved = counts[0] - counts[1]
        assert f"the training text has {saved:,} tokens fewer ({saved / counts[0]:.2%})" in caplog.text
    assert "tokens fewer (" in caplog.text and counts[1] < counts[0]
    ids = new("a sunflower and windmills", add_special_tokens=False)["input_ids"]
    tokens = new.convert_ids_to_tokens(ids)
    assert NEW[0] in tokens and NEW[1] not in tokens  # Whole words alone.
    assert new.unk_token_id not in ids


@pytest.mark.parametrize("kind", ["wordpiece", "SentencePiece"])
def test_spellings_that_the_tokenizer_takes_for_one_and_words_without_spaces(script, tmp_path, caplog, kind):
    caplog.set_level("INFO")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path / "model", kind))
    words = [
        "Sunflower",
        "sunflower",
        "sun . flower",
        "\N{GRINNING FACE}",
        "\N{WINKING FACE}",
        "ＩＣＵ北京",
        "windmill",
    ]
    new = script.add_new_tokens(tokenizer, write_lines(tmp_path / "new.txt", [*words, "나무"]))
    assert len(new) == (7 if kind == "wordpiece" else 8)
    assert f"{len(new)} added, 0 known" in caplog.text
    ids = tokenizer("我ＩＣＵ北京大 windmills 소나무", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in new] == [tokenizer("ＩＣＵ北京", add_special_tokens=False)["input_ids"][-1]]


def test_a_resumed_run_adds_nothing_twice(script, tmp_path):
    folder = make_folder(tmp_path / "model", "wordpiece")
    script.main(job(folder, tmp_path))
    script.main(job(folder, tmp_path, max_steps=4))
    script.main(job(folder, tmp_path, max_steps=4, output_dir=tmp_path / "whole"))
    assert weights(tmp_path / "output") == weights(tmp_path / "whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "output")
    assert len(tokenizer) == len(transformers.AutoTokenizer.from_pretrained(folder)) + 2
    # The adapted model as the start of another run: all are known.
    again = initial_weights(script, job(tmp_path / "output", tmp_path, output_dir=tmp_path / "again"))
    saved = load_file(tmp_path / "output" / "model.safetensors")
    for name, value in saved.items():
        np.testing.assert_array_equal(again[name], value)


def shares(batches):
    """Return the share of labels among the tokens of each batch."""
    return [(labels >= 0).sum() / attended.sum() for labels, attended in batches]


def steps_of(script, arguments):
    """Return (labels, attention_mask) of the samples of each step of the run's own loop."""
    run = set_up(script, arguments)
    if script is run_mlm:
        run.data_collator.compact = False
        return [(batch["labels"].numpy(), batch["attention_mask"].numpy()) for batch in run.get_train_dataloader()]
    run.sparse_start = None
    batches = [run.batch(run.train_dataset, keys, run.args.train_batch_size) for keys in run.plan.steps()]
    return [tuple(batch[name][0, 0] for name in ("labels", "attention_mask")) for batch in batches]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_the_share_of_masks_falls_with_the_place_in_the_run(tmp_path, streaming):
    folder = make_folder(tmp_path / "model", "wordpiece")
    path = write_lines(tmp_path / "text.txt", sentences(160))
    settings = {"new_tokens": None, "train_file": path, "train_batch_size": 8, "max_steps": 40, "streaming": streaming}
    settings |= {"mlm_probability": 0.6, "final_mlm_probability": 0.2, "shuffle_buffer_size": 50}
    steps = [steps_of(importlib.import_module(name), job(folder, tmp_path, **settings)) for name in INSTALLED]
    for one, other in zip(steps[0], steps[-1], strict=True):
        assert sorted(map(bytes, one[0][one[0] >= 0])) == sorted(
            map(bytes, other[0][other[0] >= 0].astype(one[0].dtype))
        )
    found = np.array(shares(steps[0]))
    expected = 0.6 - 0.4 * np.arange(40) / 40
    special = 2 / 12  # Tokens of a sample that are never chosen.
    slope, start = np.polyfit(np.arange(40), found / (1 - special), 1)
    assert (start, start + 40 * slope) == (pytest.approx(0.6, abs=0.08), pytest.approx(0.2, abs=0.08))
    assert np.corrcoef(found, expected)[0, 1] > 0.8


@pytest.mark.parametrize("length", [{"num_train_epochs": 0.3}, {"num_train_epochs": 2}, {"max_steps": 5}])
@pytest.mark.parametrize("drop", ["true", "false"])
def test_the_share_falls_from_the_first_step_to_the_last_one(script, tmp_path, drop, length):
    path = write_lines(tmp_path / "text.txt", sentences(60))
    settings = {"new_tokens": None, "train_file": path, "train_batch_size": 8, "line_by_line": "true", "max_steps": -1}
    folder = make_folder(tmp_path / "model", "wordpiece")
    run = set_up(script, job(folder, tmp_path, dataloader_drop_last=drop, **{**settings, **length}))
    steps = [{key.progress for key in keys} for keys in run.plan.steps()]
    assert len(steps) in (3, 5, 14, 16)
    assert [len(progress) for progress in steps] == [1] * len(steps)  # The samples of a step have one share.
    assert [max(progress) for progress in steps] == pytest.approx(np.linspace(0, 1, len(steps)))


def test_spellings_that_an_uncased_tokenizer_makes_one_are_one_token(script, tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path / "model", "wordpiece"))
    before = len(tokenizer)
    words = ["Caf\u00e9", "cafe", "B\u00e4cker", "CAF\u00c9", "\u00e4 bat", "a bat"]
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("cafe", "backer", "a bat")]
    new = script.add_new_tokens(tokenizer, write_lines(tmp_path / "new.txt", words))
    assert new == dict(zip(range(before, before + 3), pieces))
    assert len(tokenizer) == before + 3
    assert "new tokens: 3 added" in caplog.text
    for word in words:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_slow_tokenizer_that_lowercases(script, tmp_path):
    folder = make_folder(tmp_path / "model", "wordpiece")
    assert not make_slow_tokenizer(folder).is_fast
    before = load_file(f"{folder}/model.safetensors")["bert.embeddings.word_embeddings.weight"]
    words = write_lines(tmp_path / "new.txt", ["Sunflower", "Caf\u00e9"])
    arguments = job(folder, tmp_path, use_fast_tokenizer="false")
    after = initial_weights(script, [*arguments, "--new_tokens", words])["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(after[: len(before)], before)
    assert len(after) == len(before) + 2


def test_new_rows_of_a_vocabulary_as_large_as_another_size(script, tmp_path):
    folder = make_folder(tmp_path / "model", "wordpiece", intermediate_size=93)  # Of 91 tokens and 2 new ones.
    before = load_file(f"{folder}/model.safetensors")
    after = initial_weights(script, job(folder, tmp_path))
    assert len(after["bert.embeddings.word_embeddings.weight"]) == 93
    layer = "bert.encoder.layer.0.intermediate.dense.weight"
    np.testing.assert_array_equal(after[layer], before[layer])


def test_evaluation_has_the_final_share_or_its_own(script, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_folder(tmp_path / "model", "wordpiece"))
    row = np.full(20_000, 50, np.int32)
    for more, evaluation in (({}, 0.1), ({"eval_mlm_probability": 0.5}, 0.5)):
        collator = script.MaskingCollator(tokenizer, mlm_probability=0.3, final_mlm_probability=0.1, **more)
        for epoch, progress, share in ((0, 0, 0.3), (7, 0.5, 0.2), (9, 1, 0.1), (script.EVAL_EPOCH, 0, evaluation)):
            _, labels = collator.mask({"input_ids": row, "epoch": epoch, "index": 3, "progress": progress})
            assert (labels >= 0).mean() == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_falling_share_is_resumed_bit_by_bit(script, tmp_path, streaming):
    folder = make_folder(tmp_path / "model", "wordpiece")
    settings = {"mlm_probability": 0.5, "final_mlm_probability": 0.1, "max_steps": 14, "save_steps": 9}
    settings |= {"streaming": streaming, "shuffle_buffer_size": 30, "dropout_rate": 0.1}
    script.main(job(folder, tmp_path, output_dir=tmp_path / "whole", **settings))
    named = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-9"}
    script.main(job(folder, tmp_path, **settings, **named))
    assert history(tmp_path / "output") == history(tmp_path / "whole")
    assert weights(tmp_path / "output") == weights(tmp_path / "whole")


@pytest.mark.flax
def test_a_falling_share_compiles_nothing_anew(tmp_path):
    settings = {"mlm_probability": 0.5, "final_mlm_probability": 0.1, "max_steps": 30, "line_by_line": "false"}
    run = set_up(run_mlm_flax, job(make_folder(tmp_path / "model", "wordpiece"), tmp_path, **settings))
    batches = [run.batch(run.train_dataset, keys, 4) for keys in run.plan.steps()]
    assert len({tuple(array.shape for array in batch.values()) for batch in batches}) == 1
    counts = [(batch["labels"] >= 0).sum() for batch in batches]
    assert np.mean(counts[:5]) > 2 * np.mean(counts[-5:])


def test_a_stable_phase_branches_into_a_decay(script, tmp_path):
    folder, rate = make_folder(tmp_path / "model", "wordpiece"), 1e-3
    settings = {
        "new_tokens": None,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": 2,
        "learning_rate": rate,
    }
    settings |= {"lr_scheduler_kwargs": json.dumps({"num_decay_steps": 4, "decay_type": "linear"}), "save_steps": 6}
    script.main(job(folder, tmp_path, output_dir=tmp_path / "stable", max_steps=20, **settings))
    branch = {"resume_from_checkpoint": tmp_path / "stable" / "checkpoint-6", "max_steps": 10}
    script.main(job(folder, tmp_path, **settings, **branch))
    entries = read_json(tmp_path / "output", "trainer_state.json")["log_history"]
    rates = [entry["learning_rate"] for entry in entries if "loss" in entry]
    assert rates == pytest.approx([0, rate / 2, *[rate] * 5, 0.75 * rate, 0.5 * rate, 0.25 * rate])
    assert [path.name for path in Path(tmp_path, "output").glob("checkpoint-*")] == ["checkpoint-10"]
    assert Path(tmp_path, "stable", "checkpoint-20").exists()
    script.main(job(folder, tmp_path, **settings, max_steps=10))  # A branch goes on without the name of its start.
    assert read_json(tmp_path / "output", "trainer_state.json")["global_step"] == 10


def test_a_branch_may_begin_within_its_decay(script, tmp_path):
    folder, moved = make_folder(tmp_path / "model", "wordpiece"), []
    settings = {"new_tokens": None, "lr_scheduler_type": "warmup_stable_decay", "save_steps": 6}
    for decay, steps in ((1, 6), (1, 7), (4, 7)):
        more = {"lr_scheduler_kwargs": json.dumps({"num_decay_steps": decay, "decay_type": "linear"})}
        more |= {"output_dir": tmp_path / f"{decay}-{steps}", "max_steps": steps}
        if steps == 7:
            more["resume_from_checkpoint"] = tmp_path / "1-6" / "checkpoint-6"
        script.main(job(folder, tmp_path, **settings, **more))
        name = "bert.embeddings.word_embeddings.weight"
        moved.append(load_file(more["output_dir"] / "model.safetensors")[name])
    # Adam's step is proportional to the learning rate: at the peak, and after three quarters of the decay.
    np.testing.assert_allclose(moved[2] - moved[0], (moved[1] - moved[0]) / 4, atol=1e-7)
    assert np.abs(moved[2] - moved[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("schedule", "warmup", "warned"),
    [("linear", 2, True), ("linear", 1, False), ("constant", 2, False), ("warmup_stable_decay", 1, True)],
)
def test_a_run_too_short_for_its_schedule_is_warned_of(script, tmp_path, caplog, schedule, warmup, warned):
    settings = {"lr_scheduler_type": schedule, "warmup_steps": warmup}  # Of two steps.
    if schedule == "warmup_stable_decay":
        settings["lr_scheduler_kwargs"] = '{"num_decay_steps": 2}'
    script.main(job(make_folder(tmp_path / "model", "wordpiece"), tmp_path, **settings))
    assert ("longer than the run" in caplog.text) == warned


@pytest.mark.pytorch
@pytest.mark.pytorch
@pytest.mark.parametrize("source", ["model_name_or_path", "config_name"])
def test_the_attention_implementation_reaches_the_model(tmp_path, source):
    folder = make_folder(tmp_path / "model", "wordpiece")
    given = {"model_name_or_path": None, "tokenizer_name": folder, source: folder}
    for name in ("eager", "sdpa"):
        trainer = set_up(run_mlm, job(folder, tmp_path, **given, attn_implementation=name, new_tokens=None))
        assert trainer.model.config._attn_implementation == name
