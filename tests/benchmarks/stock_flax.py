"""The stock recipe on Flax, anew: samples fetched one by one, one-hot cross entropy over all positions, `pmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import stock
from flax import traverse_util
from flax.jax_utils import replicate
from flax.training import train_state
from flax.training.common_utils import shard
from transformers import AutoTokenizer, FlaxAutoModelForMaskedLM


class NumpyCollator:
    """Pads with the tokenizer and masks in NumPy."""

    def __init__(self, tokenizer, mlm_probability=0.15):
        self.tokenizer, self.mlm_probability = tokenizer, mlm_probability

    def __call__(self, examples, pad_to_multiple_of=16):
        """Return the masked batch as NumPy arrays."""
        batch = self.tokenizer.pad(examples, pad_to_multiple_of=pad_to_multiple_of, return_tensors="np")
        special = batch.pop("special_tokens_mask").astype(bool)
        batch["input_ids"], batch["labels"] = self.mask_tokens(batch["input_ids"], special)
        return batch

    def mask_tokens(self, input_ids, special):
        """Choose 15 % of the tokens; of these 80 % become the mask token, 10 % a random one."""
        labels = input_ids.copy()
        probabilities = np.where(special, 0.0, np.full(labels.shape, self.mlm_probability))
        chosen = np.random.binomial(1, probabilities, size=labels.shape).astype(bool)
        labels[~chosen] = -100
        masked = np.random.binomial(1, np.full(labels.shape, 0.8)).astype(bool) & chosen
        input_ids[masked] = self.tokenizer.mask_token_id
        swapped = np.random.binomial(1, np.full(labels.shape, 0.5)).astype(bool) & chosen & ~masked
        words = np.random.randint(len(self.tokenizer), size=labels.shape, dtype="i4")
        input_ids[swapped] = words[swapped]
        return input_ids, labels


class FlaxRun:
    """Model, data and compiled steps of the stock Flax recipe."""

    def __init__(self, spec, max_steps=1000):
        self.spec, self.rng = spec, jax.random.PRNGKey(42)
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        self.data = stock.load_data(spec, tokenizer)
        self.collator = NumpyCollator(tokenizer)
        dtype = jnp.bfloat16 if spec["bf16"] else jnp.float32
        self.model = FlaxAutoModelForMaskedLM.from_pretrained(spec["model"], seed=42, dtype=dtype)
        optimizer = optax.adamw(
            optax.linear_schedule(5e-5, 0.0, max_steps), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mask=decay_mask
        )
        self.state = train_state.TrainState.create(apply_fn=self.model.__call__, params=self.model.params, tx=optimizer)
        self.train_step = jax.pmap(flax_train_step, "batch", donate_argnums=(0,))
        self.eval_step = jax.pmap(self.flax_eval_step, "batch")

    def flax_eval_step(self, params, batch):
        """Return the sums over the labels of all devices."""
        labels = batch.pop("labels")
        logits = self.model(**batch, params=params, train=False)[0]
        loss, mask = one_hot_loss(logits, labels)
        hits = jnp.equal(jnp.argmax(logits, axis=-1), labels) * mask
        return jax.lax.psum({"loss": loss, "accuracy": hits.sum(), "normalizer": mask.sum()}, "batch")

    def batches(self, split, order):
        """Yield device batches: samples one by one, then the collator, then one part per device."""
        size = self.spec["batch"] * jax.local_device_count()
        for begin in range(0, len(order) - size + 1, size):
            samples = [self.data[split][int(i)] for i in order[begin : begin + size]]
            batch = self.collator(samples, pad_to_multiple_of=16)
            yield shard(getattr(batch, "data", batch))

    def train(self, step_done):
        """Train without end; `step_done(loss)` after each step."""
        state = replicate(self.state)
        rng, *keys = jax.random.split(self.rng, jax.local_device_count() + 1)
        keys = jnp.stack(keys)
        while True:
            rng, input_rng = jax.random.split(rng)
            order = jax.random.permutation(input_rng, len(self.data["train"]))
            for batch in self.batches("train", np.asarray(order)):
                state, metrics, keys = self.train_step(state, batch, keys)
                step_done(metrics["loss"])

    def evaluate(self):
        """Return the mean metrics over the validation samples."""
        params = replicate(self.model.params)
        sums = [
            self.eval_step(params, batch)
            for batch in self.batches("validation", np.arange(len(self.data["validation"])))
        ]
        sums = [jax.device_get(jax.tree.map(lambda value: value[0], part)) for part in sums]
        total = {name: sum(part[name] for part in sums) for name in sums[0]}
        return {f"eval_{name}": float(total[name] / total["normalizer"]) for name in ("loss", "accuracy")}


def one_hot_loss(logits, labels):
    """Return (sum of the losses, weight of each position), computed at every position."""
    mask = jnp.where(labels > 0, 1.0, 0.0)
    loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])) * mask
    return loss.sum(), mask


def flax_train_step(state, batch, dropout_rng):
    """Return (state, metrics, the next dropout key) after one update, under `pmap`."""
    dropout_rng, next_rng = jax.random.split(dropout_rng)
    labels = batch.pop("labels")

    def loss_of(params):
        logits = state.apply_fn(**batch, params=params, dropout_rng=dropout_rng, train=True)[0]
        loss, mask = one_hot_loss(logits, labels)
        return loss, mask.sum()

    (loss, count), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    count, loss, gradients = jax.lax.psum((count, loss, gradients), "batch")
    gradients = jax.tree.map(lambda value: value / count, gradients)
    return state.apply_gradients(grads=gradients), {"loss": loss / count}, next_rng


def decay_mask(params):
    """Return which parameters decay: neither biases nor layer norms."""
    flat = traverse_util.flatten_dict(params)
    keep = {path: path[-1] != "bias" and not any("norm" in name.lower() for name in path) for path in flat}
    return traverse_util.unflatten_dict(keep)
