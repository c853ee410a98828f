"""A sequence classifier's logits for many texts, of which some begin alike, against a pass for each text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from architectures import tiny_config
from ivg.models.shared_prompts import group_by_beginning
from ivg.values import classifier
from ivg.values.classifier import SequenceClassifier

pytestmark = pytest.mark.numerics
TOKENS = st.integers(1, 40)
PROMPTED = st.tuples(st.lists(TOKENS, max_size=12), st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=5))


def network(kind, labels=1, **more):
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(tiny_config(kind, num_labels=labels, **more)).float().eval()
    for p in made.parameters():
        p.data.add_(torch.randn(p.shape) * 0.3)
    return made


def alone(network, text):
    with torch.no_grad():
        return network(input_ids=torch.tensor([text])).logits[0]


def passes_of(network, batch_size=64):
    """(passes, list that gets the size of each pass of the body)"""
    sizes = []

    def count(_, args, inputs):
        sizes.append((args[0] if args else inputs["input_ids"]).numel())

    network.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return SequenceClassifier(network, batch_size), sizes


@pytest.fixture(scope="module", params=[("llama", 1), ("gpt2", 2)])
def classifier_network(request):
    kind, labels = request.param
    return network(kind, labels, pad_token_id=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(PROMPTED, min_size=1, max_size=4), st.integers(1, 8), st.sampled_from([6, 1024]))
def test_logits_are_those_of_each_text_alone(classifier_network, prompted, batch_size, most):
    texts = [prompt + answer for prompt, answers in prompted for answer in answers]
    before, classifier.MOST_SHARED = classifier.MOST_SHARED, most
    try:
        got = SequenceClassifier(classifier_network, batch_size).logits(texts)
    finally:
        classifier.MOST_SHARED = before
    torch.testing.assert_close(got, torch.stack([alone(classifier_network, text) for text in texts]), atol=5e-5, rtol=1e-3)


def test_a_common_beginning_is_read_once():
    net = network("llama", pad_token_id=0)
    passes, sizes = passes_of(net)
    prompt = list(range(1, 21))
    texts = [[*prompt, 30 + i, 3] for i in range(4)]
    passes.logits(texts)
    del sizes[:]
    got = passes.logits(texts)
    assert sizes == [20 + 4 * 2]
    torch.testing.assert_close(got, torch.stack([alone(net, text) for text in texts]), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("pad", [None, 0, 3])
def test_texts_that_end_with_padding_are_read_where_transformers_reads_them(pad):
    net = network("llama", pad_token_id=pad)
    texts = [[5, 6, 7, 8, 9, 10, *end] for end in ([3], [4, 3], [3, 3], [0], [2])]
    expected = [alone(net, text) for text in texts]
    passes, sizes = passes_of(net)
    got = passes.logits(texts)
    assert sizes[-1] < 6 * len(texts)
    torch.testing.assert_close(got, torch.stack(expected), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(("kind", "more"), [("bert", {}), ("bloom", {}), ("mistral", {"sliding_window": 4})])
def test_networks_that_cannot_share_read_each_text_whole(kind, more):
    net = network(kind, pad_token_id=0, **more)
    passes, sizes = passes_of(net)
    texts = [[*range(1, 13), 20 + i] for i in range(4)]
    got = passes.logits(texts)
    assert sizes[-1] == 4 * 13
    torch.testing.assert_close(got, torch.stack([alone(net, text) for text in texts]), atol=5e-5, rtol=1e-3)


def test_a_head_of_another_kind_is_found_by_the_trial():
    net = network("llama", pad_token_id=0)
    forward = net.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2  # as a network's own code may
        return out

    net.forward = doubled
    texts = [[*range(1, 13), 20 + i] for i in range(4)]
    torch.testing.assert_close(
        SequenceClassifier(net, 8).logits(texts), torch.stack([alone(net, text) for text in texts]), atol=5e-5, rtol=1e-3
    )


def test_no_text():
    assert SequenceClassifier(network("llama", pad_token_id=0), 8).logits([]).shape == (0, 1)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12), st.integers(1, 20))
def test_groups_have_each_text_once_and_begin_alike(texts, most):
    groups = group_by_beginning(texts, most)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(texts)))
    for members, shared in groups:
        assert len({tuple(texts[i][:shared]) for i in members}) == 1
        assert all(len(texts[i]) >= shared for i in members)
        left = shared + sum(len(texts[i]) - shared for i in members)
        assert left <= sum(len(texts[i]) for i in members)
        assert len(members) == 1 or left <= most
