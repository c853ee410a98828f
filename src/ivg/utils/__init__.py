"""What any part may use: random numbers, JSON Lines, the machine, the hub."""
