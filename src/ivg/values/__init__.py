"""Numbers for beams: implicit, explicit, reward, composite."""
