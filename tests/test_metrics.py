"""Loss and accuracy: sums over tokens, equal to an explicit NumPy implementation, divided once."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_mlm_flax import accuracy, compute_metrics, cross_entropy

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
