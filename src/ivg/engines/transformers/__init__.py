"""The engine that runs PyTorch models of transformers in this process."""
