"""Log-probabilities for DPO on a CPU: TRL's own numbers and gradients."""

import copy

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from ivg.testing import tiny_model
from ivg.training import cpu_head

pytestmark = pytest.mark.numerics
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def scored(model, ids, mask, labels, dtype=torch.float32):
    """What the fused head gives, and the gradients of a weighted sum of the log-probabilities."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    weights = torch.linspace(-1, 1, found.log_probs.numel()).view_as(found.log_probs)
    (found.log_probs * weights).sum().backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rows_in_a_block", [1, 3, 1000])
def test_it_gives_the_numbers_and_gradients_of_trl(architecture, rows_in_a_block, monkeypatch):
    monkeypatch.setattr(cpu_head, "BLOCK_BYTES", 4 * 257 * rows_in_a_block)
    monkeypatch.setattr(cpu_head, "BACKWARD_ROWS", 5)
    ours = tiny_model(architecture)
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        add_fused_lm_head(model, outputs=OUTPUTS)
    cpu_head.score_on_cpu(ours)
    ids = torch.randint(0, 257, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    labels[2] = -100  # a row of which nothing is scored
    own, own_gradients = scored(ours, ids, mask, labels)
    other, other_gradients = scored(theirs, ids, mask, labels)
    for name in ("loss", "log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(getattr(own, name), getattr(other, name).detach() if name != "log_probs" else other.log_probs)
    assert torch.equal(own.is_top1, other.is_top1) and torch.equal(own.label_mask, other.label_mask)
    assert own_gradients.keys() == other_gradients.keys()
    for name, gradient in own_gradients.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other_gradients[name])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_in_bfloat16_it_is_no_further_from_float32_than_trl(architecture):
    ids = torch.randint(0, 257, (8, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    exact, errors = tiny_model(architecture), []
    add_fused_lm_head(exact, outputs=OUTPUTS)
    wanted, gradients = scored(exact, ids, mask, ids)
    for ours in (False, True):
        model = tiny_model(architecture)
        add_fused_lm_head(model, outputs=OUTPUTS)
        assert not ours or cpu_head.score_on_cpu(model)
        found, rounded = scored(model, ids, mask, ids, torch.bfloat16)
        assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
        gaps = [float((rounded[name] - gradient).norm() / gradient.norm()) for name, gradient in gradients.items() if gradient.any()]
        errors.append((float((found.log_probs - wanted.log_probs).detach().abs().max()), max(gaps)))
    (theirs, their_gradients), (own, own_gradients) = errors
    assert own <= 1.2 * theirs and own_gradients <= 1.2 * their_gradients < 0.1


def test_of_equal_logits_the_first_token_is_the_likeliest():
    ours = tiny_model()
    weight = ours.lm_head.weight.detach()[:100]
    ours.lm_head.weight = torch.nn.Parameter(torch.cat([weight, weight, weight[:57]]))  # each of the first hundred has a later equal
    theirs = copy.deepcopy(ours)
    for model in (ours, theirs):
        add_fused_lm_head(model, outputs=OUTPUTS)
    assert cpu_head.score_on_cpu(ours)
    ids = torch.randint(0, 257, (4, 16), generator=torch.Generator().manual_seed(2))
    best = theirs(input_ids=ids).logits[:, :-1].argmax(-1)
    for later in (0, 100):
        labels = torch.nn.functional.pad(best + later, (1, 0))
        own, other = (model(input_ids=ids, labels=labels, fused_lm_head=True).is_top1 for model in (ours, theirs))
        assert torch.equal(own, other)
        assert own.any() == (later == 0)


def test_nothing_scored_gives_zero_and_a_gradient_of_zero():
    model = tiny_model()
    add_fused_lm_head(model, outputs=OUTPUTS)
    cpu_head.score_on_cpu(model)
    ids = torch.arange(12).view(2, 6)
    found, gradients = scored(model, ids, torch.ones_like(ids), torch.full_like(ids, -100))
    assert not found.log_probs.any() and all(not gradient.any() for gradient in gradients.values())


def test_models_that_scale_their_logits_keep_trls_head():
    model = tiny_model()
    model.config.logit_scale = 0.5
    add_fused_lm_head(model, outputs=OUTPUTS)
    before = model.forward
    cpu_head.score_on_cpu(model)
    assert model.forward == before


def test_logits_are_those_of_the_model_without_it():
    model = tiny_model().eval()
    add_fused_lm_head(model, outputs=OUTPUTS)
    ids = torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    cpu_head.score_on_cpu(model)
    torch.testing.assert_close(model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0], expected)
    torch.testing.assert_close(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)
