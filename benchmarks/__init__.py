"""How fast, how exact, how small: one command, one table. See README.md here."""
