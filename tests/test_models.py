"""Models of every kind: loaded, made from scratch, resized, saved, and the same in both frameworks."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    INSTALLED,
    flags,
    make_byte_level_tokenizer,
    make_model,
    make_tokenizer,
    read_json,
    sentences,
    training_flags,
    write_lines,
)
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

LENGTH = 16
SMALL = {"num_hidden_layers": 1, "n_layers": 1}
OVERRIDES = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64"


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A folder that holds a tokenizer and no model."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    make_tokenizer(folder)
    return str(folder)


def load(script, **settings):
    """Return (model, {PyTorch name: weight}, tokenizer) as a run with these settings makes them."""
    needed = flags(output_dir="unused", train_file=__file__)
    model_args, _, training_args = script.parse_args(needed + flags(**settings))
    tokenizer = script.load_tokenizer(model_args)
    config = script.load_config(model_args, tokenizer)
    model = script.load_model(model_args, config, tokenizer, training_args)
    if script.__name__ == "run_mlm_flax":
        model, params = model
        return model, script.pytorch_weights(params, model.config), tokenizer
    return model, {name: value.numpy() for name, value in model.state_dict().items()}, tokenizer


def assert_loads_whole_and_alike(folder):
    """Check that a saved folder is a complete model, the same in PyTorch and in Flax, of its tokenizer's vocabulary."""
    model, loading = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    vocab_size = len(transformers.AutoTokenizer.from_pretrained(folder))
    input_ids = np.random.default_rng(0).integers(5, vocab_size, (1, LENGTH))
    attention_mask = (np.arange(LENGTH) < LENGTH - 4)[None].astype(np.int64)
    with torch.no_grad():
        logits = model(torch.tensor(input_ids), attention_mask=torch.tensor(attention_mask)).logits.numpy()
    assert logits.shape == (1, LENGTH, vocab_size)
    script = importlib.import_module("run_mlm_flax")
    own, params = load_flax(script, folder)
    own = script.masked_logits(params, {"input_ids": input_ids, "attention_mask": attention_mask}, model=own)
    np.testing.assert_allclose(own[:, :-4], logits[:, :-4], atol=1e-5)


def load_flax(script, folder):
    """Return (model, parameters) of a folder."""
    model_args, training_args = script.ModelArguments(model_name_or_path=str(folder)), script.TrainingArguments()
    tokenizer = script.load_tokenizer(model_args)
    return script.load_model(model_args, script.load_config(model_args, tokenizer), tokenizer, training_args)


def train_two_steps(script, output, **settings):
    """Train on a few lines without dropout, save, and return the metrics."""
    train_file = write_lines(Path(output).with_suffix(".txt"), sentences(60))
    return script.main(
        flags(output_dir=output, train_file=train_file, do_train=True, max_steps=2, line_by_line="false")
        + flags(max_seq_length=LENGTH, learning_rate=1e-3, lr_scheduler_type="linear", dropout_rate=0, **settings)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_trains_alike_and_is_saved_whole(tmp_path, architecture):
    folder = make_model(tmp_path / "model", architecture, **SMALL)
    before = load_file(Path(folder) / "model.safetensors")
    losses = []
    for name in INSTALLED:
        output = tmp_path / name
        metrics = train_two_steps(importlib.import_module(name), output, model_name_or_path=folder)
        losses.append(metrics["train_loss"])
        assert read_json(output, "config.json")["model_type"] == architecture
        after = load_file(output / "model.safetensors")
        trained = {name for name in before if not np.array_equal(before[name], after[name])}
        assert any("word_embeddings" in name for name in trained)
        assert any("position_embeddings" in name for name in trained)
        assert any(name.endswith("bias") for name in trained)
        assert_loads_whole_and_alike(output)
    assert losses[-1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("architecture", ["bert", pytest.param("roberta", marks=pytest.mark.long)])
def test_an_untied_decoder_of_another_vocabulary_is_saved_whole(script, tmp_path, architecture):
    # A tokenizer whose vocabulary has another size than the model, and an evaluation of what training saved.
    folder = make_model(tmp_path / "model", architecture, tie_word_embeddings=False, **SMALL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["sunflower", "windmill"])
    tokenizer.save_pretrained(folder)
    validation = {"validation_file": write_lines(tmp_path / "validation.txt", sentences(20, seed=1)), "do_eval": True}
    output = tmp_path / "output"
    metrics = train_two_steps(script, output, model_name_or_path=folder, **validation)
    again = script.main(
        flags(model_name_or_path=output, output_dir=tmp_path / "again", line_by_line="false", max_seq_length=LENGTH)
        + flags(**validation)
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_an_untied_decoder_of_a_grown_vocabulary_survives(script, tmp_path):
    folder = make_model(tmp_path / "model", tie_word_embeddings=False, **SMALL)
    before = load_file(Path(folder) / "model.safetensors")
    make_tokenizer(folder, extra=["sunflower", "windmill"])
    decoder, embeddings = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    assert not np.allclose(before[decoder], before[embeddings])
    output = tmp_path / "output"
    train_two_steps(script, output, model_name_or_path=folder)
    after = load_file(output / "model.safetensors")
    for name in (decoder, embeddings):
        assert len(after[name]) == len(before[name]) + 2
        moved = np.abs(after[name][:-2] - before[name])
        assert 0 < moved.max() < 0.01  # Two small steps away from what was loaded.
    assert_loads_whole_and_alike(output)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", [7, -7])
def test_embeddings_and_decoder_fit_the_tokenizer(script, tmp_path, tied, change):
    folder = make_model(tmp_path / "model", tie_word_embeddings=tied, **SMALL)
    old = load_file(Path(folder) / "model.safetensors")
    old_size = len(old["bert.embeddings.word_embeddings.weight"])
    tokenizer_folder = tmp_path / "tokenizer"
    tokenizer_folder.mkdir()
    if change > 0:
        make_tokenizer(tokenizer_folder, extra=[f"extra{i}" for i in range(change)])
    else:
        vocabulary = (Path(folder) / "vocab.txt").read_text(encoding="utf-8").split()[:change]
        write_lines(tmp_path / "vocab.txt", vocabulary)
        transformers.BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tokenizer_folder)
    model, new, tokenizer = load(script, model_name_or_path=folder, tokenizer_name=tokenizer_folder)
    assert len(tokenizer) == old_size + change
    assert model.config.vocab_size == max(old_size, old_size + change)  # Rows are never cut.
    resized = 0
    for name, values in old.items():
        if len(values) != old_size or change < 0:
            np.testing.assert_array_equal(new[name], values, err_msg=name)
            continue
        resized += 1
        assert len(new[name]) == len(tokenizer), name
        np.testing.assert_array_equal(new[name][:old_size], values, err_msg=name)
        added = values.mean(axis=0) if values.ndim > 1 else 0
        np.testing.assert_allclose(new[name][old_size:], np.broadcast_to(added, (change, *values.shape[1:])), atol=1e-4)
    grown = 2 if tied else 4  # An untied decoder has two biases.
    assert resized == (grown if change > 0 else 0)


def test_a_new_model_by_type_has_the_tokenizers_vocabulary(script, tokenizer_folder):
    settings = {"model_type": "bert", "tokenizer_name": tokenizer_folder, "config_overrides": OVERRIDES}
    model, weights, tokenizer = load(script, **settings)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("bert", 32, 1)
    assert (config.vocab_size, config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    embeddings = weights["bert.embeddings.word_embeddings.weight"]
    assert embeddings.shape == (len(tokenizer), 32)
    assert 0.015 < embeddings.std() < 0.025  # BERT's initial standard deviation is 0.02.


def test_a_new_model_by_configuration_takes_no_weights(script, tmp_path, tokenizer_folder):
    folder = make_model(tmp_path / "model", "electra", **SMALL)
    settings = {"config_name": folder, "tokenizer_name": tokenizer_folder}
    model, weights, _ = load(script, config_overrides="hidden_size=64,intermediate_size=48", **settings)
    assert (model.config.model_type, model.config.num_attention_heads) == ("electra", 2)
    assert (model.config.hidden_size, model.config.intermediate_size) == (64, 48)
    name = "electra.embeddings.position_embeddings.weight"
    assert not np.allclose(weights[name], load_file(Path(folder) / "model.safetensors")[name])


def test_the_weights_of_the_named_folder_are_loaded(script, tmp_path):
    for seed in (1, 2):
        folder = make_model(tmp_path / f"model-{seed}", seed=seed, **SMALL)
        _, weights, _ = load(script, model_name_or_path=folder)
        for name, values in load_file(Path(folder) / "model.safetensors").items():
            np.testing.assert_array_equal(weights[name], values, err_msg=name)


def save_weights(folder, kind):
    """Replace the weights of a model folder by the same ones in another kind of files."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    (Path(folder) / "model.safetensors").unlink()
    if kind == "pytorch_model.bin":
        torch.save(model.state_dict(), Path(folder) / kind)
    elif kind == "sharded":
        model.save_pretrained(folder, max_shard_size="30KB")
        assert len(list(Path(folder).glob("model-*-of-*.safetensors"))) > 1
    else:  # As the Flax models of Transformers 4 wrote it.
        (Path(folder) / kind).write_bytes(
            serialization.to_bytes(unflatten_dict(dict(map(flax_weight, model.named_parameters()))))
        )


def flax_weight(item):
    """Return the path in the tree of a former Flax model, and the array, of a parameter of PyTorch."""
    *modules, leaf = item[0].split(".")
    value = item[1].detach().numpy()
    if leaf == "weight":
        leaf = "embedding" if "embeddings" in modules[-1] else "kernel" if value.ndim > 1 else "scale"
    return (*modules, leaf), value.T if leaf == "kernel" else value


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run_mlm", "pytorch_model.bin"),
        ("run_mlm", "sharded"),
        pytest.param("run_mlm_flax", "pytorch_model.bin", marks=pytest.mark.flax),
        pytest.param("run_mlm_flax", "sharded", marks=pytest.mark.flax),
        pytest.param("run_mlm_flax", "flax_model.msgpack", marks=pytest.mark.flax),
    ],
)
def test_other_kinds_of_weights_are_loaded(tmp_path, name, kind):
    script, folder = importlib.import_module(name), make_model(tmp_path / "model", **SMALL)
    expected = load_file(Path(folder) / "model.safetensors")
    save_weights(folder, kind)
    _, found, _ = load(script, model_name_or_path=folder)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_a_hub_name_is_found_in_the_cache_without_a_network(script, tmp_path):
    cached = tmp_path / "hub" / "models--group--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    make_model(cached / "snapshots" / ("0" * 40), **SMALL)
    train_two_steps(script, tmp_path / "output", model_name_or_path="group/tiny", cache_dir=tmp_path / "hub")
    assert (tmp_path / "output" / "model.safetensors").exists()


def test_the_saved_configuration_names_the_type_of_the_weights(script, text_files, tmp_path):
    model = Path(make_model(tmp_path / "model"))
    config = read_json(model, "config.json") | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    settings = {"max_steps": 1, "save_steps": 1, "do_eval": "false"}
    script.main(training_flags(model, text_files, tmp_path / "output", **settings))
    for folder in (tmp_path / "output", tmp_path / "output" / "checkpoint-1"):
        assert read_json(folder, "config.json")["dtype"] == "float32"
        assert {str(value.dtype) for value in load_file(folder / "model.safetensors").values()} == {"float32"}


def test_a_new_model_trains(script, tokenizer_folder, tmp_path):
    output = tmp_path / "output"
    metrics = train_two_steps(
        script, output, model_type="bert", tokenizer_name=tokenizer_folder, config_overrides=OVERRIDES
    )
    config = transformers.AutoModelForMaskedLM.from_pretrained(output).config
    assert metrics["train_loss"] == pytest.approx(np.log(config.vocab_size), abs=0.3)


@pytest.mark.parametrize(
    "overrides", ["hidden_sice=32", "hidden_size=wide", "hidden_size", f"{OVERRIDES},num_attention_heads=5"]
)
def test_a_wrong_override_is_one_line(script, tokenizer_folder, text_files, tmp_path, capsys, overrides):
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as exit_:
        script.main(
            flags(model_type="bert", tokenizer_name=tokenizer_folder, config_overrides=overrides, output_dir=output)
            + flags(do_eval=True, max_seq_length=LENGTH, **text_files)
        )
    assert exit_.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"--config_overrides {overrides}" in message
    assert not (output / "config.json").exists()


DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout"),
    "electra": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_rate_sets_every_dropout(script, tmp_path, architecture):
    folder = tmp_path / "config"
    transformers.CONFIG_MAPPING[architecture]().save_pretrained(folder)
    for rate in ("0.3", "0"):
        model_args, _, _ = script.parse_args(
            flags(
                config_name=folder, tokenizer_name="some", dropout_rate=rate, output_dir="unused", train_file=__file__
            )
        )
        config = script.load_config(model_args, make_tokenizer(folder))
        assert {name: getattr(config, name) for name in DROPOUTS[architecture]} == dict.fromkeys(
            DROPOUTS[architecture], float(rate)
        )


def test_without_dropout_rate_the_configuration_keeps_its_own(script, tmp_path):
    folder = make_model(tmp_path / "model", hidden_dropout_prob=0.25, **SMALL)
    model, _, _ = load(script, model_name_or_path=folder)
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.25, 0.1)


def choose(script, config, tokenizer_limit, asked=None):
    """Return the sequence length chosen for a configuration and the tokenizer's limit."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=tokenizer_limit)
    settings = {} if asked is None else {"max_seq_length": asked}
    needed = flags(model_name_or_path="some", output_dir="unused", train_file=__file__)
    _, data_args, _ = script.parse_args(needed + flags(**settings))
    return script.choose_max_seq_length(data_args, tokenizer, config)


@pytest.mark.parametrize(
    ("positions", "tokenizer_limit", "asked", "chosen", "message"),
    [
        (4096, 10**30, None, 1024, ""),
        (4096, 300, None, 300, ""),
        (200, 10**30, None, 200, ""),
        (512, 512, 128, 128, ""),
        (512, 512, 2000, 512, "2000"),
        (4096, 10**30, 2000, 2000, ""),
    ],
)
def test_length_is_the_smallest_of_all_limits(script, caplog, positions, tokenizer_limit, asked, chosen, message):
    config = transformers.BertConfig(max_position_embeddings=positions)
    assert choose(script, config, tokenizer_limit, asked) == chosen
    assert message in caplog.text
    assert bool(caplog.records) == bool(message)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_default_length_is_the_longest_that_the_model_takes(script, tmp_path, architecture):
    folder = make_model(tmp_path / "model", architecture, **SMALL)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    longest = choose(script, model.config, 10**30)

    def run(length):
        input_ids = torch.full((1, length), 7)
        with torch.no_grad():
            return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits

    assert run(longest).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        run(longest + 1)


def test_a_tensorflow_checkpoint_without_tensorflow_says_what_is_missing(
    script, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as exit_:
        script.main(
            flags(model_name_or_path="bert_model.ckpt.index", config_name=model_folder, tokenizer_name=model_folder)
            + flags(train_file=write_lines(tmp_path / "train.txt", sentences(60)), do_train=True, output_dir=output)
            + flags(max_seq_length=LENGTH)
        )
    assert exit_.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "bert_model.ckpt.index" in message
    assert "pip install tensorflow-cpu" in message
    assert not (output / "config.json").exists()


def test_positions_of_a_new_roberta_begin_behind_its_tokenizers_padding(script, tmp_path):
    tokenizer = make_byte_level_tokenizer(tmp_path)
    tokenizer.model_max_length = 10**30
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    tokenizer.save_pretrained(tmp_path)
    settings = {"model_type": "roberta", "tokenizer_name": tmp_path, "output_dir": "o", "train_file": __file__}
    model_args, data_args, _ = script.parse_args(flags(**settings))
    config = script.load_config(model_args, tokenizer)
    assert (config.pad_token_id, config.max_position_embeddings) == (3, 512)
    assert script.choose_max_seq_length(data_args, tokenizer, config) == 508
