"""Before compute is spent: do the models fit together, and will guidance help? What ``ivg check`` prints."""
