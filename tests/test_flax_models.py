"""The models of run_mlm_flax.py are those of Transformers: numbers, gradients, weights; what they lack is refused."""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import transformers
from conftest import ROOT, error_line, flags, make_model, sentences, write_lines
from safetensors.numpy import load_file, save_file

import run_mlm_flax

FAMILIES = sorted(run_mlm_flax.MODEL_TYPES)


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 matrices in float32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_are_pytorchs(family, tied):
    found = parity.differences(parity.make_config(family, tie_word_embeddings=tied))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("name", sorted(run_mlm_flax.ACTIVATIONS))
def test_each_activation_is_pytorchs(name):
    inputs = np.linspace(-12, 12, 997).astype(np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(inputs)).numpy()
    np.testing.assert_allclose(run_mlm_flax.ACTIVATIONS[name](inputs), expected, rtol=1e-5, atol=1e-6)


def test_every_activation_without_parameters_is_there():
    assert set(transformers.activations.ACT2FN) - {"prelu", "xielu"} == set(run_mlm_flax.ACTIVATIONS)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_bfloat16_is_as_close_as_pytorchs(family):
    config = parity.make_config(family)
    model, batch = parity.make_model(config).eval(), parity.make_batch(config)
    inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        exact = model(**inputs).logits.numpy()
        theirs = model.bfloat16()(**inputs).logits.float().numpy()
    own, params = parity.create(config, model.float(), bf16=True)
    logits = run_mlm_flax.masked_logits(params, batch, model=own)
    visible = batch["attention_mask"] == 1
    assert logits.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((logits.astype(np.float32) - exact)[visible] ** 2))
    assert 0 < error < 2 * np.sqrt(np.mean((theirs - exact)[visible] ** 2))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_weights_have_pytorchs_distribution(family, tied):
    config = parity.make_config(family, tie_word_embeddings=tied, vocab_size=1000, initializer_range=0.05)
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    own = run_mlm_flax.create_model(config, run_mlm_flax.TrainingArguments())
    found = run_mlm_flax.pytorch_weights(run_mlm_flax.create_parameters(own, {}, seed=1), config)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert found.keys() <= expected.keys()
    for name, values in found.items():
        theirs = expected[name]
        assert values.shape == theirs.shape
        if theirs.ndim == 1:
            np.testing.assert_array_equal(values, theirs, err_msg=name)
            continue
        np.testing.assert_array_equal(~values.any(axis=1), ~theirs.any(axis=1), err_msg=name)  # Rows of padding.
        error = theirs.std() / np.sqrt(theirs.size)
        assert abs(values.mean() - theirs.mean()) < 5 * np.sqrt(2) * error, name
        assert abs(values.std() - theirs.std()) < 5 * error, name
        if family == "modernbert":  # Cut off.
            assert np.abs(values).max() == pytest.approx(np.abs(theirs).max(), rel=0.05), name


@pytest.mark.parametrize("padding_id", [None, 7])
def test_the_gradient_of_a_look_up_is_that_of_a_plain_one(padding_id):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 24)).astype(np.float32)
    ids = np.where(rng.random((5, 61)) < 0.5, 7, rng.integers(0, 50, (5, 61)))  # Many equal ones, more than a block.
    weights, plain = rng.normal(size=(5, 61, 24)).astype(np.float32), np.zeros((50, 24))
    np.add.at(plain, ids, weights)
    if padding_id is not None:
        plain[padding_id] = 0
    gradient = jax.jit(
        jax.grad(lambda table: (run_mlm_flax.look_up(table, jnp.array(ids), padding_id) * weights).sum())
    )(table)
    np.testing.assert_allclose(gradient, plain, rtol=1e-6, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_the_gradient_of_attention_with_dropout_is_jaxs_own(dtype, tolerance):
    *keys, rng = jax.random.split(jax.random.key(0), 5)
    query, key, value, weights = (jax.random.normal(each, (3, 33, 4, 8)) for each in keys)
    mask = jnp.ones((3, 1, 1, 33), bool).at[1, ..., 20:].set(False)
    plain = run_mlm_flax.dropped_attention.__wrapped__
    results = []
    for function, kind in ((run_mlm_flax.dropped_attention, dtype), (plain, jnp.float32)):

        def total(*inputs, function=function):
            return (function(*inputs, mask, rng, 0.3).astype(jnp.float32) * weights).sum()

        inputs = [array.astype(kind) for array in (query, key, value)]
        results.append(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs))
    for own, expected in zip(*results):
        assert own.dtype == dtype
        np.testing.assert_allclose(own.astype(jnp.float32), expected, rtol=0, atol=tolerance * abs(expected).max())


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(x, marks=pytest.mark.long) for x in ("albert", "modernbert"))]
)
def test_gradient_checkpointing_changes_no_number(family):
    config = parity.make_config(family, **({} if family == "modernbert" else {"num_hidden_layers": 2}))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "mlp_dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.2)
    model, batch = parity.make_model(config), parity.make_batch(config)

    def loss(params, own):
        logits = run_mlm_flax.masked_logits(params, batch, jax.random.key(0), model=own)
        return (logits * np.linspace(0, 1, logits.size).reshape(logits.shape)).mean()

    results, sizes = [], []
    for checkpointing in (False, True):
        own, params = parity.create(config, model, gradient_checkpointing=checkpointing)
        function = functools.partial(loss, own=own)
        results.append(jax.jit(jax.value_and_grad(function))(params))
        sizes.append(str(jax.make_jaxpr(jax.grad(function))(params)).count("remat"))
    assert sizes[0] == 0 < sizes[1]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7), *results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_use_of_a_shared_layer_has_its_own_dropout(checkpointing):
    """A layer that adds nothing but dropout: two uses with one key would drop the same values twice."""
    config = parity.make_config("albert", num_hidden_groups=1, inner_group_num=1, num_hidden_layers=2)
    config.hidden_dropout_prob = 0.5
    own, params = parity.create(config, parity.make_model(config), gradient_checkpointing=checkpointing)
    keys, plain = [], run_mlm_flax.fast_dropout

    def noted(inputs, rate, key):
        jax.debug.callback(lambda data: keys.append(data.tobytes()), jax.random.key_data(key))
        return plain(inputs, rate, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_mlm_flax, "fast_dropout", noted)
        logits = run_mlm_flax.masked_logits(params, parity.make_batch(config), jax.random.key(0), model=own)
    jax.block_until_ready(logits)
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 3  # Of the embeddings, and of each use of the layer.


REFUSED = [
    ("bert", {"position_embedding_type": "relative_key"}),
    ("bert", {"is_decoder": True}),
    ("bert", {"hidden_act": "prelu"}),
    ("bert", {"num_attention_heads": 5}),
    ("bert", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("albert", {"num_hidden_groups": 4}),
    ("roberta", {"pad_token_id": None}),
    (
        "modernbert",
        {"rope_parameters": {kind: {"rope_type": "linear"} for kind in ("full_attention", "sliding_attention")}},
    ),
]


@pytest.mark.parametrize(("family", "setting"), REFUSED)
def test_a_setting_that_the_models_lack_is_refused_by_name(family, setting):
    config = parity.make_config(family)
    for name, value in setting.items():
        setattr(config, name, value)
    with pytest.raises(run_mlm_flax.InputError, match=f"^{name} .* is not supported"):
        run_mlm_flax.check_config(config)


def start(folder, tmp_path, **settings):
    """Return the command line of an evaluation."""
    text = write_lines(tmp_path / "validation.txt", sentences(20))
    settings = {"validation_file": text, "do_eval": True, "max_seq_length": 16, **settings}
    return flags(model_name_or_path=folder, output_dir=tmp_path / "output", **settings)


def change_weights(folder, change):
    """Replace the weights of a folder."""
    path = Path(folder) / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})


def test_old_names_a_base_model_and_what_is_left_over(tmp_path, caplog):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    expected = run_mlm_flax.main(start(folder, tmp_path))["eval_loss"]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(weights):
        for name, value in weights.items():
            for new, former in old.items():
                name = name.replace(new, former)
            yield name.removeprefix("bert."), value
        yield "pooler.dense.weight", np.zeros((32, 32), np.float32)

    change_weights(folder, rename)
    caplog.clear()
    assert run_mlm_flax.main(start(folder, tmp_path, overwrite_output_dir=True))["eval_loss"] == expected
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == f"{folder} has weights that are not used: pooler.dense.weight"


def test_an_encoder_without_a_head_gets_a_new_one_and_one_line_says_so(tmp_path, caplog):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    change_weights(
        folder, lambda weights: {name: x for name, x in weights.items() if not name.startswith("cls.")}.items()
    )
    metrics = run_mlm_flax.main(start(folder, tmp_path))
    assert metrics["eval_loss"] > 0
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{folder} lacks these, newly initialized: cls.predictions.bias, cls.predictions.")


def test_a_weight_of_another_shape_and_those_of_another_type_are_errors(tmp_path, capfd):
    folder, name = make_model(tmp_path / "model", num_hidden_layers=1), "bert.encoder.layer.0.intermediate.dense.weight"
    change_weights(folder, lambda weights: (weights | {name: np.zeros((48, 32), np.float32)}).items())
    line = error_line(run_mlm_flax, start(folder, tmp_path), capfd)
    assert f"{name} has the shape (48, 32); the configuration asks for (64, 32)" in line
    change_weights(folder, lambda weights: ((f"other.{name}", x) for name, x in weights.items()))
    assert "holds no weights of the type bert" in error_line(run_mlm_flax, start(folder, tmp_path), capfd)


def test_weights_of_bfloat16_are_read(tmp_path):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).bfloat16()
    model.save_pretrained(folder)
    weights = run_mlm_flax.read_weights(folder, {})
    for name, value in model.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(weights[name].astype(np.float32), value.float().numpy())


def test_a_gpu_without_the_library_computes_attention_in_parts(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run_mlm_flax.fused_attention.__wrapped__() is None
    assert "Attention is not fused on this GPU" in caplog.text


def test_new_tokens_have_the_bias_of_their_pieces_and_added_rows_none():
    config = parity.make_config("bert", tie_word_embeddings=False)
    rng = np.random.default_rng(0)
    names = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    shapes = ((parity.VOCABULARY, 24), (parity.VOCABULARY, 24), (parity.VOCABULARY,))
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in zip(names, shapes)}
    before, size = dict(weights), parity.VOCABULARY + 2
    run_mlm_flax.add_rows(weights, config, size)
    assert config.vocab_size == size and {len(values) for values in weights.values()} == {size}
    np.testing.assert_array_equal(weights[names[2]][-2:], 0)
    model = run_mlm_flax.create_model(config, run_mlm_flax.TrainingArguments())
    params = run_mlm_flax.create_parameters(model, weights, seed=0)
    run_mlm_flax.fill_new_rows(params, config, {size - 1: [4, 9]})
    found = run_mlm_flax.pytorch_weights(params, config)
    for name in names:
        np.testing.assert_array_equal(found[name][:-2], before[name])
        np.testing.assert_allclose(found[name][-1], (before[name][4] + before[name][9]) / 2, rtol=1e-6)


def test_the_analysis_of_the_step_finds_no_slow_scatter():
    path = ROOT / "tests" / "benchmarks" / "xla_step.py"
    spec = importlib.util.spec_from_file_location("xla_step", path)
    xla_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(xla_step)
    scatters, products = xla_step.operations(xla_step.lower_step(run_mlm_flax, 2, 128, jnp.bfloat16).as_text())
    slots = run_mlm_flax.label_slots(np.full((2, 128), -100), 0.15)
    words, rows = "f32[30522x768] += [256x768]", f"f32[256x768] += [{slots}x768]"
    assert scatters == {words: 1, rows: 2}  # Of the words, added up before; and of positions that are named once.
    assert set(products) == {"4x64x64 @ 4x64x768"}  # Which adds up the words.
    assert os.environ.get("XLA_FLAGS")  # Nothing was compiled.
