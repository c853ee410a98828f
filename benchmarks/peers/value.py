"""The value network as someone without ivg would run it: torch and transformers alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Value:
    """The value of texts that follow a prompt, by a network whose head has one number for each next token.

    Args:
        folder: of the network, with ``score_head.weight``: vocabulary x hidden size.
    """

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.body = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
        self.head = load_file(Path(folder) / "model.safetensors")["score_head.weight"].float()

    def of_texts(self, prompt: str, texts: Sequence[str]) -> list[float]:
        """One number for each text."""
        return self.of_ids([self.ids(prompt, text) for text in texts])

    def best(self, prompt: str, texts: Sequence[str]) -> str:
        """The text with the highest value."""
        scores = self.of_texts(prompt, texts)
        return texts[scores.index(max(scores))]

    def ids(self, prompt: str, text: str) -> list[int]:
        """Token ids of the prompt, then those of the text."""
        return [*self.tokenizer(prompt).input_ids, *self.tokenizer(text, add_special_tokens=False).input_ids]

    @torch.inference_mode()
    def of_ids(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One number for each row: what the head has for its last token, behind those before it."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest - 1, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row) - 1], mask[i, : len(row) - 1] = torch.tensor(row[:-1]), 1
        hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        last = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        return (last * self.head[torch.tensor([row[-1] for row in rows])]).sum(1).tolist()
