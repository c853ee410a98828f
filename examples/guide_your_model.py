"""Align a frozen model at inference time: token guidance, chunk-level search, and both together.

    python examples/guide_your_model.py

The embedded film-review models stand in for yours: a base that likes and dislikes films equally often, and small guides that
like them. Put your own directories or hub ids in their place.
"""

from ivg import GuidedModel

model = GuidedModel.from_pretrained(
    "embedded:base",  # the model that writes, e.g. "meta-llama/Llama-2-7b-chat-hf"; its weights never change
    tuned="embedded:tuned",  # a small model after DPO, e.g. "allenai/tulu-2-dpo-7b" …
    untuned="embedded:untuned",  # … and before: their log-probability ratio is the implicit value
    value="embedded:value",  # a small network that predicts the final reward from any prefix: the explicit value
)
PROMPT = "The movie was"

# Every method is a row of one table (`ivg models` prints it). A seed gives one text, whatever else runs in the batch.
for method, what in {
    "base": "the base alone",
    "eft": "the implicit value shifts every token's logits",
    "cbs-explicit": "chunk-level beam search: the explicit value keeps the best 4 of 16 every 5 tokens",
    "ivg": "both: integrated value guidance",
}.items():
    answer = model.generate(PROMPT, method, seed=1, max_new_tokens=30)
    print(f"\n{method}: {what}\n  {PROMPT}{answer.text}")

# Settings are keyword arguments: how much guidance, how large a search, how to sample.
answer = model.generate(PROMPT, "ivg", beta=0.5, width=2, successors=8, chunk_length=10, temperature=1.0, seed=1)
print(f"\nscore {answer.score:+.2f} by the explicit value; tokens read: {answer.usage.forward_tokens}")

# A list of prompts is one batch. A conversation is a list of messages; its chat template is applied.
# A request that fails does not stop the others: its finish_reason is "error", and answer.error says why.
for answer in model.generate(["I have to say", "The acting"], "ivg", seed=1, max_new_tokens=20):
    print(answer.finish_reason, repr(answer.text))
