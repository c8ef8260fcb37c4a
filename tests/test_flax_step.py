"""One Flax step is AdamW on the mean loss over all labels; its loss, metrics and learning rates by hand."""

import functools
import inspect
import json
import math
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import flags, make_model, read_json, run_script, sentences, write_lines
from flax import jax_utils
from hypothesis import given, settings
from hypothesis import strategies as st

import run_mlm_flax
from run_mlm_flax import accuracy, compute_metrics, cross_entropy

ROWS, LENGTH, RATE, DECAY, EPSILON = 8, 16, 1e-2, 0.1, 1e-3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ADAMW = {"weight_decay": DECAY, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": EPSILON, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT without dropout."""
    return make_model(tmp_path_factory.mktemp("model"), **NO_DROPOUT)


@pytest.fixture(scope="module")
def loaded(folder):
    """The model and its parameters."""
    model_args, training_args = run_mlm_flax.ModelArguments(model_name_or_path=folder), run_mlm_flax.TrainingArguments()
    tokenizer = run_mlm_flax.load_tokenizer(model_args)
    config = run_mlm_flax.load_config(model_args, tokenizer)
    return run_mlm_flax.load_model(model_args, config, tokenizer, training_args)


@pytest.fixture(scope="module")
def step():
    """The documented call: (optimizer, batch, dropout_rng) on one device."""
    return jax.pmap(run_mlm_flax.training_step, "batch")


def make_optimizer(loaded, **settings):
    model, params = loaded
    args = run_mlm_flax.TrainingArguments(**{**ADAMW, **settings})
    return jax_utils.replicate(
        run_mlm_flax.TrainState.create(
            apply_fn=functools.partial(run_mlm_flax.masked_logits, model=model),
            params=params,
            tx=run_mlm_flax.create_optimizer(args, lambda step: RATE),
            grad_norm=np.zeros((), np.float32),
        )
    )


def make_batch(seed=0, labels_per_row=(1, 5, 0, 2, 3, 0, 0, 4)):
    """Return int32 [B, L] arrays: rows of unequal lengths, with unequal numbers of labels."""
    generator = np.random.default_rng(seed)
    batch = {"input_ids": generator.integers(5, 50, (ROWS, LENGTH)), "attention_mask": np.ones((ROWS, LENGTH), int)}
    batch["labels"] = np.full((ROWS, LENGTH), -100)
    for row, count in enumerate(labels_per_row):
        batch["attention_mask"][row, LENGTH - row :] = 0
        positions = generator.choice(LENGTH - row, count, replace=False)
        batch["labels"][row, positions] = generator.integers(0, 50, count)
    return {name: array.astype(np.int32) for name, array in batch.items()}


def on_one_device(batch):
    return {name: array[None] for name, array in batch.items()}


def rngs():
    return jax.random.split(jax.random.PRNGKey(0), 1)


def state_dict(loaded, params):
    """Return the parameters as PyTorch tensors."""
    weights = run_mlm_flax.pytorch_weights(jax_utils.unreplicate(params), loaded[0].config)
    return {name: torch.tensor(value) for name, value in weights.items()}


def assert_same_tree(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def test_three_steps_equal_pytorchs(folder, loaded, step):
    reference = transformers.AutoModelForMaskedLM.from_pretrained(folder).train()
    decayed = [value for value in reference.parameters() if value.ndim > 1]
    others = [value for value in reference.parameters() if value.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.8, 0.95),
        eps=EPSILON,
    )
    optimizer, rng = make_optimizer(loaded), rngs()
    for seed in range(3):
        batch = make_batch(seed)
        inputs = {name: torch.from_numpy(array).long() for name, array in batch.items()}
        expected = reference(**inputs).loss  # The stock loss: the mean over the labels.
        adamw.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        adamw.step()
        loss, optimizer, rng = step(optimizer, on_one_device(batch), rng)
        assert float(loss[0]) == pytest.approx(expected.item(), rel=1e-5)
        assert float(optimizer.grad_norm[0]) == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.5  # Clipping did something.
    before = transformers.AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    after, expected = state_dict(loaded, optimizer.params), reference.state_dict()
    assert expected.keys() - after.keys() == {f"cls.predictions.decoder.{name}" for name in ("weight", "bias")}  # Tied.
    for name in after:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-4, atol=1e-5)
    assert max((after[name] - before[name]).abs().max() for name in after) > RATE / 2


def test_dense_and_position_forms_agree(loaded, step):
    batch = make_batch()
    selected = batch | run_mlm_flax.select_labels(batch["labels"], 24)
    assert selected["labels"].shape == selected["positions"].shape == (24,)
    dense = step(make_optimizer(loaded), on_one_device(batch), rngs())
    sparse = step(make_optimizer(loaded), on_one_device(selected), rngs())
    assert float(sparse[0][0]) == pytest.approx(float(dense[0][0]), rel=1e-6)
    assert_same_tree(sparse[1].params, dense[1].params, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_batches_are_one_batch(loaded, step):
    batch = make_batch()
    micro_batches = {name: array.reshape(4, 2, LENGTH) for name, array in batch.items()}
    counts = (micro_batches["labels"] >= 0).sum((1, 2))
    assert len(set(counts.tolist())) == 4 or counts.min() == 0  # The mean of the means would be another number.
    whole = step(make_optimizer(loaded), on_one_device(batch), rngs())
    split = step(make_optimizer(loaded), on_one_device(micro_batches), rngs())
    assert float(split[0][0]) == pytest.approx(float(whole[0][0]), rel=1e-6)
    assert_same_tree(split[1].params, whole[1].params, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_only_decays_the_matrices(loaded, step):
    batch = make_batch(labels_per_row=[0] * ROWS)
    loss, optimizer, _ = step(make_optimizer(loaded), on_one_device(batch), rngs())
    assert float(loss[0]) == float(optimizer.grad_norm[0]) == 0
    after = jax_utils.unreplicate(optimizer.params)

    def expected(value):
        return value * (1 - RATE * DECAY) if value.ndim > 1 else value

    assert_same_tree(after, jax.tree.map(expected, loaded[1]), rtol=1e-6)
    biases = [path for path, value in jax.tree_util.tree_leaves_with_path(after) if value.ndim == 1]
    names = {path[-1].key for path in map(list, biases)}
    assert {"bias", "scale", "cls.predictions.bias"} == names


def make_stub(apply_fn, logits):
    """Return an optimizer of a model that is nothing but its logits: [B, L, V]."""
    tx = run_mlm_flax.create_optimizer(run_mlm_flax.TrainingArguments(**ADAMW), lambda step: RATE)
    zero = np.zeros((), np.float32)
    return jax_utils.replicate(
        run_mlm_flax.TrainState.create(apply_fn=apply_fn, params={"logits": logits}, tx=tx, grad_norm=zero)
    )


def test_dropout_follows_from_the_step_and_the_key_of_the_device(step):
    logits = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 50)).astype(np.float32)
    noisy = make_stub(lambda params, batch, rng: params["logits"] + jax.random.normal(rng, logits.shape), logits)

    def loss(number, key=0):
        state = noisy.replace(step=np.full(1, number, np.int32))
        return float(step(state, on_one_device(make_batch()), jax.random.split(jax.random.PRNGKey(key), 1))[0][0])

    losses = [loss(number) for number in range(3)]
    assert len({*losses, loss(0, key=1)}) == 4
    assert [loss(number) for number in (2, 0, 1)] == [losses[2], losses[0], losses[1]]  # Whatever came before.


def test_micro_batches_have_dropout_keys_of_their_own(step):
    batch = {name: np.stack([array[1:2]] * 2) for name, array in make_batch().items()}
    logits = np.zeros((1, LENGTH, 50), np.float32)
    noisy = make_stub(lambda params, batch, rng: params["logits"] + jax.random.normal(rng, logits.shape), logits)
    losses = []
    for unlabelled in range(2):  # Two equal micro-batches, of which one counts: were it for the key, whichever.
        labels = batch["labels"].copy()
        labels[unlabelled] = -100
        losses.append(float(step(noisy, on_one_device({**batch, "labels": labels}), rngs())[0][0]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_label_smoothing_is_that_of_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 50)).astype(np.float32)
    batch = make_batch()
    step = jax.pmap(functools.partial(run_mlm_flax.training_step, label_smoothing=0.1), "batch")
    loss, _, _ = step(make_stub(lambda params, *others: params["logits"], logits), on_one_device(batch), rngs())
    labelled = batch["labels"] >= 0
    total, count = run_mlm_flax.cross_entropy(logits[labelled], batch["labels"][labelled], label_smoothing=0.1)
    assert float(loss[0]) == pytest.approx(float(total / count), rel=1e-5)


def test_evaluation_step_sums(folder, loaded):
    model, params = loaded
    batch = make_batch()
    apply_fn = functools.partial(run_mlm_flax.masked_logits, model=model)
    evaluate = jax.pmap(functools.partial(run_mlm_flax.eval_step, apply_fn=apply_fn), "batch")
    sums = evaluate(jax_utils.replicate(params), on_one_device(batch))
    reference = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = {name: torch.from_numpy(array).long() for name, array in batch.items()}
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = reference(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(1)
    assert {array.shape for array in sums.values()} == {(1, 1, ROWS)}  # [D, D, B]: each device has those of all.
    np.testing.assert_array_equal(sums["normalizer"][0, 0], (labels >= 0).sum(1))
    np.testing.assert_allclose(sums["loss"][0, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(sums["accuracy"][0, 0], (logits.argmax(-1) == labels).sum(1))
    sparse = batch | run_mlm_flax.select_labels(batch["labels"], 24)
    for name, values in evaluate(jax_utils.replicate(params), on_one_device(sparse)).items():
        np.testing.assert_allclose(values, sums[name], rtol=1e-5)


@pytest.mark.long
def test_losses_do_not_depend_on_the_number_of_devices(folder, tmp_path):
    settings = {
        "model_name_or_path": folder,
        "train_file": write_lines(tmp_path / "train.txt", sentences(90)),
        "validation_file": write_lines(tmp_path / "validation.txt", sentences(16, seed=1)),
        **{"do_train": True, "do_eval": True, "eval_strategy": "no", "max_seq_length": LENGTH, "logging_steps": 1},
        **{"line_by_line": "false", "max_steps": 5, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }

    def arguments(devices):
        batch = ROWS // devices
        return flags(output_dir=tmp_path / str(devices), train_batch_size=batch, eval_batch_size=batch, **settings)

    def run(devices):
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = run_script("run_mlm_flax", arguments(devices), HF_DATASETS_CACHE=str(tmp_path / "cache"), **environment)
        assert done.returncode == 0, done.stderr
        assert f"accumulation 1, devices {devices}" in done.stdout

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(run, (2, 4))
        run_mlm_flax.main(arguments(1))
        list(runs)
    results = []
    for devices in (1, 2, 4):
        history = read_json(tmp_path, str(devices), "trainer_state.json")["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        results.append((losses, read_json(tmp_path, str(devices), "eval_results.json")))
    losses, evaluation = results[0]
    assert len(losses) == 5 and losses[0] > losses[-1]
    assert evaluation["eval_samples"] % ROWS != 0  # The last batch is partial, on some devices empty.
    for others, other_evaluation in results[1:]:
        assert others == pytest.approx(losses, rel=1e-5)
        assert other_evaluation["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
        assert other_evaluation["eval_accuracy"] == evaluation["eval_accuracy"]


# Three positions of a vocabulary of 4: probabilities (1/2, 1/4, 1/8, 1/8), uniform, and (1/16, 1/16, 1/8, 3/4).
PROBABILITIES = np.array([[1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4] * 4, [1 / 16, 1 / 16, 1 / 8, 3 / 4]])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + np.array([[3.0], [0.0], [-5.0]], np.float32)
TARGETS = np.array([1, 2, 3])
LN2 = math.log(2)


def soft_target_loss(logits, targets, weights, smoothing):
    """The documented loss with its one-hot array written out, in float64: (sum, sum of weights)."""
    size = logits.shape[-1]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    soft = np.where(np.eye(size)[targets] == 1, 1 - smoothing, smoothing / (size - 1))
    entropy = -sum(p * math.log(p) for p in [1 - smoothing] + [smoothing / (size - 1)] * (size - 1) if p > 0)
    return ((-(soft * log_probs).sum(-1) - entropy) * weights).sum(), weights.sum()


def test_cross_entropy_by_hand():
    # -ln(1/4) - ln(1/4) - ln(3/4) = 6 ln 2 - ln 3
    loss, normalizer = cross_entropy(LOGITS, TARGETS)
    assert float(loss) == pytest.approx(6 * LN2 - math.log(3), rel=1e-5)
    assert normalizer == 3
    loss, normalizer = cross_entropy(LOGITS, TARGETS, np.array([1, 0, 1]))
    assert float(loss) == pytest.approx(4 * LN2 - math.log(3), rel=1e-5)
    assert normalizer == 2
    loss, normalizer = cross_entropy(LOGITS, TARGETS, np.array([0.5, 2.0, 0.0]))
    assert float(loss) == pytest.approx(5 * LN2, rel=1e-5)
    assert normalizer == 2.5


def test_label_smoothing_by_hand():
    # Uniform logits cost ln 4 whatever the target; smoothed to (1/2, 1/6, 1/6, 1/6), ln(2)/2 + ln(6)/2 is the floor.
    loss, _ = cross_entropy(LOGITS[1:2], TARGETS[1:2], label_smoothing=0.5)
    assert float(loss) == pytest.approx(2 * LN2 - (LN2 + math.log(6)) / 2, rel=1e-5)
    # A model that predicts the smoothed distribution itself has nothing left to lose.
    best = np.log(np.array([[1 / 6, 1 / 2, 1 / 6, 1 / 6]], np.float32))
    assert float(cross_entropy(best, np.array([1]), label_smoothing=0.5)[0]) == pytest.approx(0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.9]), st.booleans())
def test_cross_entropy_equals_the_one_hot_form(seed, smoothing, weighted):
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=3, size=(2, 3, 11))
    targets = generator.integers(11, size=(2, 3))
    weights = generator.integers(0, 2, (2, 3)) if weighted else np.ones((2, 3))
    expected = soft_target_loss(logits, targets, weights, smoothing)
    loss, normalizer = cross_entropy(logits.astype(np.float32), targets, weights if weighted else None, smoothing)
    assert float(loss) == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
    assert float(normalizer) == expected[1]


def test_accuracy_counts_hits():
    assert float(accuracy(LOGITS, np.array([0, 3, 3]))) == 2
    assert float(accuracy(LOGITS, np.array([0, 3, 3]), np.array([1, 1, 0]))) == 1
    assert float(accuracy(LOGITS[None], np.array([[0, 3, 3]]), np.array([[0.5, 1, 0.25]]))) == 0.75


def test_compute_metrics_are_sums():
    weights = np.array([1, 1, 0])
    metrics = {name: float(value) for name, value in compute_metrics(LOGITS, TARGETS, weights).items()}
    assert metrics == pytest.approx({"loss": 4 * LN2, "accuracy": 0, "normalizer": 2}, rel=1e-5)
    metrics = compute_metrics(LOGITS, np.array([0, 2, 3]), np.ones(3), label_smoothing=0.5)
    expected = soft_target_loss(LOGITS.astype(np.float64), np.array([0, 2, 3]), np.ones(3), 0.5)[0]
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["accuracy"]) == 2


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert float(cross_entropy(logits, np.array([0]))[0]) == 0
    assert float(cross_entropy(logits, np.array([2]))[0]) == pytest.approx(2e4)


def test_mean_metrics_divide_once(script):
    # Sums over 8 tokens: mean loss 12 ln 2 / 8 = 1.5 ln 2, so perplexity 2 ** 1.5.
    metrics = script.mean_metrics(np.float32(12 * LN2), 6, np.int64(8))
    assert metrics == pytest.approx({"loss": 1.5 * LN2, "accuracy": 0.75, "perplexity": 2**1.5}, rel=1e-6)
    assert {type(value) for value in metrics.values()} == {float}  # What JSON can hold.


def test_mean_metrics_at_the_limits(script):
    assert script.mean_metrics(800.0, 0, 1) == {"loss": 800.0, "accuracy": 0.0, "perplexity": math.inf}
    assert script.mean_metrics(math.inf, 0, 1)["perplexity"] == math.inf
    assert math.isnan(script.mean_metrics(math.nan, 0, 1)["perplexity"])
    assert script.mean_metrics(0.0, 0, 0) == {"loss": 0.0, "accuracy": 0.0, "perplexity": 1.0}


@pytest.mark.parametrize("function", [accuracy, cross_entropy])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 1), (2, 4, 1)])
def test_targets_of_another_shape_are_an_error(function, shape):
    with pytest.raises(ValueError, match="do not fit logits"):
        function(np.zeros((2, 4, 7), np.float32), np.zeros(shape, np.int32))


make = run_mlm_flax.create_learning_rate_scheduler


def test_signature_is_the_documented_one():
    defaults = {name: item.default for name, item in inspect.signature(make).parameters.items()}
    assert list(defaults.items()) == [
        ("factors", "constant * linear_warmup * rsqrt_decay"),
        ("base_learning_rate", 0.5),
        ("warmup_steps", 1000),
        ("decay_factor", 0.5),
        ("steps_per_decay", 20000),
        ("steps_per_cycle", 100000),
    ]


@pytest.mark.parametrize(
    ("factor", "settings", "rates"),
    [
        ("constant", {"base_learning_rate": 0.25}, {0: 0.25, 10**6: 0.25}),
        ("linear_warmup", {"warmup_steps": 8}, {0: 0, 2: 0.25, 7: 0.875, 8: 1, 100: 1}),
        ("rsqrt_decay", {"warmup_steps": 16}, {0: 0.25, 16: 0.25, 64: 0.125, 10**6: 0.001}),
        ("rsqrt_normalized_decay", {"warmup_steps": 16}, {0: 1, 16: 1, 64: 0.5, 1600: 0.1}),
        ("decay_every", {"decay_factor": 0.1, "steps_per_decay": 10}, {0: 1, 9: 1, 10: 0.1, 29: 0.01, 30: 0.001}),
        (
            "cosine_decay",
            {"warmup_steps": 10, "steps_per_cycle": 40},
            {0: 1, 10: 1, 20: 0.5 + 0.5 * math.sqrt(0.5), 30: 0.5, 50: 1, 70: 0.5},
        ),
        ("linear_warmup", {"warmup_steps": 0}, {0: 1, 1: 1, 10**6: 1}),
        ("rsqrt_decay", {"warmup_steps": 0}, {0: 1, 1: 1, 64: 0.125, 10**6: 0.001}),
        ("rsqrt_normalized_decay", {"warmup_steps": 0}, {0: 1, 1: 1, 64: 0.125, 10**6: 0.001}),
        ("cosine_decay", {"warmup_steps": 0, "steps_per_cycle": 100}, {0: 1, 50: 0.5, 100: 1, 150: 0.5}),
    ],
)
def test_each_factor_by_hand(factor, settings, rates):
    schedule = make(factor, **settings)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)
        assert float(schedule(np.int32(step))) == pytest.approx(rate, rel=1e-6)


def test_factors_multiply_whatever_the_spaces():
    settings = {"base_learning_rate": 0.5, "warmup_steps": 4, "decay_factor": 0.1, "steps_per_decay": 8}
    for factors in ("constant*linear_warmup * decay_every", " constant  *  decay_every*linear_warmup "):
        schedule = make(factors, **settings)
        assert [float(schedule(step)) for step in (1, 4, 9)] == pytest.approx([0.125, 0.5, 0.05])
    # The documented default at its documented settings: 0.5 * 500 / 1000 / sqrt(1000), and 0.5 / sqrt(4000).
    assert float(make()(500)) == pytest.approx(0.25 / math.sqrt(1000))
    assert float(make()(4000)) == pytest.approx(0.5 / math.sqrt(4000))


@pytest.mark.parametrize("factors", ["constant * quadratic", "", "constant * ", "constant, linear_warmup"])
def test_an_unknown_factor_is_named(factors):
    with pytest.raises(ValueError, match="known: constant, linear_warmup, rsqrt_decay") as error:
        make(factors)
    assert repr(factors) in str(error.value)


NAMED = [(name, {}) for name in ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")]
NAMED += [
    ("warmup_stable_decay", {"num_decay_steps": 9}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 38, "decay_type": "cosine", "min_lr_ratio": 0.2}),
]


@pytest.mark.parametrize("warmup", [0, 1, 7, 0.18])  # The last is a share of 40 steps, which is 8 when rounded up.
@pytest.mark.parametrize(("name", "settings"), NAMED)
def test_named_schedules_are_the_trainers_at_every_step(name, settings, warmup):
    given = flags(learning_rate=3e-4, warmup_steps=warmup, lr_scheduler_type=name)
    given += flags(lr_scheduler_kwargs=json.dumps(settings)) if settings else []
    needed = flags(model_name_or_path="m", output_dir="o", train_file=__file__)
    ours = run_mlm_flax.create_schedule(run_mlm_flax.parse_args(needed + given)[2], 40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    stock = transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=8 if warmup == 0.18 else warmup,
        num_training_steps=40,
        scheduler_specific_kwargs=settings,
    )
    for step in range(41):
        assert float(ours(step)) == pytest.approx(stock.get_last_lr()[0], rel=1e-5, abs=1e-10), step
        optimizer.step()
        stock.step()


def test_every_named_schedule_is_compared():
    assert {name for name, _ in NAMED} == set(run_mlm_flax.SCHEDULES)
