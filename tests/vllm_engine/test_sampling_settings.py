"""Penalties and biases inside vLLM: on the guided logits, as the transformers engine's."""

from __future__ import annotations

import pytest
from making import models, prompts, trio

from ivg.errors import ConfigError

GREEDY = {"temperature": 0.0, "max_new_tokens": 32, "beta": 1.0}


def test_settings_are_those_of_the_transformers_engine(folder):
    paths, texts = trio(folder, "llama"), prompts(3)
    with models("transformers", models=paths) as slow, models("vllm", models=paths, search={"method": "eft"}) as fast:
        plain = [c.token_ids for c in slow.generate(texts, "eft", **GREEDY)]
        often = plain[0][4]
        for settings in (
            {"frequency_penalty": 1.5, "presence_penalty": 0.5},
            {"logit_bias": {often: -20.0}, "repetition_penalty": 1.2, "frequency_penalty": -0.3},
            {"stop_token_ids": [often]},
            {"stop_token_ids": [often], "min_new_tokens": 12},
        ):
            expected = [(c.token_ids, c.text) for c in slow.generate(texts, "eft", **GREEDY, **settings)]
            assert [(c.token_ids, c.text) for c in fast.generate(texts, "eft", **GREEDY, **settings)] == expected
            assert [ids for ids, _ in expected] != plain
        words = dict.fromkeys(slow.base.tokenizer(" was . long").input_ids, 30.0)
        ended = {"logit_bias": words, "frequency_penalty": 2.0, "ignore_eos": True, "end_at_sentence": 5}
        expected = [(c.token_ids, c.finish_reason) for c in slow.generate(texts, "eft", **GREEDY, **ended)]
        assert all(reason == "stop" and 5 <= len(ids) < 20 for ids, reason in expected)
        assert [(c.token_ids, c.finish_reason) for c in fast.generate(texts, "eft", **GREEDY, **ended)] == expected
        for name, value in {"frequency_penalty": 1.0, "bad_words": ["a"]}.items():
            with pytest.raises(ConfigError, match=f"{name} in chunks: the engine vllm cannot do that"):
                fast.generate(texts[0], "custom", token="implicit", chunk_length=4, **{name: value})
        with pytest.raises(ConfigError, match="stop_token_ids beside ignore_eos"):
            fast.generate(texts[0], "eft", stop_token_ids=[5], ignore_eos=True)
