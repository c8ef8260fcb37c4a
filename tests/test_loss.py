"""The sum of losses that takes the logits' memory is PyTorch's, and so is its gradient."""

from unittest import mock

import pytest
import torch
from conftest import flags, make_model, sentences, write_lines
from setups import set_up
from torch.nn import functional

import run_mlm


def plain_sum(logits, labels, smoothing):
    return functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def loss_and_gradients(function, labels, smoothing):
    """Return a quarter of the loss of logits made of a hidden state, and the gradients of both sides of the product."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    loss = function(hidden @ weight.T, labels, smoothing) / 4
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("numbers", [1, 3 * 11, 2**18], ids=["each", "three", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_sum_and_gradients_are_pytorchs(count, smoothing, numbers):
    labels = torch.arange(count) * 3 % 11
    expected = loss_and_gradients(plain_sum, labels, smoothing)
    with mock.patch.object(run_mlm, "CACHED_NUMBERS", numbers):
        found = loss_and_gradients(run_mlm.LossSum.apply, labels, smoothing)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_not_finite_are_seen():
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(3, 11)
        logits[1, 4] = bad
        assert not run_mlm.LossSum.apply(logits, torch.tensor([1, 2, 3]), 0.0).isfinite()


def test_logits_that_another_uses_are_an_error_and_no_wrong_gradient():
    logits = torch.randn(3, 11, requires_grad=True).tanh()  # Its gradient needs its output.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_mlm.LossSum.apply(logits, torch.tensor([1, 2, 3]), 0.0).backward()
    with pytest.raises(AssertionError):
        run_mlm.LossSum.apply(torch.zeros(6, 11), torch.tensor([1, 2, 3]), 0.0)


def test_a_training_step_uses_it_and_what_returns_the_logits_does_not(tmp_path):
    trainer = set_up(
        run_mlm,
        flags(
            model_name_or_path=make_model(tmp_path / "model", num_hidden_layers=1),
            train_file=write_lines(tmp_path / "train.txt", sentences(40)),
            output_dir=tmp_path / "output",
            train_batch_size=4,
            max_steps=1,
        ),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    count = (batch["labels"] >= 0).sum()
    trainer.create_optimizer()
    with mock.patch.object(run_mlm.LossSum, "apply", wraps=run_mlm.LossSum.apply) as quick:
        trainer.training_step(trainer.model, batch, count)
        assert quick.call_count == 1
        trainer.model.eval()
        trainer.prediction_step(trainer.model, batch, False)
        loss, outputs = trainer.compute_loss(trainer.model, batch, True, count)
        assert quick.call_count == 1
    labels = batch["labels"][batch["labels"] >= 0]
    torch.testing.assert_close(loss, functional.cross_entropy(outputs["logits"], labels))
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model, batch, False, count))
