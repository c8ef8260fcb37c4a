"""An original TensorFlow checkpoint of BERT is converted. Run by its name, where tensorflow-cpu is installed."""

import re

import numpy as np
import pytest
import torch
import transformers
from conftest import flags, make_config, make_tokenizer, read_json, run_script, sentences, write_lines

LAYERS = 2


def google_variable(name, value):
    """Return the name and the array that Google's BERT gives a parameter of PyTorch's `BertForPreTraining`."""
    module, _, kind = re.sub(r"layer\.(\d+)", r"layer_\1", name).replace(".", "/").rpartition("/")
    value = value.detach().numpy()
    if module.endswith("_embeddings"):
        return module, value
    if module.endswith("LayerNorm"):
        return f"{module}/{'gamma' if kind == 'weight' else 'beta'}", value
    if module in ("cls/predictions", "cls/seq_relationship"):
        return f"{module}/output_{'weights' if kind == 'weight' else 'bias'}", value
    return (f"{module}/kernel", value.T) if kind == "weight" else (f"{module}/bias", value)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with `model.ckpt.*`, configuration and tokenizer, and the PyTorch model with the same weights."""
    import tensorflow as tf

    folder = tmp_path / "google"
    folder.mkdir()
    config = make_config("bert", make_tokenizer(folder), num_hidden_layers=LAYERS)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # Biases and layer norms too: a weight that is not read shows.
    variables = dict(google_variable(name, value) for name, value in model.named_parameters())
    assert len(variables) == 14 + 16 * LAYERS  # As many as in the released files: 206 for 12 layers.
    assert {
        "bert/embeddings/word_embeddings",
        "bert/encoder/layer_0/attention/self/query/kernel",
        "bert/encoder/layer_1/output/LayerNorm/gamma",
        "bert/pooler/dense/bias",
        "cls/predictions/transform/dense/kernel",
        "cls/predictions/output_bias",
        "cls/seq_relationship/output_weights",
    } <= set(variables)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in variables.items():
            tf.compat.v1.get_variable(name, initializer=value)
            tf.compat.v1.get_variable(f"{name}/adam_m", initializer=0 * value)
        tf.compat.v1.train.get_or_create_global_step()
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    return folder, model


def command_line(folder, name, tmp_path):
    """Return the flags for two steps from the checkpoint, too small to move its weights far."""
    return flags(model_name_or_path=folder / name, config_name=folder, tokenizer_name=folder) + flags(
        train_file=write_lines(tmp_path / "train.txt", sentences(60)),
        output_dir=tmp_path / "output",
        do_train=True,
        max_steps=2,
        learning_rate=1e-6,
        max_seq_length=32,
    )


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt"])
def test_the_weights_are_those_of_the_checkpoint(script, checkpoint, tmp_path, name):
    folder, expected = checkpoint
    model_args, _, training_args = script.parse_args(command_line(folder, name, tmp_path))
    tokenizer = script.load_tokenizer(model_args)
    model = script.load_model(model_args, script.load_config(model_args, tokenizer), tokenizer, training_args)
    weights = expected.state_dict()
    if script.__name__ == "run_mlm_flax":
        found = script.pytorch_weights(model[1], model[0].config)
        for key, value in found.items():
            assert np.array_equal(value, weights[key].numpy()), key
        assert len(found) == 5 + 16 * LAYERS + 5  # Embeddings, layers and head, without pooler and second head.
        return
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    input_ids = torch.randint(5, model.config.vocab_size, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids).logits, expected(input_ids).prediction_logits)


def test_training_starts_from_the_checkpoint(script, checkpoint, tmp_path):
    folder, expected = checkpoint
    done = run_script(script.__name__, command_line(folder, "model.ckpt.index", tmp_path))
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path, "output", "trainer_state.json")["global_step"] == 2
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "output")
    weights = expected.state_dict()
    difference = max((value - weights[key]).abs().max() for key, value in model.state_dict().items())
    assert 0 < difference < 1e-5
