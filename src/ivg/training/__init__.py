"""From data to models: the pair and the reward model by TRL, rollouts, and values by our own trainer. Needs the extra ``train``."""
