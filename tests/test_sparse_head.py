"""The head runs on the labelled positions only, and the loss and its gradients stay the same numbers."""

import functools

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, flags, make_model, make_tokenizer, optional_module, sentences, set_up, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import run_mlm

jax, jnp = optional_module("jax"), optional_module("jax.numpy")
run_mlm_flax = optional_module("run_mlm_flax")

LENGTH = 16
DENSE = "needs all positions in its head: training with the dense head."
# Where each architecture's hidden states can be left out at the earliest. The layers of ALBERT are one module, called
# again and again; those of DistilBERT are laid out in another way.
SELECTIONS = {"bert": "layer", "roberta": "layer", "electra": "layer", "albert": "encoder", "distilbert": "encoder"}


@pytest.fixture(params=ARCHITECTURES)
def folder(request, tmp_path):
    """A tiny model of each architecture, of one layer, without dropout."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "dropout")
    changes = {"num_hidden_layers": 1, "n_layers": 1, "attention_dropout": 0.0, **dict.fromkeys(names, 0.0)}
    return make_model(tmp_path / "model", request.param, **changes)


@pytest.fixture
def batch():
    """int32 [4, 16] arrays with 9 labels and some padding."""
    generator = np.random.default_rng(0)
    batch = {name: np.ones((4, LENGTH), np.int32) for name in ("input_ids", "attention_mask")}
    batch["input_ids"][:] = generator.integers(5, 50, (4, LENGTH))
    batch["labels"] = np.full((4, LENGTH), -100, np.int32)
    places = generator.choice(3 * LENGTH, 9, replace=False)  # None in the last row.
    batch["labels"].flat[places] = generator.integers(5, 50, 9)
    batch["attention_mask"][3, 10:] = 0
    return batch


def build(script, folder, tmp_path, *more):
    return set_up(
        script,
        flags(model_name_or_path=folder, output_dir=tmp_path / "output", max_seq_length=LENGTH, line_by_line="false")
        + flags(train_file=write_lines(tmp_path / "train.txt", sentences(20)), max_steps=1)
        + list(more),
    )


def pytorch_loss(trainer, batch, selection, slots=16):
    """Return (loss, gradients, rows that the head computed)."""
    if trainer.head:
        trainer.head.hook.remove()
    trainer.head = selection and run_mlm.SparseHead(trainer.model, selection)
    trainer.model.zero_grad()
    rows = []
    head = trainer.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: rows.append(output[..., 0].numel()))
    selected = batch if slots is None else batch | run_mlm.select_labels(batch["labels"], slots)
    inputs = {name: torch.from_numpy(array).long() for name, array in selected.items()}
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    handle.remove()
    gradients = {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}
    return loss, gradients, rows


def test_pytorch_loss_and_gradients_are_those_of_the_dense_head(folder, batch, tmp_path):
    trainer = build(run_mlm, folder, tmp_path)
    assert trainer.sparse_start == SELECTIONS[trainer.model.config.model_type]
    inputs = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    stock = trainer.model(**inputs).loss.item()
    found = trainer.sparse_start
    dense, dense_gradients, dense_rows = pytorch_loss(trainer, batch, None)
    assert dense_rows == [4 * LENGTH]
    for selection, slots in (("encoder", 9), (found, 9), (found, 16), (None, None)):
        sparse, sparse_gradients, sparse_rows = pytorch_loss(trainer, batch, selection, slots)
        assert sparse_rows == [slots or 4 * LENGTH]
        assert sparse.item() == pytest.approx(dense.item(), rel=1e-6)
        assert sparse.item() == pytest.approx(stock, rel=1e-6)
        assert sparse_gradients.keys() == dense_gradients.keys()
        for name, gradient in sparse_gradients.items():
            torch.testing.assert_close(gradient, dense_gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.flax
def test_flax_loss_and_gradients_are_those_of_the_dense_head(folder, batch, tmp_path):
    run = build(run_mlm_flax, folder, tmp_path)
    selected = batch | run_mlm_flax.select_labels(batch["labels"], 16)
    shapes = []

    def mean_loss(params, inputs):
        logits = run_mlm_flax.masked_logits(params, inputs, model=run.model)
        shapes.append(logits.shape[:-1])
        labels = inputs["labels"]
        total, count = run_mlm_flax.cross_entropy(logits, jnp.maximum(labels, 0), labels >= 0)
        return total / count

    gradient = jax.jit(jax.value_and_grad(mean_loss))
    dense, dense_gradients = gradient(run.params, batch)
    sparse, sparse_gradients = gradient(run.params, selected)
    assert shapes == [(4, LENGTH), (16,)]
    assert float(sparse) == pytest.approx(float(dense), rel=1e-6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, sparse_gradients, dense_gradients)


def mix(logits):
    """Return logits that depend on all the positions there are."""
    return logits - logits.mean(1, keepdims=True)


def test_pytorch_stays_dense_where_the_head_needs_all_positions(tmp_path, caplog, monkeypatch):
    trainer = build(run_mlm, make_model(tmp_path / "model", initializer_range=0.3), tmp_path)
    settings = trainer.model, trainer.data_collator, {LENGTH}, True
    assert run_mlm.find_sparse_start(*settings) == "layer"
    head = type(trainer.model.cls)
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda self, hidden: mix(forward(self, hidden)))
    assert run_mlm.find_sparse_start(*settings) is None
    assert caplog.messages[-1] == f"BertForMaskedLM {DENSE}"


def test_the_head_is_tried_without_the_attention_of_a_gpu(tmp_path):
    def refuse(*args, **kwargs):
        raise RuntimeError("only for CUDA")

    transformers.AttentionInterface.register("gpu_only", refuse)
    transformers.AttentionMaskInterface.register("gpu_only", transformers.masking_utils.eager_mask)
    trainer = build(run_mlm, make_model(tmp_path / "model"), tmp_path)
    trainer.model.set_attn_implementation("gpu_only")
    assert run_mlm.find_sparse_start(trainer.model, trainer.data_collator, {LENGTH}, True) == "layer"
    with pytest.raises(RuntimeError, match="only for CUDA"):
        trainer.model(torch.ones(1, 4, dtype=torch.long))


def test_dense_head_is_a_flag(script, tmp_path):
    run = build(script, make_model(tmp_path / "model"), tmp_path, "--dense_head")
    assert not (run.sparse_start if script is run_mlm else run.sparse_head)


def test_no_labels_no_loss_and_no_nan(tmp_path, batch):
    trainer = build(run_mlm, make_model(tmp_path / "model"), tmp_path)
    loss, gradients, rows = pytorch_loss(
        trainer, {**batch, "labels": np.full_like(batch["labels"], -100)}, trainer.sparse_start
    )
    assert loss.item() == 0
    assert rows == [16]
    assert gradients and not any(gradient.any() for gradient in gradients.values())


def make_bart(folder):
    """Write a tiny BART; its decoder reads the masked text too."""
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, d_model=16, dropout=0.0, **sizes, **ids
    )
    config.forced_eos_token_id = None
    torch.manual_seed(0)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_an_encoder_decoder_trains(tmp_path):
    arguments = flags(
        model_name_or_path=make_bart(tmp_path / "bart"), output_dir=tmp_path / "output", do_train=True, do_eval=True
    ) + flags(max_seq_length=LENGTH, max_steps=20, logging_steps=1, learning_rate=1e-2)
    lines = write_lines(tmp_path / "train.txt", sentences(100))
    metrics = run_mlm.main([*arguments, "--train_file", lines])
    history = run_mlm.json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert metrics["eval_loss"] < losses[0] - 0.5


LABELS = arrays.arrays(np.int32, st.sampled_from([(2, 8), (3, 2, 8), (2, 2, 1, 16)]), elements=st.just(-100)).flatmap(
    lambda labels: arrays.arrays(np.int32, labels.shape, elements=st.sampled_from([-100, -100, 0, 7]))
)


@pytest.mark.shared
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LABELS, st.sampled_from([0.01, 0.15, 1.0]))
def test_no_label_is_ever_dropped(script, labels, probability):
    slots = script.label_slots(labels, probability)
    selected = script.select_labels(labels, slots)
    *groups, rows, length = labels.shape
    assert selected["positions"].shape == selected["labels"].shape == (*groups, slots)
    assert slots <= rows * length
    restored = np.full((int(np.prod(groups)), rows * length), -100)
    pairs = zip(selected["positions"].reshape(-1, slots), selected["labels"].reshape(-1, slots))
    for i, (positions, values) in enumerate(pairs):
        kept = values >= 0
        restored[i, positions[kept]] = values[kept]
        assert len(set(positions[kept])) == kept.sum()
    np.testing.assert_array_equal(restored.reshape(labels.shape), labels)


@pytest.mark.shared
def test_more_labels_than_expected_make_another_shape(script):
    # 2048 tokens at 15 %: 307 expected, standard deviation 16.2.
    generator = np.random.default_rng(0)
    slots = {script.label_slots(np.where(generator.random((16, 128)) < 0.15, 5, -100), 0.15) for _ in range(200)}
    assert len(slots) == 1
    assert script.label_slots(np.full((16, 128), 5), 0.15) == 2048
