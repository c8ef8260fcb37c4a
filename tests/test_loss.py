"""The sum of losses that takes the logits' memory is PyTorch's, and so is its gradient."""

from unittest import mock

import pytest
import torch
from conftest import flags, make_model, sentences, write_lines
from setups import set_up
from torch.nn import functional

import run_mlm


def loss_and_gradients(labels, scale=1.0, **options):
    """Return the summed loss of logits made of a hidden state, and the gradients of both sides of the product."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(labels), 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    loss = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum", **options)
    (loss * scale).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("numbers", [1, 3 * 11, 2**18], ids=["each", "three", "all"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_sum_and_gradients_are_pytorchs(count, smoothing, numbers):
    labels = torch.arange(count) * 3 % 11
    expected = loss_and_gradients(labels, 0.25, label_smoothing=smoothing)
    with (
        mock.patch.object(run_mlm, "CACHED_NUMBERS", numbers),
        mock.patch.object(run_mlm.LossSum, "apply", wraps=run_mlm.LossSum.apply) as quick,
        run_mlm.QuickFunctions(),
    ):
        found = loss_and_gradients(labels, 0.25, label_smoothing=smoothing)
    assert quick.call_count == 1
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_without_a_label_and_means_and_weights_are_left_to_pytorch():
    logits = torch.randn(5, 11, requires_grad=True)
    labels, ignored = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, -100, 3, -100, 5])
    cases = [(labels, {}), (labels, {"reduction": "none"}), (ignored, {"reduction": "sum"})]
    cases += [(labels, {"reduction": "sum", "weight": torch.rand(11)})]
    cases += [(labels, {"reduction": "sum", "ignore_index": 3})]
    for target, options in cases:
        before = logits.detach().clone()
        expected = functional.cross_entropy(logits, target, **options)
        with run_mlm.QuickFunctions():
            assert torch.equal(functional.cross_entropy(logits, target, **options), expected)
        assert torch.equal(logits, before)


def test_numbers_that_are_not_finite_are_seen():
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(3, 11)
        logits[1, 4] = bad
        with run_mlm.QuickFunctions():
            assert not functional.cross_entropy(logits, torch.tensor([1, 2, 3]), reduction="sum").isfinite()


def test_a_training_step_uses_it_and_an_evaluation_does_not(tmp_path):
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
    trainer.create_optimizer()
    with mock.patch.object(run_mlm.LossSum, "apply", wraps=run_mlm.LossSum.apply) as quick:
        trainer.training_step(trainer.model, batch, (batch["labels"] >= 0).sum())
        assert quick.call_count == 1
        trainer.model.eval()
        trainer.prediction_step(trainer.model, batch, False)
        assert quick.call_count == 1
