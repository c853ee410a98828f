"""Texts that begin alike, read in one pass, against a pass over each alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from architectures import tiny
from ivg.models.shared_prompts import read_shared, share_prompts, shared_length, sharing_fault
from ivg.training.encoding import Encoded, prompt_rows

pytestmark = pytest.mark.numerics
TOKENS = st.integers(1, 40)
GROUP = st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4))


def body(name, **more):
    return tiny(name, **more).base_model.float().eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def network(request):
    return body(request.param)


@torch.no_grad()
def alone(network, text):
    return network(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(GROUP, min_size=1, max_size=3))
def test_each_text_is_read_as_if_it_were_alone(network, groups):
    packed = [[(prompt + response, len(prompt)) for response in responses] for prompt, responses in groups]
    rows = share_prompts(packed, pad=0)
    assert rows.input_ids.shape[1] == max(map(shared_length, packed))
    with torch.no_grad():
        got = read_shared(network, rows)
    texts = [text for group in packed for text, _ in group]
    assert len(got) == len(texts)
    for hidden, text in zip(got, texts, strict=True):
        torch.testing.assert_close(hidden[: len(text)], alone(network, text), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_both_kinds_of_attention(attention):
    network = body("llama")
    network.set_attn_implementation(attention)
    text = ([5, 6, 7, 8], 2), ([5, 6, 9], 2)
    with torch.no_grad():
        got = read_shared(network, share_prompts([text], 0))
    torch.testing.assert_close(got[1, :3], alone(network, [5, 6, 9]), atol=2e-5, rtol=1e-4)


def test_gradients_are_those_of_separate_passes():
    network = body("llama")
    texts = [([3, 4, 5, 6, 7], 3), ([3, 4, 5, 9], 3)]

    def gradients(hidden):
        network.zero_grad()
        sum((h * torch.arange(h.numel()).view_as(h)).sum() for h in hidden).backward()
        return {name: p.grad.clone() for name, p in network.named_parameters()}

    together = read_shared(network, share_prompts([texts], 0))
    got = gradients([together[i, : len(text)] for i, (text, _) in enumerate(texts)])
    wanted = gradients([network(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0] for text, _ in texts])
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "more", "fault"),
    [
        ("llama", {}, None),
        ("gpt2", {}, None),
        ("mistral", {"sliding_window": 64}, None),
        ("mistral", {"sliding_window": 8}, "window of 8"),
        ("bloom", {}, "ALiBi"),
        ("mamba", {}, "layers"),
    ],
)
def test_which_networks_can_share(name, more, fault):
    found = sharing_fault(body(name, **more), longest=32)
    assert found is None if fault is None else fault in found


def behaving(network, forward, monkeypatch):
    """``network`` with ``forward``, which gets its own one and the mask; the other inputs are passed on."""
    own = network.forward

    def replaced(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        return forward(own, attention_mask, **inputs)

    monkeypatch.setattr(network, "forward", replaced)
    return network


def test_a_network_that_ignores_its_mask_is_found_by_the_trial(monkeypatch):
    network = behaving(body("llama"), lambda own, _, **inputs: own(**inputs), monkeypatch)
    assert "gives other outputs" in sharing_fault(network, 32)


def test_a_network_that_takes_no_mask_for_each_token_is_refused(monkeypatch):
    def forward(own, mask, **inputs):
        assert mask is None or mask.dim() == 2, "expected a mask of two axes"
        return own(attention_mask=mask, **inputs)

    assert "expected a mask of two axes" in sharing_fault(behaving(body("llama"), forward, monkeypatch), 32)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=30), st.integers(14, 40))
def test_rows_are_grouped_by_prompt_and_none_is_lost(lengths, limit):
    rows = [Encoded([7] * (5 + length), 5, float(i), group) for i, (group, length) in enumerate(lengths)]
    found = prompt_rows(rows, limit)
    assert sorted(row.score for group in found for row in group) == [row.score for row in rows]
    for group in found:
        assert len({row.group for row in group}) == 1
        assert shared_length([(row.ids, row.prompt_length) for row in group]) <= limit
        assert [row.score for row in group] == sorted(row.score for row in group)
