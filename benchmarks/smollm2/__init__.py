"""The paper's three experiments with SmolLM2-135M-Instruct as the base: data, steps of training, judges."""
