"""Every masked-LM architecture is trained, evaluated, saved and loaded again; its sparse head is equal to the dense."""

import re

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SIZES, flags, make_tokenizer, optional_module, read_json, sentences, set_up, write_lines

import run_mlm

jax, jnp = optional_module("jax"), optional_module("jax.numpy")
run_mlm_flax = optional_module("run_mlm_flax")

LENGTH = 16
SMALL = {
    **{name: value for name, value in SIZES.items() if name != "vocab_size"},
    **{f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "d_model": 32,
        "emb_dim": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
# What makes an architecture small beside SMALL, or what it asks for; None leaves out a size.
CHANGES = {
    "big_bird": {"attention_type": "original_full"},  # The other one is for rows of many blocks.
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "modernbert": {"local_attention": 8},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 1, "num_cross_attention_heads": 2},
    "reformer": {
        **{"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "attention_head_size": 16, "num_buckets": 4},
        **{"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "hash_seed": 0},
    },
    "xmod": {"default_language": "en_XX"},
}
PYTORCH = {
    "layer": set(
        "bert big_bird camembert convbert data2vec-text deberta deberta-v2 electra ernie esm layoutlm longformer luke "
        "megatron-bert mra nystromformer rembert roberta roberta-prelayernorm roc_bert roformer tapas "
        "xlm-roberta xlm-roberta-xl yoso".split()
    ),
    "encoder": set(
        "albert bart distilbert flaubert fnet funnel ibert mbart mobilebert modernbert mpnet mvp reformer "
        "squeezebert xlm xmod "
        "esmc eurobert gte jina_embeddings_v3 modernvbert neomme nomic_bert ultrabert ultravbert".split()
    ),
    "dense": {"perceiver"},
}
FLAX = set("albert bert camembert distilbert electra modernbert roberta xlm-roberta".split())
# The default run tries one of each kind that other tests do not train, and what is unlike all others.
EXAMPLES = {"bart", "deberta", "longformer", "perceiver", "reformer"}
ERRORS = {"xmod": "fails on a first batch: Input language unknown"}
OWN_LOSS_FAILS = {"bart", "mbart", "mvp", "perceiver"}  # With labels: other decoder inputs, or logits of all positions.


def marked(names):
    """Return the architectures, most of them `long`."""
    return [pytest.param(name, marks=[] if name in EXAMPLES else pytest.mark.long) for name in sorted(names)]


def small_settings(config, changes):
    """Return the arguments that make a configuration like this one, but small."""
    settings = {name: value for name, value in {**SMALL, **changes}.items() if hasattr(config, name)}
    parts = {name: getattr(config, name) for name in config.sub_configs}
    settings |= {name: small_settings(part, {}) for name, part in parts.items() if part is not None}
    return {name: value for name, value in settings.items() if value is not None}


@pytest.fixture
def job(tmp_path):
    """A function that writes a tiny configuration, and returns the flags that train and evaluate it from scratch."""

    def prepare(model_type, **changes):
        config_class = transformers.CONFIG_MAPPING[model_type]
        config = config_class(**small_settings(config_class(), {**CHANGES.get(model_type, {}), **changes}))
        config.save_pretrained(tmp_path / "config")
        (tmp_path / "tokenizer").mkdir()
        make_tokenizer(tmp_path / "tokenizer")
        return flags(config_name=tmp_path / "config", tokenizer_name=tmp_path / "tokenizer", **data(tmp_path))

    return prepare


def data(folder):
    """Return the settings of all runs here."""
    return {
        "train_file": write_lines(folder / "train.txt", sentences(40)),
        "validation_file": write_lines(folder / "validation.txt", sentences(20, seed=1)),
        **{"output_dir": folder / "output", "do_train": True, "do_eval": True, "max_steps": 2, "logging_steps": 1},
        **{"max_seq_length": LENGTH, "line_by_line": "false", "learning_rate": 1e-3},
    }


def reload(script, folder):
    """Return the run that would go on with the saved model of another."""
    settings = {**data(folder), "output_dir": folder / "unused", "dropout_rate": 0}
    return set_up(script, flags(model_name_or_path=folder / "output", **settings))


def trained(script, arguments, folder):
    """Train and evaluate, and return the evaluation's loss."""
    metrics = script.main(arguments)
    history = read_json(folder, "output", "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all(0 < entry["grad_norm"] < np.inf for entry in history if "loss" in entry)
    return metrics["eval_loss"]


def test_every_architecture_is_listed():
    changed = set(run_mlm.MODEL_TYPES) ^ set().union(*PYTORCH.values())
    assert not changed, f"Come or gone in Transformers {transformers.__version__}: try them, and list them here"
    assert set(run_mlm_flax.MODEL_TYPES) == FLAX


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:Using a non-tuple:UserWarning"
)  # Of models.
@pytest.mark.parametrize("model_type", marked(set().union(*PYTORCH.values())))
def test_run_mlm_trains(job, model_type, tmp_path):
    eval_loss = trained(run_mlm, job(model_type), tmp_path)
    trainer = reload(run_mlm, tmp_path)
    assert model_type in PYTORCH[trainer.sparse_start or "dense"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eval_loss, rel=1e-6)

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model = trainer.model.train()  # Without dropout: Reformer has no gradients in evaluation.
    if model_type not in OWN_LOSS_FAILS:
        trainer.data_collator.compact = False  # Labels of all positions.
        labels = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["labels"]
        own_loss = model(**run_mlm.model_inputs(model, batch) | {"labels": labels}).loss.item()
        assert trainer.compute_loss(model, batch).item() == pytest.approx(own_loss, rel=1e-5)
    losses, gradients = [], []
    for selection in (trainer.sparse_start, None):
        trainer.sparse_start = selection
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.flax
@pytest.mark.parametrize("model_type", sorted(FLAX))
def test_run_mlm_flax_trains(job, model_type, tmp_path):
    eval_loss = trained(run_mlm_flax, job(model_type), tmp_path)
    run = reload(run_mlm_flax, tmp_path)
    assert run.evaluate()["eval_loss"] == pytest.approx(eval_loss, rel=1e-6)

    batch = run.data_collator([run.eval_dataset[i] for i in range(4)])
    selected = batch | run_mlm_flax.select_labels(batch["labels"], run_mlm_flax.label_slots(batch["labels"], 0.15))

    def mean_loss(logits, labels):
        total, count = run_mlm_flax.cross_entropy(logits, jnp.maximum(labels, 0), labels >= 0)
        return total / count

    def ours(params, inputs):
        return mean_loss(run.apply_fn(params, inputs), inputs["labels"])

    (loss, gradients), (sparse_loss, sparse_gradients) = (
        jax.jit(jax.value_and_grad(ours))(run.params, inputs) for inputs in (batch, selected)
    )
    assert float(sparse_loss) == pytest.approx(float(loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(sparse_gradients), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(ERRORS))
def test_an_architecture_that_does_not_work_is_one_line(job, model_type, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_mlm.main(job(model_type, default_language=None))
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ERRORS[model_type] in line
    assert not (tmp_path / "output" / "config.json").exists()


def test_readme_lists_them():
    lines = (
        (ROOT / "configs" / "README.md")
        .read_text(encoding="utf-8")
        .split("## Architectures\n")[1]
        .split("\n## ")[0]
        .splitlines()
    )
    rows = [line.split("|")[2] for line in lines if line.startswith("| ")][2:]
    assert [sorted(re.findall(r"`(.+?)`", cell)) for cell in rows] == [sorted(names) for names in PYTORCH.values()]
    own = next(line for line in lines if line.startswith("`run_mlm_flax.py` has"))
    assert set(re.findall(r"`(.+?)`", own)) - {"run_mlm_flax.py"} == FLAX
